"""Run a study to its end: open or continue it, have it worked on, publish what came out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import TrialState

from effv2.config.options import StudyOptions
from effv2.core import provenance
from effv2.core.errors import InputError, RunError
from effv2.core.reporter import Reporter
from effv2.evidence.publication import publish_study, read_results
from effv2.evidence.study import Rows
from effv2.studies.plan import LoadData, Plan, Trials, digest, run_ids
from effv2.studies.progress import progress_of
from effv2.studies.queue import ERROR, RUN, Queue
from effv2.studies.session import Session
from effv2.studies.storage import DATABASE_ERRORS, OUTAGE_SECONDS, Storage, open_storage, patient, why
from effv2.studies.supervision import supervise
from effv2.studies.worker import Worker
from effv2.tracking.read import known_runs, read_run
from effv2.tracking.run import open_parent, point_adopted_run_to, run_address, status_after
from effv2.tracking.store import (
    TRACKING_ERRORS,
    TrackingError,
    impatient,
    is_temporary,
    reason,
    shown_uri,
    tracking_uri,
    wait_until_it_answers,
)
from effv2.tracking.tags import CODE_VERSION, COMMAND, PLANNED, QUEUE, STUDY, as_tags, names_in
from effv2.tracking.writer import TrackedRun

FAIL = TrialState.FAIL
# User attributes of Optuna's study.
DEFINITION, PARENT, FRESH, PUBLISHED = "definition", "parent_run", "fresh", "published"


@dataclass(frozen=True)
class Ending:
    """The run of a study, its table (titles first), and why runs failed, by slot."""

    parent: TrackedRun
    table: Rows
    failed: Mapping[str, str]


def run_study(plan: Plan, experiment_id: str, options: StudyOptions, load: LoadData, reporter: Reporter) -> Ending:
    """Run what of the study isn't finished, then publish all of it.

    The same call on several machines, with one PostgreSQL storage and one tracking server, shares the work.
    """
    storage = open_storage(options.storage)
    try:
        session = _open(plan, storage, experiment_id, options, reporter)
        with _given_back(session, storage):
            queue = session.queue(storage)
            if queue.deserted():
                queue.retry_failed()
                if repeated := queue.repeat(_lost(queue.trials(), experiment_id)):
                    reporter.message(
                        f"{repeated} finished runs were deleted from the tracking store: they are repeated."
                    )
            reporter.study_opened(run_address(session.parent_id, session.experiment_id))
            reporter.study_progress(progress_of(plan, queue.trials()))
            if not queue.unfinished():
                reporter.message(f"All {len(plan.slots)} runs were finished before; --fresh repeats them.")
            elif options.workers == 1:
                Worker(
                    session, queue, load, reporter, lambda: reporter.study_progress(progress_of(plan, queue.trials()))
                ).work()
            else:
                supervise(session, queue, options.workers, reporter)
            return _publish_after_all(session, queue, load, reporter)
    except TrackingError as error:
        raise RunError(
            f"The tracking store failed ({reason(error)}); mend it and give the same command again."
        ) from error
    finally:
        storage.close()


def _open(plan: Plan, storage: Storage, experiment_id: str, options: StudyOptions, reporter: Reporter) -> Session:
    """Open the newest study of this definition that the tracking store has a run of, or create both."""
    purpose = plan.purpose
    definition = plan.definition() | {"experiment": experiment_id}
    kind = f"{purpose.kind} {purpose.name} "
    name = f"{kind}{digest(definition)}"
    try:
        with storage.lock("studies"):
            studies = sorted(storage.optuna.get_all_studies(), key=lambda study: -study._study_id)
            begun = [study for study in studies if study.study_name.startswith(kind) and PARENT in study.user_attrs]
            same = [study for study in begun if study.study_name.partition("#")[0] == name]
            opened = None if options.fresh else _first_with_run(same)
            if opened is None:
                if same and not options.fresh:
                    reporter.message(
                        f"The tracking store {shown_uri()} has no run of this study: it begins anew there."
                    )
                if begun and not same:
                    reporter.message(
                        f"Not the study {purpose.name} that was begun before: "
                        f"{difference(begun[0].user_attrs[DEFINITION], definition)}. What is the same is not repeated."
                    )
                # Those whose creation was cut short are counted too.
                taken = [study.study_name for study in studies if study.study_name.partition("#")[0] == name]
                number = 1 + max((int(each.partition("#")[2]) for each in taken), default=0)
                opened = _create(plan, storage, f"{name}#{number}", definition, options.fresh)
    except DATABASE_ERRORS as error:
        raise InputError(f"--storage {storage.shown}: can't be used ({why(error)}); mend or restart it.") from error
    study, parent, fresh = opened
    point_adopted_run_to(parent)
    planned = dict.fromkeys([*names_in(parent.tags(), PLANNED), *plan.slots])
    parent.set_tags({COMMAND: provenance.command()} | as_tags(PLANNED, planned))
    return Session(
        plan=plan,
        storage_url=storage.url,
        study=study,
        parent_id=parent.run_id,
        experiment_id=parent.experiment_id,
        tracking_uri=tracking_uri(),
        fresh=fresh,
        log_model=options.log_model,
        checkpoints=options.checkpoints,
    )


def _lost(trials: Trials, experiment_id: str) -> set[str]:
    """Return the runs of finished trials that somebody has deleted since."""
    finished = {
        trial.user_attrs[RUN] for trial in trials.values() if trial.state.is_finished() and RUN in trial.user_attrs
    }
    # Asked for once more, one by one: a deletion meanwhile may hide a run between two pages of the list.
    return (
        {run_id for run_id in finished - known_runs(experiment_id) if read_run(run_id) is None} if finished else set()
    )


Opened = tuple[str, TrackedRun, bool]  # a study's name in the storage, its run, whether it repeats what was finished


def _first_with_run(studies: Sequence[FrozenStudy]) -> Opened | None:
    """Return the first study whose run the tracking store has, and which wasn't deleted there."""
    for study in studies:
        parent = read_run(study.user_attrs[PARENT])
        if parent is not None:
            return study.study_name, parent, bool(study.user_attrs[FRESH])
    return None


def _create(plan: Plan, storage: Storage, name: str, definition: Mapping[str, Any], fresh: bool) -> Opened:
    purpose = plan.purpose
    tags = {STUDY: purpose.name, CODE_VERSION: provenance.code_version(), QUEUE: name}
    parent: TrackedRun | None = None
    try:
        parent = open_parent(purpose.name, definition["experiment"], tags)
        about = {"kind": purpose.kind, "name": purpose.name, "description": purpose.description}
        parent.log_params({f"study.{name}": text for name, text in (about | {"baseline": purpose.baseline}).items()})
        parent.log_git(provenance.git_state())
        study_id = storage.optuna.create_new_study([StudyDirection.MAXIMIZE], name)
        for attribute, value in {DEFINITION: definition, FRESH: fresh, PARENT: parent.run_id}.items():
            storage.optuna.set_study_user_attr(study_id, attribute, value)
    except BaseException as error:
        with suppress(*TRACKING_ERRORS), impatient():
            if parent is not None:
                parent.set_status(status_after(error))
        raise
    return name, parent, fresh


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say in a few words how two definitions differ."""
    old, new = _leaves(before), _leaves(now)
    changed = [name for name in [*old, *(set(new) - set(old))] if old.get(name) != new.get(name)]
    words = [f"{name} was {old.get(name, 'absent')}, is {new.get(name, 'absent')}" for name in sorted(changed)]
    more = f" and {len(words) - 4} more" if len(words) > 4 else ""
    return "; ".join(words[:4]) + more


def _leaves(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{above}{key}"
        found |= _leaves(value, f"{name}: ") if isinstance(value, Mapping) else {name: value}
    return found


@contextmanager
def _given_back(session: Session, storage: Storage) -> Iterator[None]:
    """Where this process is told to end, or can't go on, give back its work and end the study's run with it."""
    try:
        yield
    except BaseException as error:
        session.leave(storage, status_after(error))
        raise


def _publish_after_all(session: Session, queue: Queue, load: LoadData, reporter: Reporter) -> Ending:
    """Publish the study; once more where the tracking store fails for a while."""
    try:
        return _publish(session, queue, load, reporter)
    except TrackingError as error:
        if not is_temporary(error) or not wait_until_it_answers(OUTAGE_SECONDS):
            raise
        return _publish(session, queue, load, reporter)


@patient
def _publish(session: Session, queue: Queue, load: LoadData, reporter: Reporter) -> Ending:
    """Publish the study unless another process just did, and end its run unless others go on with it."""
    storage, plan = queue.storage, session.plan
    with storage.lock(f"publish {session.study}"):
        trials = queue.trials()
        lost = _lost(trials, session.experiment_id)  # of slots that aren't wanted now
        trials = {slot: trial for slot, trial in trials.items() if trial.user_attrs.get(RUN) not in lost}
        finished = sorted(trial.number for trial in trials.values() if trial.state.is_finished())
        stands = {"trials": finished, "log_model": session.log_model}
        if storage.optuna.get_study_user_attrs(queue.study_id).get(PUBLISHED) != stands:
            plan.publish(trials, session.parent, session.log_model, load)
            results = publish_study(session.parent, run_ids(trials))
            storage.optuna.set_study_user_attr(queue.study_id, PUBLISHED, stands)
            if session.log_model == "all":
                without = [each for each in run_ids(trials).values() if not TrackedRun(each, "").model_address()]
                if without:
                    reporter.message(
                        f"{len(without)} runs were finished before without a model; --fresh repeats them with it."
                    )
        else:
            results = read_results(session.parent)
        failed = {slot: str(trial.user_attrs.get(ERROR)) for slot, trial in trials.items() if trial.state == FAIL}
        session.end(queue, "FAILED" if failed else "FINISHED")
    return Ending(session.parent, results.table, {slot: failed[slot] for slot in failed if slot in plan.slots})
