"""One tracked training run: data, network, loop and tracking wired together."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

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
from effv2.data.preparation import Square
from effv2.errors import Diverged, InputError
from effv2.evidence.run_artifacts import argmax_over_all, write_curves, write_predictions
from effv2.execution.calibration import remembered
from effv2.execution.device import Execution, Forward, make_execution
from effv2.exhaustion import what_ran_out
from effv2.serving.export import ServedNetwork, as_base64, output_names, write_served
from effv2.tracking.outbox import PATIENCE, TrackingAway
from effv2.tracking.read import Identity
from effv2.tracking.recovery import send
from effv2.tracking.run import OUTCOME, TrackedRun, start_run
from effv2.tracking.tags import ARM, COMMAND
from effv2.training.checkpoint import Checkpoints, Keeper, Pace
from effv2.training.evaluate import evaluate, single_image_latency
from effv2.training.loop import EpochResult, Training
from effv2.training.saving import Saving
from effv2.training.state import TrainState

UPLOADED = "checkpoints"  # folder of the artifacts: the last checkpoint, for other machines
WEIGHTS = "selected.pt"  # artifact: weights of the selected epoch, until the study's best run is known


class Display(Protocol):
    """What a run tells whoever watches."""

    def run_started(self, name: str, epochs: int) -> None:
        """Report the begin of a run."""

    def remark(self, text: str) -> None:
        """Say something once."""

    def step(self, step: int, steps: int) -> None:
        """Report a step of an epoch."""

    def epoch(self, result: EpochResult) -> None:
        """Report a finished epoch."""


class Observer:
    """What a study wants to know of a run, and to decide: nothing, for a run of its own."""

    def started(self, run_id: str) -> None:
        """Hear that the run is open."""

    def resumed(self, accuracy: float) -> None:
        """Hear that the run goes on from its checkpoint, with the best watched accuracy so far (below 0: none)."""

    def stops(self, result: EpochResult) -> bool:
        """Hear of an epoch; say whether to prune the run now."""
        return False

    def keeps_weights(self, accuracy: float) -> bool:
        """Say whether the weights of a run that reached this accuracy must outlive its process."""
        return False


@dataclass(frozen=True)
class Labels:
    """How a run is named and grouped in MLflow.

    `parent` is the id of the run that it becomes a child of, `continues` that of a run that ended early and goes on.
    """

    name: str
    experiment_id: str
    study: str = ""
    arm: str = ""
    parent: str = ""
    continues: str = ""


@dataclass(frozen=True)
class Outcome:
    """A finished run and its network, with the weights of the selected epoch; of a pruned one, of its last."""

    run: TrackedRun
    config: TrainConfig
    dataset: Dataset
    network: nn.Module
    watched_accuracy: float
    summary: dict[str, float]
    model_address: str = ""
    pruned: bool = False

    def log_model(self) -> None:
        """Log the network, with its preprocessing, to the run, which may have ended."""
        model, data, classes = self.config.model, self.config.data, self.dataset.classes
        outputs = model.outputs or len(classes)
        plain = build_model(model.build_table(), outputs)  # without the paths of the device it was trained on
        plain.load_state_dict(self.network.state_dict())
        served = ServedNetwork(plain, len(classes), *normalisation(data.normalise))
        with tempfile.TemporaryDirectory() as name:
            files = write_served(Path(name), served, Square(data.image_size), output_names(classes, outputs))
            self.run.log_model(files, _example(self.dataset.test), torch.__version__)


def identity(config: TrainConfig, dataset: Dataset) -> Identity:
    """Return what decides the numbers of a run: equal identities on one machine mean equal runs."""
    return Identity(config.hash(), dataset.digest(), provenance.code_version())


def reached(summary: Mapping[str, float]) -> float:
    """Return the watched accuracy at its best epoch from the metrics that a finished run logged."""
    return summary["selected/val_accuracy"] if "selected/val_accuracy" in summary else summary["best/test_accuracy"]


def run_experiment(
    config: TrainConfig,
    dataset: Dataset,
    labels: Labels,
    display: Display,
    log_model: bool,
    *,
    saving: Saving,
    observer: Observer = Observer(),  # noqa: B008 (it holds nothing)
    patience: float = PATIENCE,
) -> Outcome:
    """Train `config` (resolved: no `auto`) on `dataset` in a run of its own, or go on with the run it left.

    What its last checkpoint holds is not trained again, what was logged is not logged again. At the end the tracking
    store may be away for `patience` seconds: then TrackingAway is raised, and what it lacks waits in the outbox.
    """
    execution = make_execution(config.execution)
    display.run_started(labels.name, config.schedule.epochs)
    if labels.continues and (sending := send(labels.continues, display.remark)).end == "waits":
        where = f": set MLFLOW_TRACKING_URI to {sending.store}" if sending.store else ""
        raise TrackingAway(f"The run {labels.continues} can't go on before what it logged is sent{where}.")
    opened = start_run(
        labels.name,
        labels.experiment_id,
        _tags(config, dataset, labels),
        parent=labels.parent,
        continues=labels.continues,
        remark=display.remark,
        patience=patience,
    )
    with opened as run, what_ran_out():
        observer.started(run.run_id)
        checkpoints = Checkpoints.of(run.run_id, saving, asdict(identity(config, dataset)))
        state = TrainState.create(config, dataset, execution)
        if execution.compiled:
            display.remark("compiling the blocks: the first step takes a minute or two, unless it was done before")
        logged = _go_on(run, state, checkpoints, display) if labels.continues else set[int]()
        if labels.continues:
            observer.resumed(state.progress.best_accuracy)
        if not logged:
            _log_start(run, config, dataset, run.params() if labels.continues else {})
        run.check()
        upload = (lambda path: run.log_only(path, UPLOADED)) if saving.upload_minutes else None
        pace = Pace(60 * saving.minutes)
        keeper = Keeper(checkpoints, pace, state, display.remark, upload, 60 * saving.upload_minutes)
        uploaded = bool(saving.upload_minutes or labels.continues)  # perhaps by the command that it goes on for
        with keeper.last_one_on_the_way_out(), _none_after_divergence(run, checkpoints, uploaded):
            for result in Training(config, dataset, state, execution, _on_step(display, keeper)):
                stops = observer.stops(result)  # first, since it may turn out that the run is another process's now
                if result.epoch not in logged:
                    run.log_metrics(result.metrics, step=result.epoch)
                display.epoch(result)
                if stops:
                    _forget(run, checkpoints, uploaded)
                    return _pruned(run, config, dataset, state)
                keeper.keep(epoch_ended=True)
        state.take_selected()
        summary = _log_end(run, config, dataset, execution, state)
        outcome = Outcome(run, config, dataset, state.evaluated, state.progress.best_accuracy, summary)
        if log_model:
            outcome.log_model()
        if observer.keeps_weights(outcome.watched_accuracy):
            _keep_weights(outcome)
        run.complete()
        if uploaded:
            run.discard(UPLOADED)
    checkpoints.remove()
    ended = TrackedRun(run.run_id, run.experiment_id)
    return replace(outcome, run=ended, model_address=ended.model_address() if log_model else "")


def _tags(config: TrainConfig, dataset: Dataset, labels: Labels) -> dict[str, str]:
    own = {
        "effv2.study": labels.study,
        ARM: labels.arm,
        "effv2.variant": config.model.variant,
        "effv2.seed": str(config.random.seed),
    }
    machine = {f"effv2.machine.{name}": value for name, value in provenance.machine().items()}
    timed = remembered(config) if config.execution.device == "cpu" else None
    calibration = {"effv2.calibration": str(timed)} if timed else {}
    command = {} if labels.parent else {COMMAND: provenance.command()}
    return identity(config, dataset).tags() | own | machine | calibration | command


@contextmanager
def _none_after_divergence(run: TrackedRun, checkpoints: Checkpoints, uploaded: bool) -> Iterator[None]:
    """Remove the checkpoints of a training that diverges: it would again."""
    try:
        yield
    except Diverged:
        _forget(run, checkpoints, uploaded)
        raise


def _forget(run: TrackedRun, checkpoints: Checkpoints, uploaded: bool) -> None:
    """Remove the checkpoints here, and those that were uploaded."""
    checkpoints.remove()
    if uploaded:
        run.discard(UPLOADED)


def _on_step(display: Display, keeper: Keeper) -> Callable[[int, int], None]:
    def on_step(step: int, steps: int) -> None:
        display.step(step, steps)
        keeper.keep(epoch_ended=False)

    return on_step


def _pruned(run: TrackedRun, config: TrainConfig, dataset: Dataset, state: TrainState) -> Outcome:
    """End a run that isn't worth going on with."""
    best = state.progress.best_accuracy
    run.log_metrics({"selected/val_accuracy": best})
    run.set_tags({OUTCOME: "pruned"})
    return Outcome(run, config, dataset, state.evaluated, best, state.progress.history[-1], pruned=True)


def _go_on(run: TrackedRun, state: TrainState, checkpoints: Checkpoints, display: Display) -> set[int]:
    """Take over a checkpoint, log the epochs that it has finished and the run lacks; return all that are logged.

    Where this machine has none, it is that which another one uploaded.
    """
    logged = run.steps("time/epoch_seconds")
    saved = checkpoints.read(display.remark)
    if saved is None and run.fetch_folder(UPLOADED, checkpoints.folder):
        saved = checkpoints.read(display.remark)
    if saved is not None:
        state.load_state_dict(saved)
    for epoch, metrics in enumerate(state.progress.history, 1):
        if epoch not in logged:
            run.log_metrics(metrics, step=epoch)
            logged.add(epoch)
    display.remark(f"going on with the run {run.run_id} at epoch {state.progress.epoch + 1}")
    return logged


def discard_checkpoints(run_id: str, saving: Saving) -> None:
    """Remove what is left of a run that was completed elsewhere, or while the tracking store was away."""
    Checkpoints.of(run_id, saving, {}).remove()


def restore(run: TrackedRun, config: TrainConfig, dataset: Dataset) -> Outcome:
    """Return the outcome of a finished run, from the weights that it kept; trained again where it kept none."""
    execution = make_execution(config.execution)
    with tempfile.TemporaryDirectory() as folder:
        path = run.fetch(WEIGHTS, Path(folder))
        weights = None if path is None else torch.load(path, map_location="cpu", weights_only=True)
    state = TrainState.create(config, dataset, execution)
    if weights is None:
        for _ in Training(config, dataset, state, execution):
            pass
        state.take_selected()
    else:
        state.evaluated.load_state_dict(weights)
    return Outcome(run, config, dataset, state.evaluated, state.progress.best_accuracy, {})


def score_on_test(outcome: Outcome) -> float:
    """Evaluate an outcome on the test set, which its run has not seen, and log to the run; return the accuracy."""
    execution = make_execution(outcome.config.execution)
    form = execution.following(outcome.network)()
    accuracy = _log_test(outcome.run, outcome.config, outcome.dataset, execution, form)
    outcome.run.log_metrics({"selected/test_accuracy": accuracy})
    return accuracy


def _keep_weights(outcome: Outcome) -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.save(outcome.network.state_dict(), Path(folder, WEIGHTS))
        outcome.run.log_folder(Path(folder))


def check(config: TrainConfig, dataset: Dataset) -> None:
    """Refuse, before a run is created, what only configuration and data together show to be wrong."""
    if 0 < config.model.outputs < len(dataset.classes):
        raise InputError(
            f"model.outputs {config.model.outputs}: the data has {len(dataset.classes)} classes; give at least as many "
            "outputs, or 0."
        )
    if not config.evaluation.test_set and dataset.validation is None:
        raise InputError(
            "evaluation.test_set false: without a validation split nothing would be measured; give "
            "data.validation_fraction a share, as 0.1."
        )


def study_text(config: TrainConfig, name: str = "again") -> str:
    """Write `config` as a study file that `train` runs as it is."""
    groups = config.model_dump()
    table = str(config.model.build_table())
    command = "# mlflow run . -e train -P study=<this file>"
    return f"{command}\n# Architecture: {table}\n" + yaml.safe_dump({"name": name, "config": groups}, sort_keys=False)


def _log_start(run: TrackedRun, config: TrainConfig, dataset: Dataset, known: Mapping[str, str]) -> None:
    # What was logged stays: the folder of the data may be another one now, and the store would refuse it.
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


def _log_end(
    run: TrackedRun, config: TrainConfig, dataset: Dataset, execution: Execution, state: TrainState
) -> dict[str, float]:
    """Log and return the summary; log predictions and figures of the network as it now is: at the selected epoch."""
    history, network = state.progress.history, state.evaluated
    form = execution.following(network)()
    selected = len(history) if state.selected is None else state.progress.best_epoch
    outputs = config.model.outputs or len(dataset.classes)
    summary: dict[str, float] = {}
    if config.evaluation.test_set:
        test = [metrics["test/accuracy"] for metrics in history]
        best = int(np.argmax(test)) + 1
        summary = {"best/test_accuracy": test[best - 1], "best/epoch": best, "final/test_accuracy": test[-1]}
        summary["selected/test_accuracy"] = _log_test(run, config, dataset, execution, form)
    if dataset.validation is not None:
        summary["selected/val_accuracy"] = history[selected - 1]["val/accuracy"]
    summary |= {
        "selected/epoch": selected,
        "time/total_train_seconds": state.progress.train_seconds,
        "inference/single_image_seconds": single_image_latency(form, config, execution),
        "model/parameters": count_parameters(network),
        "model/gflops": count_gflops(config.model.build_table(), outputs, config.data.image_size),
    }
    run.log_metrics(summary)
    with tempfile.TemporaryDirectory() as name:
        write_curves(Path(name), history)
        run.log_folder(Path(name))
    return summary


def _log_test(run: TrackedRun, config: TrainConfig, dataset: Dataset, execution: Execution, form: Forward) -> float:
    """Log predictions on the test set at the selected epoch and their tables; return the accuracy."""
    test_set = dataset.test
    result = evaluate(form, test_set, config, execution)
    predictions = argmax_over_all(dataset.classes, test_set.ids, test_set.labels.numpy(), result.logits.numpy())
    with tempfile.TemporaryDirectory() as name:
        write_predictions(Path(name), predictions)
        run.log_folder(Path(name))
    return result.accuracy


def _example(split: Split) -> str:
    """Return the split's first image as a request holds it."""
    return as_base64(Image.fromarray(split.images(torch.tensor([0]))[0].permute(1, 2, 0).contiguous().numpy()))
