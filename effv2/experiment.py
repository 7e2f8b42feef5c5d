"""One tracked training run: data, network, loop and tracking wired together."""

from __future__ import annotations

import base64
import io
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import yaml
from PIL import Image
from torch import nn

from effv2 import provenance
from effv2.architecture import build_model, count_gflops, count_parameters
from effv2.config import TrainConfig
from effv2.data.batches import normalisation
from effv2.data.dataset import Dataset, Split
from effv2.errors import InputError
from effv2.evidence.run_artifacts import Predictions, write_run_artifacts
from effv2.execution.device import Execution, make_execution
from effv2.serving.export import ServedNetwork, export_program, output_names
from effv2.tracking.run import TrackedRun, start_run
from effv2.training.evaluate import evaluate, single_image_latency
from effv2.training.loop import EpochResult, Training
from effv2.training.state import TrainState

LogModel = Literal["best", "all", "none"]  # best = that of the study's best run alone


class Display(Protocol):
    """What a run tells whoever watches."""

    def run_started(self, name: str, epochs: int) -> None:
        """Report the begin of a run."""

    def step(self, step: int, steps: int) -> None:
        """Report a step of an epoch."""

    def epoch(self, result: EpochResult) -> None:
        """Report a finished epoch."""


@dataclass(frozen=True)
class Labels:
    """How a run is named and grouped in MLflow."""

    name: str
    experiment_id: str
    study: str = ""
    arm: str = ""
    nested: bool = False


@dataclass(frozen=True)
class Outcome:
    """A finished run and its network, with the weights of the selected epoch."""

    run: TrackedRun
    config: TrainConfig
    dataset: Dataset
    network: nn.Module
    watched_accuracy: float
    summary: dict[str, float]
    model_address: str = ""

    def log_model(self) -> str:
        """Log the network, with its preprocessing, to the run, reopened if it has ended; return its address."""
        model, data, classes = self.config.model, self.config.data, self.dataset.classes
        outputs = model.outputs or len(classes)
        plain = build_model(model.build_table(), outputs)  # without the paths of the device it was trained on
        plain.load_state_dict(self.network.state_dict())
        served = ServedNetwork(plain, len(classes), *normalisation(data.normalise))
        settings = {"image_size": data.image_size, "names": output_names(classes, outputs)}
        with tempfile.TemporaryDirectory() as name:
            files = {"program": Path(name, "program.pt2"), "settings": Path(name, "settings.json")}
            export_program(served, data.image_size, files["program"])
            files["settings"].write_text(json.dumps(settings), encoding="utf-8")
            return self.run.log_model(files, _example(self.dataset.test), torch.__version__)


def run_experiment(config: TrainConfig, dataset: Dataset, labels: Labels, display: Display, log_model: bool) -> Outcome:
    """Train `config` (resolved: no `auto`) on `dataset` in a run of its own."""
    execution = make_execution(config.execution)
    tags = {
        "effv2.config_hash": config.hash(),
        "effv2.data_digest": dataset.digest(),
        "effv2.code_version": provenance.code_version(),
        "effv2.study": labels.study,
        "effv2.arm": labels.arm,
        "effv2.variant": config.model.variant,
        "effv2.seed": str(config.random.seed),
    } | {f"effv2.machine.{name}": value for name, value in provenance.machine().items()}
    display.run_started(labels.name, config.schedule.epochs)
    with start_run(labels.name, labels.experiment_id, tags, labels.nested) as run:
        _log_start(run, config, dataset)
        state = TrainState.create(config, dataset, execution)
        for result in Training(config, dataset, state, execution, display.step):
            run.log_metrics(result.metrics, step=result.epoch)
            display.epoch(result)
        if state.selected is not None:
            state.evaluated.load_state_dict(state.selected)
        summary = _log_end(run, config, dataset, execution, state)
        outcome = Outcome(run, config, dataset, state.evaluated, state.progress.best_accuracy, summary)
        address = outcome.log_model() if log_model else ""
    return replace(outcome, model_address=address)


def check(config: TrainConfig, dataset: Dataset) -> None:
    """Refuse, before a run is created, what only configuration and data together show to be wrong."""
    if 0 < config.model.outputs < len(dataset.classes):
        raise InputError(
            f"model.outputs {config.model.outputs}: the data has {len(dataset.classes)} classes; give at least as many "
            "outputs, or 0."
        )


def study_text(config: TrainConfig) -> str:
    """Write `config` as a study file that `train` runs as it is."""
    groups = config.model_dump()
    table = str(config.model.build_table())
    command = "# mlflow run . -e train -P study=<this file>"
    return f"{command}\n# Architecture: {table}\n" + yaml.safe_dump(
        {"name": "again", "config": groups}, sort_keys=False
    )


def _log_start(run: TrackedRun, config: TrainConfig, dataset: Dataset) -> None:
    run.log_params(config.flat())
    # Written first of all, so that an artifact store that refuses is noticed before anything is trained.
    run.log_text(study_text(config), "study.yaml")
    run.log_git(provenance.git_state())
    for name, split in dataset.splits.items():
        counts = np.bincount(split.labels.numpy(), minlength=len(dataset.classes)).tolist()
        profile: dict[str, Any] = {"images": len(split), "classes": dict(zip(dataset.classes, counts, strict=True))}
        if name != "train":
            profile["images_also_in_train"] = split.images_also_in(dataset.train)
        run.log_dataset(dataset.name, name, split.digest, dataset.location, profile)


def _log_end(
    run: TrackedRun, config: TrainConfig, dataset: Dataset, execution: Execution, state: TrainState
) -> dict[str, float]:
    """Log and return the summary; log predictions and figures of the network as it now is: at the selected epoch."""
    history, network = state.progress.history, state.evaluated
    test = [metrics["test/accuracy"] for metrics in history]
    best = int(np.argmax(test)) + 1
    selected = len(test) if state.selected is None else state.progress.best_epoch
    outputs = config.model.outputs or len(dataset.classes)
    summary = {
        "best/test_accuracy": test[best - 1],
        "best/epoch": best,
        "selected/test_accuracy": test[selected - 1],
        "selected/epoch": selected,
        "final/test_accuracy": test[-1],
        "time/total_train_seconds": state.progress.train_seconds,
        "inference/single_image_seconds": single_image_latency(network, config, execution),
        "model/parameters": count_parameters(network),
        "model/gflops": count_gflops(config.model.build_table(), outputs, config.data.image_size),
    }
    run.log_metrics(summary)
    probabilities = evaluate(network, dataset.test, config, execution).probabilities
    with tempfile.TemporaryDirectory() as name:
        test_set = dataset.test
        predictions = Predictions(dataset.classes, test_set.ids, test_set.labels.numpy(), probabilities.numpy())
        write_run_artifacts(Path(name), predictions, history)
        run.log_folder(Path(name))
    return summary


def _example(split: Split) -> str:
    """Return the split's first image as base64 of a PNG."""
    pixels = split.images(torch.tensor([0]))[0].permute(1, 2, 0).contiguous().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
