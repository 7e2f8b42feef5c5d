"""What a run logs before its first epoch and after its last."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from effv2.architecture import count_gflops, count_parameters
from effv2.config.schema import TrainConfig
from effv2.core import provenance
from effv2.data.dataset import Dataset
from effv2.execution.device import Forward
from effv2.run.artifacts import argmax_over_all, write_curves, write_predictions
from effv2.tracking.writer import TrackedRun
from effv2.training.loop import Training, evaluate, median_seconds


def study_text(config: TrainConfig, name: str = "again") -> str:
    """Write `config` as a study file that `train` runs as it is."""
    groups = config.model_dump()
    table = str(config.model.build_table())
    command = "# mlflow run . -e train -P study=<this file>"
    return f"{command}\n# Architecture: {table}\n" + yaml.safe_dump({"name": name, "config": groups}, sort_keys=False)


def log_start(run: TrackedRun, config: TrainConfig, dataset: Dataset, known: Mapping[str, str]) -> None:
    """Log parameters but those `known`, which a run that resumes has, study file, commit and data sets."""
    run.log_params({name: value for name, value in config.flat().items() if name not in known})
    # Written first of all, so that an artifact store that refuses is noticed before anything is trained.
    run.log_text(study_text(config), "study.yaml")
    run.log_git(provenance.git_state())
    for name, split in dataset.splits.items():
        counts = np.bincount(split.labels.numpy(), minlength=len(dataset.classes)).tolist()
        profile: dict[str, Any] = {"images": len(split), "classes": dict(zip(dataset.classes, counts, strict=True))}
        if name != "train":
            profile["images_also_in_train"] = split.images_also_in(dataset.train)
        run.log_dataset(dataset.name, name, split.digest, dataset.location, profile)


def log_end(run: TrackedRun, training: Training) -> dict[str, float]:
    """Log and return the summary; log predictions and figures of the network as it now is: at the selected epoch."""
    config, dataset, state = training.config, training.dataset, training.state
    history, network = state.progress.history, training.network_for_inference()
    selected = len(history) if state.selected is None else state.progress.best_epoch
    outputs = config.model.outputs or len(dataset.classes)
    summary: dict[str, float] = {}
    if config.evaluation.test_set:
        test = [metrics["test/accuracy"] for metrics in history]
        best = int(np.argmax(test)) + 1
        summary = {"best/test_accuracy": test[best - 1], "best/epoch": best, "final/test_accuracy": test[-1]}
        summary["selected/test_accuracy"] = log_test(run, config, dataset, network)
    if dataset.validation is not None:
        summary["selected/val_accuracy"] = history[selected - 1]["val/accuracy"]
    image = torch.zeros(1, 3, *2 * [config.data.image_size], dtype=torch.uint8)
    summary |= {
        "selected/epoch": selected,
        "time/total_train_seconds": state.progress.train_seconds,
        "inference/single_image_seconds": median_seconds(lambda: network(image).cpu()),
        "model/parameters": count_parameters(state.evaluated),
        "model/gflops": count_gflops(config.model.build_table(), outputs, config.data.image_size),
    }
    run.log_metrics(summary)
    with tempfile.TemporaryDirectory() as name:
        write_curves(Path(name), history)
        run.log_folder(Path(name))
    return summary


def log_test(run: TrackedRun, config: TrainConfig, dataset: Dataset, network: Forward) -> float:
    """Log predictions on the test set at the selected epoch and their tables; return the accuracy."""
    test_set = dataset.test
    result = evaluate(network, test_set, config.evaluation.batch_size)
    predictions = argmax_over_all(dataset.classes, test_set.ids, test_set.labels.numpy(), result.logits.numpy())
    with tempfile.TemporaryDirectory() as name:
        write_predictions(Path(name), predictions)
        run.log_folder(Path(name))
    return result.accuracy
