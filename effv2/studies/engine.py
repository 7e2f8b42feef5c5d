"""Run a study to its end: open or resume it, work on it with one or several processes, publish the results."""

import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from multiprocessing.context import SpawnProcess
from types import ModuleType
from typing import Any

import torch
from optuna.study import StudyDirection
from optuna.trial import TrialState

from effv2.config.options import StudyOptions
from effv2.core import provenance
from effv2.core.errors import RunError, listed
from effv2.core.processes import handlers, uninterrupted
from effv2.core.reporter import Message, Reporter
from effv2.data.dataset import LoadData
from effv2.evidence.publication import publish_study, read_results
from effv2.evidence.study import StudyResults
from effv2.studies.earlier import DEFINITION, PARENT, differing, earlier, named
from effv2.studies.plan import Plan, TrainingPlan, best_of, progress_of, run_ids
from effv2.studies.queue import ERROR, FINAL, NAME, RUN, Queue, Trials
from effv2.studies.storage import DATABASE_ERRORS, OUTAGE_SECONDS, Storage, cannot_use, open_storage
from effv2.studies.worker import AWAY, OpenedStudy, Worker, worker_process
from effv2.tracking import store
from effv2.tracking.addresses import shown_uri
from effv2.tracking.models import model_address
from effv2.tracking.read import find_runs, known_runs, read_run, read_runs
from effv2.tracking.run import begin_run
from effv2.tracking.tags import CODE_VERSION, COMMAND, PLANNED, QUEUE, SHOWN, STUDY, as_tags, names_in
from effv2.tracking.writer import TrackedRun, run_address, status_after

# User attributes of Optuna's study.
FRESH, PUBLISHED = "fresh", "published"
WATCH_SECONDS = 0.5
MOST_IN_VAIN = 3  # per worker: ends of workers without a newly finished run
ENDING_SECONDS = 60  # seconds that workers may take to end after SIGTERM
MOST_DIFFERENCES, MOST_FAILURES = 4, 5  # that a message names


@dataclass(frozen=True)
class StudyEnd:
    """The run of a study, its results, and the errors of failed runs by trial."""

    parent: TrackedRun
    results: StudyResults
    failed: Mapping[str, str]
    model: str  # name and address of the best run's model, if that is of interest
    trouble: str  # a sentence about the failed runs


def run_study(plan: Plan, experiment_id: str, options: StudyOptions, load: LoadData, reporter: Reporter) -> StudyEnd:
    """Run a study's unfinished trials, then publish it. Machines with one storage and one server share the work."""
    with store.tracking_faults(), closing(open_storage(options.storage)) as storage:
        study, setbacks = _open(plan, storage, experiment_id, options, reporter), Counter[str]()
        try:
            study = _begun(study, storage)
            queue = study.queue(storage)
            _work(study, queue, load, reporter)
            reporter.progress("comparing the runs")
            while True:
                try:
                    return storage.retry(lambda: _publish(study, queue, load, reporter))
                except store.TrackingError as error:
                    if not store.outage_passed(error, setbacks, "publish", OUTAGE_SECONDS, reporter.message):
                        raise
        except BaseException as error:  # also after an ending signal: this process gives back its trials
            study.leave(storage, status_after(error))
            raise


def _work(study: OpenedStudy, queue: Queue, load: LoadData, reporter: Reporter) -> None:
    if not queue.deserted():
        reporter.message("Another process works on this study. This one shares the work.")
    elif repeated := queue.repeat(deleted_runs(queue.trials(), study.parent.experiment_id)):
        reporter.message(f"{repeated} finished runs were deleted from the tracking store and are repeated.")
    reporter.message(f"study: {run_address(study.parent.run_id, study.parent.experiment_id)}")
    said = sum(each.complete for each in study.plan.rounds(queue.trials()))

    def show() -> None:
        nonlocal said
        trials = queue.trials()
        reporter.study_progress(progress_of(study.plan, trials))
        complete = [each for each in study.plan.rounds(trials) if each.complete]
        for number, each in enumerate(complete[said:], said + 1):
            for line in each.lines():
                reporter.message(f"round {number}: {line}")
        said = max(said, len(complete))

    show()
    if not queue.unfinished():
        total = len(study.plan.wanted(queue.trials()))
        reporter.message(f"All {total} runs were already finished; `fresh` repeats them.")
    elif study.options.workers == 1:
        Worker(study, queue, load, reporter, show).work()
    else:
        _supervise(study, queue, reporter.message, show)


def _open(plan: Plan, storage: Storage, experiment_id: str, options: StudyOptions, reporter: Reporter) -> OpenedStudy:
    """Open the newest study of this definition that has a run in the tracking store, or create both."""
    definition, name = {**plan.definition, "experiment": experiment_id}, named(plan, experiment_id)
    try:
        with storage.lock("studies"):
            studies, begun, same = earlier(plan, storage, experiment_id)
            there = (study for study in same if not options.fresh and read_run(study.user_attrs[PARENT]) is not None)
            if (found := next(there, None)) is not None:
                queue, attributes = found.study_name, dict(found.user_attrs)
                plan = plan.as_in(attributes[DEFINITION])
                if queue.rpartition("#")[0] != name:
                    reporter.message("This study began with another precision than `auto` means here, and keeps it.")
            else:
                if same and not options.fresh:
                    text = f"The tracking store {shown_uri()} has no run of this study, so a new one is started there."
                    reporter.message(text)
                elsewhere = [] if same or options.fresh else find_runs(experiment_id, {QUEUE: f"{name}#1"})
                if elsewhere:
                    text = f"Another storage has this study already, as run {elsewhere[0].run_id}."
                    reporter.message(f"{text} To share its work, stop and give that storage as `storage`.")
                elif begun and not same:
                    words = min((differing(each.user_attrs[DEFINITION], definition) for each in begun), key=len)
                    text = f"A new study begins. It differs from an earlier {plan.name}: "
                    text += f"{listed(words, MOST_DIFFERENCES)}. To resume that one, give its values."
                    reporter.message(f"{text} Equal runs are not repeated.")
                # Studies whose creation was interrupted count as well.
                numbers = [study.study_name.rpartition("#") for study in studies]
                queue = f"{name}#{1 + max((int(last) for before, _, last in numbers if before == name), default=0)}"
                if isinstance(plan, TrainingPlan):
                    plan.check_new(experiment_id, options.fresh)
                number = 1 + sum(each.user_attrs[DEFINITION]["experiment"] == experiment_id for each in begun)
                title = f"{plan.name} {number}" if number > 1 else plan.name
                attributes = _create(plan, storage, queue, definition, fresh=options.fresh, title=title)
                for line in plan.about:
                    reporter.message(line)
    except DATABASE_ERRORS as error:
        raise cannot_use(storage.shown, error) from error
    return OpenedStudy(plan, options, queue, TrackedRun(attributes[PARENT], experiment_id), attributes[FRESH])


def _begun(study: OpenedStudy, storage: Storage) -> OpenedStudy:
    """Return the study with the rules that it began with, after noting on its run what this command adds."""
    (record,) = read_runs([study.parent.run_id])
    study = replace(study, plan=study.plan.resumed(record.params, study.queue(storage).began))
    study.parent.take_over_adopted()
    study.parent.set_tags({COMMAND: provenance.COMMAND.get()} | as_tags(SHOWN, study.plan.show))
    _note_planned(study, study.queue(storage).trials())
    return study


def _note_planned(study: OpenedStudy, trials: Trials) -> None:
    """Add the trials that are wanted now to the planned trials of the study's run."""
    (record,) = read_runs([study.parent.run_id])
    planned = dict.fromkeys([*names_in(record.tags, PLANNED), *study.plan.wanted(trials)])
    study.parent.set_tags(as_tags(PLANNED, planned))


def _create(
    plan: Plan, storage: Storage, name: str, definition: Mapping[str, Any], *, fresh: bool, title: str
) -> dict[str, Any]:
    """Create the run of a study, called `title`, then the study in the storage. Return the attributes of the latter."""
    tags = {STUDY: plan.name, CODE_VERSION: definition["code"], QUEUE: name}
    parent = None
    try:
        with uninterrupted():
            parent = begin_run(title, definition["experiment"], tags)
        shown = ("kind", "name", "description", "baseline")
        parent.log_params({f"study.{field}": getattr(plan, field) for field in shown} | dict(plan.stamps))
        parent.log_git()
        created = storage.optuna.create_new_study([StudyDirection.MAXIMIZE], name)
        attributes = {DEFINITION: definition, FRESH: fresh, PARENT: parent.run_id}
        for attribute, value in attributes.items():
            storage.optuna.set_study_user_attr(created, attribute, value)
        return attributes
    except BaseException as error:
        with suppress(*store.TRACKING_ERRORS):
            if parent is not None and store.answers():
                parent.set_status(status_after(error))
        raise


def deleted_runs(trials: Trials, experiment_id: str) -> set[str]:
    """Return the deleted runs of finished trials."""
    runs = {trial.user_attrs[RUN] for trial in trials.values() if trial.state.is_finished() and RUN in trial.user_attrs}
    # Read again, one by one: a simultaneous deletion may hide a run between two pages of the list.
    return {run_id for run_id in runs - known_runs(experiment_id) if read_run(run_id) is None} if runs else set()


def _publish(study: OpenedStudy, queue: Queue, load: LoadData, reporter: Reporter) -> StudyEnd:
    """Publish the study unless another process just did, and end its run unless other processes work on it."""
    storage, plan, log_model = queue.storage, study.plan, study.options.log_model
    with storage.lock(f"publish {study.name}", long=True):
        trials = queue.trials()
        wanted = plan.wanted(trials)
        deleted = deleted_runs(trials, study.parent.experiment_id)  # of trials that are no longer wanted
        trials = {name: trial for name, trial in trials.items() if trial.user_attrs.get(RUN) not in deleted}
        finished = sorted(trial.number for trial in trials.values() if trial.state.is_finished())
        stands = {"trials": finished, "log_model": log_model}
        if storage.optuna.get_study_user_attrs(queue.study_id).get(PUBLISHED) == stands:
            results = read_results(study.parent)
        else:
            _note_planned(study, trials)
            plan.conclude(trials, study.parent, log_model, load)
            used = run_ids(trials)
            results = publish_study(study.parent, used, plan.dataset(load))
            storage.optuna.set_study_user_attr(queue.study_id, PUBLISHED, stands)
            if log_model == "all" and (without := [run for run in used.values() if not model_address(run)]):
                text = f"{len(without)} runs were already finished, without a model; `fresh` repeats them with a model."
                reporter.message(text)
        best = best_of(trials.values())
        address = model_address(best.user_attrs[RUN]) if best and (log_model == "best" or plan.searches) else ""
        model = f"model of {best.user_attrs[NAME]}: {address}" if best and address else ""
        in_vain = plan.searches and best is None  # then diverged runs count as failed
        failed = {
            name: str(each.user_attrs.get(ERROR))
            for name, each in trials.items()
            if each.state == TrialState.FAIL or (in_vain and each.user_attrs.get(FINAL))
        }
        study.end(queue, "FAILED" if failed or in_vain else "FINISHED")
    failed = {name: failed[name] for name in failed if name in wanted}
    trouble = "No trial of the search was completed: " if in_vain else ""
    if failed or in_vain:
        errors = listed([f"{name}: {error}" for name, error in failed.items()], MOST_FAILURES)
        trouble += f"{len(failed)} of {len(wanted)} runs failed. {errors}"
    return StudyEnd(study.parent, results, failed, model, trouble)


def _supervise(study: OpenedStudy, queue: Queue, message: Message, show: Callable[[], None]) -> None:
    """Start worker processes, and replace those that end early, until all wanted trials are finished."""
    # No fork server: workers must be children of this process, which can then always wait for them.
    context, workers = multiprocessing.get_context("spawn"), study.options.workers
    threads = max(1, torch.get_num_threads() // workers)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))

    def start(index: int) -> SpawnProcess:
        gpu = gpus[index % len(gpus)] if len(gpus) > 1 else ""
        process = context.Process(target=worker_process, args=(study, threads, gpu), daemon=True)
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")  # workers must not run the calling script again
        try:
            # Workers inherit this. Ctrl-C reaches all processes, and this one ends them in order.
            with handlers({signal.SIGINT: signal.SIG_IGN}):
                process.start()
        finally:
            sys.modules["__main__"] = main
        return process

    processes: list[SpawnProcess] = []
    ended = Counter[int]()  # ends of workers, by the number of finished trials
    try:
        processes += map(start, range(workers))
        while queue.unfinished():
            show()
            for index, process in enumerate(processes):
                if process.exitcode == AWAY:
                    raise RunError("The storage or the tracking store does not answer; start it.", resumes=True)
                if process.exitcode is not None:
                    finished = sum(trial.state.is_finished() for trial in queue.trials().values())
                    ended[finished] += 1
                    if ended[finished] > MOST_IN_VAIN * workers:
                        raise RunError("Workers end before they finish a run; see the messages above.", resumes=True)
                    message("A worker ended early; another one replaces it.")
                    processes[index] = start(index)
            time.sleep(WATCH_SECONDS)
        show()
    finally:
        _stop(processes)


def _stop(processes: list[SpawnProcess]) -> None:
    """End the workers, which give back their trials. Kill workers that take too long."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + ENDING_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()  # if it still runs
        process.join()
