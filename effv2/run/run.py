"""Train a configuration in a tracked run, from its beginning or from where it ended early."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace

from effv2.config.options import CheckpointOptions
from effv2.config.schema import TrainConfig
from effv2.core.errors import Diverged, InputError, what_ran_out
from effv2.core.reporter import Reporter
from effv2.data.dataset import Dataset
from effv2.execution.device import make_execution
from effv2.run.labels import Labels, identity, run_tags
from effv2.run.outcome import Outcome, keep_weights
from effv2.run.records import log_end, log_start
from effv2.run.watching import Observer
from effv2.tracking.outbox import PATIENCE, TrackingAway
from effv2.tracking.recovery import send
from effv2.tracking.run import TrackedRun, start_run
from effv2.tracking.tags import OUTCOME
from effv2.training.checkpoint import Checkpoints, Keeper, Pace, newest_step
from effv2.training.loop import Training
from effv2.training.state import TrainState

UPLOADED = "checkpoints"  # folder of the artifacts: the last checkpoint, for other machines


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


def run_experiment(
    config: TrainConfig,
    dataset: Dataset,
    labels: Labels,
    reporter: Reporter,
    log_model: bool,
    *,
    saving: CheckpointOptions,
    observer: Observer = Observer(),  # noqa: B008 (it holds nothing)
    patience: float = PATIENCE,
) -> Outcome:
    """Train `config` (resolved: no `auto`) on `dataset` in a run of its own, or go on with the run it left.

    What its last checkpoint holds is not trained again, what was logged is not logged again. At the end the tracking
    store may be away for `patience` seconds: then TrackingAway is raised, and what it lacks waits in the outbox.
    """
    execution = make_execution(config.execution)
    reporter.run_started(labels.name, config.schedule.epochs)
    if labels.continues:
        _send_what_it_logged(labels.continues, reporter)
    opened = start_run(
        labels.name,
        labels.experiment_id,
        run_tags(config, dataset, labels),
        parent=labels.parent,
        continues=labels.continues,
        message=reporter.message,
        patience=patience,
    )
    uploaded = bool(saving.checkpoint_upload_minutes or labels.continues)  # perhaps by the command that it goes on for
    with opened as run, what_ran_out():
        observer.started(run.run_id)
        checkpoints = Checkpoints.of(run.run_id, saving, asdict(identity(config, dataset)))
        state = TrainState.create(config, dataset, execution)
        if execution.compiled:
            reporter.message("compiling the blocks: the first step takes a minute or two, unless it was done before")
        logged = set[int]()
        if labels.continues:
            logged = _go_on(run, state, checkpoints, reporter)
            observer.resumed(state.progress.best_accuracy)
        if not logged:
            log_start(run, config, dataset, run.params() if labels.continues else {})
        run.check()
        keeper = _keeper(run, state, checkpoints, saving, reporter)
        training = Training(config, dataset, state, execution, _on_step(reporter, keeper))
        with _none_after_divergence(run, checkpoints, uploaded), keeper.last_one_on_the_way_out():
            pruned = _train(run, training, keeper, logged=logged, reporter=reporter, observer=observer)
        if pruned:
            outcome = _pruned(run, config, dataset, state)
            _forget(run, checkpoints, uploaded)
            return outcome
        state.take_selected()
        summary = log_end(run, config, dataset, execution, state)
        outcome = Outcome(run, config, dataset, state.evaluated, state.progress.best_accuracy, summary)
        if log_model:
            outcome.log_model()
        if observer.keeps_weights(outcome.watched_accuracy):
            keep_weights(outcome)
        run.complete()
        if uploaded:
            run.discard(UPLOADED)
    checkpoints.remove()
    ended = TrackedRun(run.run_id, run.experiment_id)
    return replace(outcome, run=ended, model_address=ended.model_address() if log_model else "")


def _train(
    run: TrackedRun, training: Training, keeper: Keeper, *, logged: set[int], reporter: Reporter, observer: Observer
) -> bool:
    """Train, log the epochs that aren't `logged`; say whether the observer ended it."""
    for result in training:
        stops = observer.stops(result)  # first, since it may turn out that the run is another process's now
        if result.epoch not in logged:
            run.log_metrics(result.metrics, step=result.epoch)
        reporter.epoch(result.epoch, result.metrics)
        if stops:
            return True
        keeper.keep(epoch_ended=True)
    return False


def _keeper(
    run: TrackedRun, state: TrainState, checkpoints: Checkpoints, saving: CheckpointOptions, reporter: Reporter
) -> Keeper:
    upload = (lambda path: run.log_only(path, UPLOADED)) if saving.checkpoint_upload_minutes else None
    return Keeper(
        checkpoints,
        Pace(60 * saving.checkpoint_minutes),
        state,
        reporter.message,
        upload,
        60 * saving.checkpoint_upload_minutes,
    )


def _on_step(reporter: Reporter, keeper: Keeper) -> Callable[[int, int], None]:
    def on_step(step: int, steps: int) -> None:
        reporter.step(step, steps)
        keeper.keep(epoch_ended=False)

    return on_step


def _send_what_it_logged(run_id: str, reporter: Reporter) -> None:
    """Send what an earlier process logged of the run, before this one goes on; TrackingAway if that can't be."""
    sending = send(run_id, reporter.message)
    if sending.end == "waits":
        where = f": set MLFLOW_TRACKING_URI to {sending.store}" if sending.store else ""
        raise TrackingAway(f"The run {run_id} can't go on before what it logged is sent{where}.")


def _go_on(run: TrackedRun, state: TrainState, checkpoints: Checkpoints, reporter: Reporter) -> set[int]:
    """Take over a checkpoint, log the epochs that it has finished and the run lacks; return all that are logged.

    Where another machine has uploaded one that came further than those here, it is that one.
    """
    logged = run.steps("time/epoch_seconds")
    uploaded = newest_step(run.names_in(UPLOADED))
    if uploaded > checkpoints.newest():
        run.fetch_folder(UPLOADED, checkpoints.folder)
    saved = checkpoints.read(reporter.message)
    if saved is None and uploaded >= 0 and run.fetch_folder(UPLOADED, checkpoints.folder):  # those here are damaged
        saved = checkpoints.read(reporter.message)
    if saved is not None:
        state.load_state_dict(saved)
    for epoch, metrics in enumerate(state.progress.history, 1):
        if epoch not in logged:
            run.log_metrics(metrics, step=epoch)
            logged.add(epoch)
    reporter.message(f"going on with the run {run.run_id} at epoch {state.progress.epoch + 1}")
    return logged


def _pruned(run: TrackedRun, config: TrainConfig, dataset: Dataset, state: TrainState) -> Outcome:
    """End a run that isn't worth going on with."""
    best = state.progress.best_accuracy
    run.log_metrics({"selected/val_accuracy": best})
    run.set_tags({OUTCOME: "pruned"})
    return Outcome(run, config, dataset, state.evaluated, best, state.progress.history[-1], pruned=True)


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


def discard_checkpoints(run_id: str, saving: CheckpointOptions) -> None:
    """Remove what is left of a run that was completed elsewhere, or while the tracking store was away."""
    Checkpoints.of(run_id, saving, {}).remove()
