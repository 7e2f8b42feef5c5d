"""Train a configuration in a tracked run, from its beginning or from where it ended early."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace

from effv2.config.schema import TrainConfig
from effv2.core.errors import Diverged, InputError, Terminated, what_ran_out
from effv2.core.reporter import Message
from effv2.data.dataset import Dataset, LoadData
from effv2.execution.resolve import resolve_study, with_device
from effv2.run.outcome import Outcome, keep_weights
from effv2.run.records import log_end, log_start
from effv2.run.spec import RunSpec, identity, run_tags
from effv2.tracking.read import Identity, artifact_names, download, read_run
from effv2.tracking.run import CHECKPOINTS, OpenRun, open_run
from effv2.tracking.store import TRACKING_ERRORS
from effv2.training.checkpoint import Checkpointer, newest_step
from effv2.training.loop import Training, TrainState

FIRST_LOGGED = "time/epoch_seconds"  # metric of each epoch: what a run logs at its start is there by then


def prepare(configs: Sequence[TrainConfig], load: LoadData, message: Message) -> list[TrainConfig]:
    """Load and check the data of runs, then resolve `auto`, of all alike; InputError before any run is created."""
    configs = list(map(with_device, configs))
    for config in configs:
        dataset, outputs = load(config.data), config.model.outputs
        if 0 < outputs < len(dataset.classes):
            problem = f"the data has {len(dataset.classes)} classes"
            raise InputError("model.outputs", outputs, problem, "give at least as many outputs, or 0")
        if not config.evaluation.test_set and dataset.validation is None:
            problem = "there is no validation split, and the test set is left alone: nothing would be measured"
            raise InputError("data.validation_fraction", 0, problem, "give it a share, as 0.1")
    return resolve_study(configs, message)


def train_run(config: TrainConfig, dataset: Dataset, spec: RunSpec) -> Outcome:
    """Train `config` (resolved: no `auto`) on `dataset` in a run of its own, or resume the run that `spec` names.

    What its last checkpoint holds is not trained again, what the store has is not logged again. One is written when the
    training has ended, before anything waits for the store: from it the same command delivers what the store lacks.
    TrackingAway where the store is away for longer than the run waits at its end.
    """
    reporter, wanted = spec.reporter, identity(config, dataset)
    reporter.run_started(spec.name, config.schedule.epochs)
    opened = open_run(
        spec.name,
        spec.experiment_id,
        run_tags(config, dataset, spec),
        parent=spec.parent,
        resumes=spec.resumes,
        message=reporter.message,
        patience=spec.patience,
    )
    uploads = bool(spec.checkpoints.checkpoint_upload_minutes or spec.resumes)  # perhaps by an earlier command
    try:
        with ExitStack() as stack:
            if spec.resumes:  # locked before the store hears of it
                stack.enter_context(_checkpointer(spec.resumes, spec, wanted).lock())
            run = stack.enter_context(opened)
            stack.enter_context(what_ran_out())
            checkpointer = _checkpointer(run.run_id, spec, wanted, run)
            if not spec.resumes:
                stack.enter_context(checkpointer.lock())
            spec.callback.run_opened(run.run_id)
            training = _prepared(run, config, dataset, spec, checkpointer)
            if spec.resumes:
                spec.callback.run_resumed(training.state.progress.best_accuracy)
            run.sender.check()
            pruned = _train(run, training, checkpointer, spec)
            outcome = _prune(run, training, dataset) if pruned else _end(run, training, dataset, spec)
            if uploads:
                run.discard(CHECKPOINTS)
            run.complete("pruned" if pruned else "complete")
    except Diverged:  # it would again, so that what led there isn't needed once the store has it
        if run.delivered:
            checkpointer.remove()
            with suppress(*TRACKING_ERRORS):
                run.ended().discard(CHECKPOINTS)
        raise
    checkpointer.remove()
    return outcome


def _checkpointer(run_id: str, spec: RunSpec, wanted: Identity, run: OpenRun | None = None) -> Checkpointer:
    uploads = run is not None and spec.checkpoints.checkpoint_upload_minutes
    upload = run.upload_checkpoint if run is not None and uploads else None
    return Checkpointer(run_id, spec.checkpoints, asdict(wanted), spec.reporter.message, upload=upload)


def _prepared(
    run: OpenRun, config: TrainConfig, dataset: Dataset, spec: RunSpec, checkpointer: Checkpointer
) -> Training:
    """Build the training, from the run's last checkpoint where it resumes, and log what a run logs at its start."""
    training = Training(config, dataset)
    state = training.state
    if training.execution.compiled:
        spec.reporter.message("compiling the blocks: the first step takes a minute or two, unless it was done before")
    reporter, there = spec.reporter, read_run(run.run_id) if spec.resumes else None
    if there is not None:
        _resume(run, state, checkpointer)
        reporter.message(f"resuming the run {run.run_id} at epoch {state.progress.epoch + 1}")
    if there is None or FIRST_LOGGED not in there.metrics:
        # What was logged stays: the folder of the data may be another one now, and the store would refuse it.
        log_start(run, config, dataset, there.params if there else {})

    def on_step(step: int, steps: int) -> None:
        reporter.progress("steps", step, steps)
        checkpointer.save_if_due(state, epoch_ended=False)

    training.on_step = on_step
    return training


def _resume(run: OpenRun, state: TrainState, checkpointer: Checkpointer) -> None:
    """Take over the newest checkpoint, of this machine or another, and log the epochs that it holds.

    Those that the store has are not logged again.
    """
    uploaded = newest_step(artifact_names(run.run_id, CHECKPOINTS))
    if uploaded > checkpointer.newest():
        _fetch_checkpoints(run, checkpointer)
    saved = checkpointer.read()
    if saved is None and uploaded >= 0:  # those here are damaged
        _fetch_checkpoints(run, checkpointer)
        saved = checkpointer.read()
    if saved is not None:
        state.load_state_dict(saved)
    for epoch, metrics in enumerate(state.progress.history, 1):
        run.log_metrics(metrics, step=epoch)


def _fetch_checkpoints(run: OpenRun, checkpointer: Checkpointer) -> None:
    for name in artifact_names(run.run_id, CHECKPOINTS):
        download(run.run_id, f"{CHECKPOINTS}/{name}", checkpointer.folder)


def _train(run: OpenRun, training: Training, checkpointer: Checkpointer, spec: RunSpec) -> bool:
    """Train and log each epoch; say whether the callback pruned the run.

    A checkpoint is written when the training is told to end, and when it has ended: the rest follows from that one.
    """
    state = training.state
    try:
        for metrics in training:
            epoch = state.progress.epoch
            prunes = spec.callback.epoch_ended(epoch, metrics)  # first: the trial may be another process's by now
            run.log_metrics(metrics, step=epoch)
            spec.reporter.epoch(epoch, metrics)
            if prunes:
                return True
            checkpointer.save_if_due(state, epoch_ended=True)
    except (KeyboardInterrupt, Terminated):
        checkpointer.save(state, leaving=True)
        raise
    checkpointer.save(state)
    return False


def _end(run: OpenRun, training: Training, dataset: Dataset, spec: RunSpec) -> Outcome:
    """Log what follows from a finished training: summary, predictions, curves, the model."""
    state, config = training.state, training.config
    state.take_selected()
    summary = log_end(run, training)
    outcome = Outcome(run, config, dataset, state.evaluated, state.progress.best_accuracy, summary)
    if spec.log_model:
        outcome.log_model()
    if spec.callback.keeps_weights(outcome.watched_accuracy):
        keep_weights(outcome)
    return replace(outcome, run=run.ended())


def _prune(run: OpenRun, training: Training, dataset: Dataset) -> Outcome:
    """Log what a run leaves that isn't worth resuming."""
    state = training.state
    best, last = state.progress.best_accuracy, state.progress.history[-1]
    run.log_metrics({"selected/val_accuracy": best})
    return Outcome(run.ended(), training.config, dataset, state.evaluated, best, last, pruned=True)
