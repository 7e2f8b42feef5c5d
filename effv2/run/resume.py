"""The one policy of resuming: a run of equal identity is found finished, resumed where it ended early, or started."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

from effv2.config.options import StudyOptions
from effv2.config.schema import TrainConfig
from effv2.core.processes import is_alive, this_process
from effv2.core.reporter import Reporter
from effv2.data.dataset import Dataset, load_once
from effv2.run.run import prepare, train_run
from effv2.run.spec import RunSpec, identity
from effv2.tracking.accuracies import reached_accuracy
from effv2.tracking.read import Identity, RunRecord, find_runs, read_run
from effv2.tracking.run import end_left_open, open_experiment, point_adopted_run_to
from effv2.tracking.store import tracking_faults
from effv2.tracking.tags import CONFIG_HASH, OUTCOME, PARENT, PROCESS
from effv2.tracking.writer import TrackedRun, model_address
from effv2.training.checkpoint import Checkpointer


@dataclass(frozen=True)
class Earlier:
    """What there is of a run: the finished one, or the id of an interrupted one to resume, or neither."""

    finished: RunRecord | None = None
    interrupted: str = ""


def find_earlier(wanted: Identity, spec: RunSpec) -> Earlier:
    """Return what earlier commands left of a run of this identity.

    Of a trial that was worked on before it is the run of that attempt, ended where a dead process left it open; not
    while a living process works on it. Without a queue it is the last interrupted run that belongs to no study, unless
    another one was finished after it began. A fresh study counts finished runs of its own alone.
    """
    if spec.fresh and spec.previous is None:
        return Earlier()
    run = read_run(spec.previous) if spec.previous else None
    busy = run is not None and (_is_worked_on(run) or _checkpointer(run.run_id, spec).is_locked())
    if run is not None and not busy and (end_left_open(run.run_id) or run.status == "FINISHED"):
        return Earlier(read_run(run.run_id))
    within = {PARENT: spec.parent} if spec.fresh else {}
    complete = wanted.tags() | within | {OUTCOME: "complete"}
    finished = next(iter(find_runs(spec.experiment_id, complete, ("FINISHED",))), None)
    if spec.previous is None:
        last = _interrupted(wanted, spec, finished)
        return Earlier(finished) if last is None else Earlier(interrupted=last.run_id)
    return Earlier(finished) if finished or run is None or busy else Earlier(interrupted=run.run_id)


def _checkpointer(run_id: str, spec: RunSpec) -> Checkpointer:
    return Checkpointer(run_id, spec.checkpoints, {}, spec.reporter.message)


def _is_worked_on(run: RunRecord) -> bool:
    """Say whether another process of this machine works on a run, perhaps one that was stopped for a while."""
    process = run.tags.get(PROCESS, "")
    return run.status == "RUNNING" and process != this_process() and is_alive(process) is True


def _interrupted(wanted: Identity, spec: RunSpec, finished: RunRecord | None) -> RunRecord | None:
    """Return the last run that ended early and may be resumed; say of one that may not what differs."""
    tags = wanted.tags()
    found = find_runs(spec.experiment_id, {CONFIG_HASH: tags[CONFIG_HASH]}, ("FAILED", "KILLED"))
    single = [run for run in found if not run.parent]
    same = [run for run in single if tags.items() <= run.tags.items()]
    if same:
        return same[0] if finished is None or same[0].started >= finished.ended else None
    if single and finished is None:
        differing = [name for name in tags if single[0].tags.get(name) != tags[name]]
        words = ", ".join(f"{name[6:]} was {single[0].tags.get(name)}, is {tags[name]}" for name in differing)
        spec.reporter.message(f"The run {single[0].run_id} that ended early can't be resumed: {words}.")
    return None


@dataclass(frozen=True)
class Attempt:
    """The run that answers, its last metrics, and the accuracy that it is judged by."""

    run: TrackedRun
    metrics: Mapping[str, float]
    accuracy: float
    pruned: bool = False
    was_finished: bool = False  # by an earlier command: nothing was computed
    model_address: str = ""  # of a run of its own


def attempt(config: TrainConfig, dataset: Dataset, spec: RunSpec) -> Attempt:
    """Find the run finished, resume it, or train it from its beginning."""
    earlier = find_earlier(identity(config, dataset), spec)
    if (done := earlier.finished) is not None:
        run = TrackedRun(done.run_id, spec.experiment_id)
        point_adopted_run_to(run)
        Checkpointer(
            run.run_id, spec.checkpoints, {}, spec.reporter.message
        ).remove()  # if the status alone was missing
        pruned = done.tags.get(OUTCOME) == "pruned"
        return Attempt(run, done.metrics, reached_accuracy(done.metrics), pruned, was_finished=True)
    if earlier.interrupted:
        point_adopted_run_to(TrackedRun(earlier.interrupted, spec.experiment_id))
    outcome = train_run(config, dataset, replace(spec, resumes=earlier.interrupted))
    return Attempt(outcome.run, outcome.summary, outcome.watched_accuracy, outcome.pruned)


def train_single(config: TrainConfig, name: str, study: str, options: StudyOptions, reporter: Reporter) -> Attempt:
    """Make a run of its own, from its settings to its end. InputError before any run is created."""
    load = load_once(partial(reporter.progress, "decoding images"))
    (config,) = prepare([config], load, reporter.hint)
    with tracking_faults():
        where, keeps = open_experiment(options.experiment), options.log_model != "none"
        spec = RunSpec(name, where, study, log_model=keeps, checkpoints=options, fresh=options.fresh, reporter=reporter)
        ended = attempt(config, load(config.data), spec)
        return replace(ended, model_address=model_address(ended.run.run_id))
