"""Run a study to its end: open or continue it, start its workers, watch them, publish what came out."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import SpawnProcess
from typing import Any, Protocol

import torch
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState

from effv2 import provenance
from effv2.errors import InputError, RunError, Terminated
from effv2.evidence.comparison import Rows
from effv2.experiment import Display
from effv2.studies.options import StudyOptions
from effv2.studies.plan import LoadData, Plan, best_of, digest
from effv2.studies.queue import ERROR, Queue
from effv2.studies.session import Session
from effv2.studies.storage import TRANSIENT, Storage, open_storage, patient
from effv2.studies.worker import SilentDisplay, work, worker_process
from effv2.tracking.run import TrackedRun, find_run, open_parent, point_adopted_run_to, run_address
from effv2.tracking.store import shown_uri, tracking_uri

FAIL = TrialState.FAIL
# User attributes of Optuna's study.
DEFINITION, PARENT, FRESH, PUBLISHED = "definition", "parent_run", "fresh", "published"
WATCH_SECONDS = 0.5
ENDING_SECONDS = 60  # so long workers may take to end once they were told


@dataclass(frozen=True)
class Standing:
    """How far a study is; `progress` counts a running trial by the share of its epochs."""

    total: int
    complete: int
    pruned: int
    failed: int
    running: int
    progress: float
    best: tuple[str, float] | None
    ended: Mapping[str, str]  # slot to words, in the order of ending


class View(Display, Protocol):
    """What a study tells whoever watches."""

    def study_opened(self, address: str) -> None:
        """Report where the study's run is to be seen."""

    def remark(self, text: str) -> None:
        """Say something once."""

    def standing(self, standing: Standing) -> None:
        """Report how far the study is."""


class SilentView(SilentDisplay):
    """Shows nothing."""

    def study_opened(self, address: str) -> None:
        """Show nothing."""

    def remark(self, text: str) -> None:
        """Show nothing."""

    def standing(self, standing: Standing) -> None:
        """Show nothing."""


@dataclass(frozen=True)
class Ending:
    """The run of a study, its table (titles first), and why runs failed, by slot."""

    parent: TrackedRun
    table: Rows
    failed: Mapping[str, str]


def run_study(plan: Plan, experiment_id: str, options: StudyOptions, load: LoadData, view: View) -> Ending:
    """Run what of the study isn't finished, then publish all of it.

    The same call on several machines, with one PostgreSQL storage and one tracking server, shares the work.
    """
    storage = open_storage(options.storage)
    try:
        session = _open(plan, storage, experiment_id, options, view)
        queue = session.queue(storage)
        queue.retry_failed()
        view.study_opened(run_address(session.parent_id, session.experiment_id))
        view.standing(standing_of(plan, queue.trials()))
        if queue.unfinished():
            session.parent.set_status("RUNNING")
            with _given_back(session, queue):
                if options.workers == 1:
                    work(session, queue, load, view, lambda: view.standing(standing_of(plan, queue.trials())))
                else:
                    _supervise(session, queue, options.workers, view)
        else:
            view.remark(f"All {len(plan.slots)} runs were finished before; --fresh repeats them.")
        return _publish(session, queue, load)
    finally:
        storage.close()


def standing_of(plan: Plan, trials: Mapping[str, FrozenTrial]) -> Standing:
    """Sum up the wanted trials."""
    wanted = {slot: trial for slot, trial in trials.items() if slot in plan.slots}
    count = {state: sum(trial.state == state for trial in wanted.values()) for state in TrialState}
    running = [trial for trial in wanted.values() if trial.state == TrialState.RUNNING]
    finished = {slot: trial for slot, trial in wanted.items() if trial.state.is_finished()}
    shares = sum(max(trial.intermediate_values, default=0) / plan.epochs for trial in running)
    best = best_of(wanted)
    order = sorted(finished, key=lambda slot: str(finished[slot].datetime_complete))
    return Standing(
        total=len(plan.slots),
        complete=count[TrialState.COMPLETE],
        pruned=count[TrialState.PRUNED],
        failed=count[FAIL],
        running=len(running),
        progress=len(finished) + min(shares, len(running)),
        best=(next(slot for slot in wanted if wanted[slot] is best), best.value or 0.0) if best else None,
        ended={slot: _words(finished[slot]) for slot in order},
    )


def _words(trial: FrozenTrial) -> str:
    if trial.state == FAIL:
        return f"failed: {trial.user_attrs.get(ERROR, 'no reason known')}"
    word = "pruned at" if trial.state == TrialState.PRUNED else "reached"
    return f"{word} {trial.value or 0.0:.2%}"


def _open(plan: Plan, storage: Storage, experiment_id: str, options: StudyOptions, view: View) -> Session:
    """Open the newest study of this definition and the run that it had first, or create both."""
    try:
        with storage.lock("studies"):
            study = _find_or_create(plan, storage, experiment_id, options.fresh, view)
            attributes = study.user_attrs
            parent = find_run(attributes[PARENT])
    except TRANSIENT as error:
        raise RunError(f"The storage went away as the study was opened ({error}); give the command again.") from error
    if parent is None:
        raise InputError(
            f"--storage {storage.shown}: holds this study with the run {attributes[PARENT]}, which the tracking store "
            f"{shown_uri()} doesn't have; correct MLFLOW_TRACKING_URI, or start over with --fresh."
        )
    point_adopted_run_to(parent)
    return Session(
        plan=plan,
        storage_url=storage.url,
        study=study.study_name,
        parent_id=parent.run_id,
        experiment_id=parent.experiment_id,
        tracking_uri=tracking_uri(),
        fresh=bool(attributes[FRESH]),
        log_model=options.log_model,
    )


def _find_or_create(plan: Plan, storage: Storage, experiment_id: str, fresh: bool, view: View) -> FrozenStudy:
    purpose = plan.purpose
    definition = plan.definition() | {"experiment": experiment_id}
    kind = f"{purpose.kind} {purpose.name} "
    name = f"{kind}{digest(definition)}"
    studies = storage.optuna.get_all_studies()
    begun = [study for study in studies if study.study_name.startswith(kind) and PARENT in study.user_attrs]
    same = [study for study in begun if study.study_name.partition("#")[0] == name]
    if same and not fresh:
        return max(same, key=lambda study: study._study_id)
    if begun and not same:
        last = max(begun, key=lambda study: study._study_id)
        changes = difference(last.user_attrs[DEFINITION], definition)
        view.remark(f"Not the study {purpose.name} that was begun before: {changes}. What is the same is not repeated.")
    name = f"{name}#{len(studies) + 1}"
    study_id = storage.optuna.create_new_study([StudyDirection.MAXIMIZE], name)
    tags = {"effv2.study": purpose.name, "effv2.code_version": provenance.code_version(), "effv2.queue": name}
    parent = open_parent(purpose.name, experiment_id, tags)
    parent.log_params({"study.kind": purpose.kind, "study.name": purpose.name})
    parent.log_git(provenance.git_state())
    for attribute, value in {DEFINITION: definition, FRESH: fresh, PARENT: parent.run_id}.items():
        storage.optuna.set_study_user_attr(study_id, attribute, value)
    return next(study for study in storage.optuna.get_all_studies() if study._study_id == study_id)


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
def _given_back(session: Session, queue: Queue) -> Iterator[None]:
    """Where this process is told to end, or can't go on, end the study's run too unless others work on it."""
    try:
        yield
    except (KeyboardInterrupt, Terminated):
        session.leave(queue, "KILLED")
        raise
    except RunError:
        session.leave(queue, "FAILED")
        raise


def _supervise(session: Session, queue: Queue, workers: int, view: View) -> None:
    """Start worker processes and watch until all wanted trials are finished; replace those that were killed."""
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // workers)

    def start(index: int) -> SpawnProcess:
        with _own_accelerator(index):
            process = context.Process(target=worker_process, args=(session, threads))
            process.start()
        return process

    processes = [start(index) for index in range(workers)]
    try:
        while queue.unfinished():
            view.standing(standing_of(session.plan, queue.trials()))
            for index, process in enumerate(processes):
                if (process.exitcode or 0) < 0:
                    view.remark(
                        f"A worker was killed (signal {-(process.exitcode or 0)}); another one takes its place."
                    )
                    processes[index] = start(index)
            if all(process.exitcode is not None for process in processes) and queue.unfinished():
                raise RunError("All workers ended before the study; see above why, and give the command again.")
            time.sleep(WATCH_SECONDS)
    finally:
        _stop(processes)
    view.standing(standing_of(session.plan, queue.trials()))


def _stop(processes: list[SpawnProcess]) -> None:
    """Wait for workers to end by themselves where the study is over, tell them to where it isn't."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + ENDING_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.exitcode is None:
            process.kill()
            process.join()


@contextmanager
def _own_accelerator(index: int) -> Iterator[None]:
    """Let a process that is started inside see one of the visible GPUs, where there are several."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
    if len(devices) < 2:
        yield
        return
    os.environ["CUDA_VISIBLE_DEVICES"] = devices[index % len(devices)]
    try:
        yield
    finally:
        if visible is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible


@patient
def _publish(session: Session, queue: Queue, load: LoadData) -> Ending:
    """Publish the study unless another process just did, and end its run unless others go on with it."""
    storage, plan = queue.storage, session.plan
    with storage.lock(session.study):
        trials = queue.trials()
        finished = sorted(trial.number for trial in trials.values() if trial.state.is_finished())
        attributes = storage.optuna.get_study_user_attrs(queue.study_id)
        if attributes.get(PUBLISHED) != finished:
            plan.publish(trials, session.parent, session.log_model, load)
            storage.optuna.set_study_user_attr(queue.study_id, PUBLISHED, finished)
        wanted = {slot: trial for slot, trial in trials.items() if slot in plan.slots}
        failed = {slot: str(trial.user_attrs.get(ERROR)) for slot, trial in wanted.items() if trial.state == FAIL}
        session.leave(queue, "FAILED" if failed else "FINISHED")
    return Ending(session.parent, plan.table(trials), failed)
