"""The one policy of resuming: a run of equal identity is found finished, resumed where it ended, or started."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from effv2.config.schema import TrainConfig
from effv2.core.reporter import Message, Reporter
from effv2.data.dataset import Dataset
from effv2.run.labels import Labels, identity
from effv2.run.outcome import reached
from effv2.run.run import discard_checkpoints, run_experiment
from effv2.run.watching import Observer
from effv2.tracking.outbox import PATIENCE
from effv2.tracking.read import Identity, RunRecord, find_ended_early, find_finished, find_outdated, read_runs
from effv2.tracking.recovery import is_busy, send
from effv2.tracking.run import TrackedRun, find_run, point_adopted_run_to
from effv2.tracking.tags import OUTCOME
from effv2.training.saving import Saving


@dataclass(frozen=True)
class Earlier:
    """What there is of a run: the finished one, or the id of an interrupted one to resume, or neither."""

    finished: RunRecord | None = None
    interrupted: str = ""


def find_earlier(
    wanted: Identity, experiment_id: str, message: Message, *, previous: str | None = None, parent: str = ""
) -> Earlier:
    """Return what earlier commands left of a run of this identity.

    `previous` is the run that an earlier attempt at the same trial left, if any; one that its dead process left open
    is ended first, and one that a living process works on is not resumed. None: there is no queue. Then the last
    interrupted run that belongs to no study is resumed, unless another one was finished after it began; `message` says
    why an outdated one can't be. With `parent`, only children of that run count as finished.
    """
    if previous is None:
        finished = find_finished(wanted, experiment_id, parent)
        if (left := find_ended_early(wanted, experiment_id, finished)) is not None:
            return Earlier(interrupted=left.run_id)
        if finished is None and (outdated := find_outdated(wanted, experiment_id)) is not None:
            message("The run {} that ended early can't be resumed: {}.".format(*outdated))
        return Earlier(finished)
    if previous:
        send(previous, message)
    run = find_run(previous) if previous else None
    if run is not None:
        complete = run.end_left_open()
        (record,) = read_runs([previous], [])
        if complete or record.status == "FINISHED":
            return Earlier(record)
    finished = find_finished(wanted, experiment_id, parent)
    if finished is not None or run is None or is_busy(previous):
        return Earlier(finished)
    return Earlier(interrupted=previous)


@dataclass(frozen=True)
class Task:
    """A planned run: where it stands in MLflow, who follows it, and the run that an earlier attempt left.

    `previous` is None for a run of its own, which no queue knows. With `fresh`, nothing counts that was there before
    the run's study, or before the run itself.
    """

    labels: Labels
    reporter: Reporter
    log_model: bool
    saving: Saving
    fresh: bool = False
    previous: str | None = None
    observer: Observer = field(default_factory=Observer)
    patience: float = PATIENCE  # seconds that the end of the run waits for a tracking store that is away

    def find_earlier(self, wanted: Identity) -> Earlier:
        """Return what earlier commands left of the run."""
        if self.fresh and self.previous is None:
            return Earlier()
        parent = self.labels.parent if self.fresh else ""
        experiment_id, message = self.labels.experiment_id, self.reporter.message
        return find_earlier(wanted, experiment_id, message, previous=self.previous, parent=parent)


@dataclass(frozen=True)
class Attempt:
    """The run that answers a task, its last metrics, and the accuracy that it is judged by."""

    run: TrackedRun
    metrics: Mapping[str, float]
    accuracy: float
    pruned: bool = False
    was_finished: bool = False  # by an earlier command: nothing was computed

    @property
    def model_address(self) -> str:
        """Return the address of the run's model, empty where it has none."""
        return self.run.model_address()


def attempt(config: TrainConfig, dataset: Dataset, task: Task) -> Attempt:
    """Find the run of a task finished, resume it, or train it from its beginning."""
    earlier, labels = task.find_earlier(identity(config, dataset)), task.labels
    if (done := earlier.finished) is not None:
        run = TrackedRun(done.run_id, labels.experiment_id)
        point_adopted_run_to(run)
        discard_checkpoints(run.run_id, task.saving)
        pruned = done.tags.get(OUTCOME) == "pruned"
        return Attempt(run, done.metrics, reached(done.metrics), pruned, was_finished=True)
    if earlier.interrupted:
        point_adopted_run_to(TrackedRun(earlier.interrupted, labels.experiment_id))
    outcome = run_experiment(
        config,
        dataset,
        replace(labels, continues=earlier.interrupted),
        task.reporter,
        task.log_model,
        saving=task.saving,
        observer=task.observer,
        patience=task.patience,
    )
    return Attempt(outcome.run, outcome.summary, outcome.watched_accuracy, outcome.pruned)
