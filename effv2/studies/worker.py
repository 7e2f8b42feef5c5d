"""Work on a study's queue until nothing is left: lease a trial, work on its run, say how it ended."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import connection, parent_process
from typing import Any

import torch
from optuna.trial import TrialState

from effv2.config.options import StudyOptions
from effv2.core.errors import Diverged, LeaseLost, RunError, StoreAway, Terminated
from effv2.core.reporter import Message, Reporter
from effv2.core.signals import ending_signals
from effv2.data.dataset import LoadData, load_once
from effv2.execution.allocator import tune_allocator
from effv2.run.spec import Callback, RunSpec
from effv2.studies.plan import Plan, best_of
from effv2.studies.queue import RUN, Lease, Queue
from effv2.studies.storage import LEAVING_SECONDS, OUTAGE_SECONDS, Storage, reopen_storage
from effv2.tracking.read import find_runs, is_running, steps_of
from effv2.tracking.run import end_left_open
from effv2.tracking.store import (
    WAIT_SECONDS,
    answers,
    is_temporary,
    reason,
    shown_uri,
    use_store,
    wait_until_it_answers,
)
from effv2.tracking.tags import PARENT
from effv2.tracking.writer import TrackedRun
from effv2.training.loop import EpochResult
from effv2.training.state import watched_accuracy

POLL_SECONDS = 1.0  # between two looks at a queue whose last trials others work on
AWAY = 3  # exit code of a worker that waited in vain for a database or the tracking store
MOST_SETBACKS = 5  # so often a piece of work is begun again because the tracking store failed, and answered again
ORPHAN_SECONDS = 60  # so long a worker may take to end after the process that started it


@dataclass(frozen=True)
class OpenedStudy:
    """An opened study, as its workers and its coordinator share it: plain data alone.

    `name` is that of the queue, `parent` the study's run, `fresh` whether the study was begun to repeat what was
    finished before it.
    """

    plan: Plan
    options: StudyOptions
    name: str
    parent: TrackedRun
    fresh: bool

    def queue(self, storage: Storage) -> Queue:
        """Return the queue of the study in its opened storage."""
        return Queue(storage, self.name, self.plan.retries, self.plan.trials)

    def end(self, queue: Queue, status: str) -> None:
        """End the study's run, and children that a dead process left open, unless somebody still works on it.

        Who leases a trial afterwards sets the study's run to RUNNING again.
        """
        with queue.storage.lock(self.name):  # nobody leases a trial meanwhile
            if queue.deserted():
                for child in find_runs(self.parent.experiment_id, {PARENT: self.parent.run_id}, ("RUNNING",)):
                    end_left_open(child.run_id)
                self.parent.set_status(status)

    def leave(self, storage: Storage, status: str = "") -> None:
        """Give back what this process works on, and end the study's run if it is open and a status is given.

        Within seconds: the process ends. Where the storage is away, the trials are taken up for want of a heartbeat.
        Nothing hides the reason to leave.
        """
        storage.patience = LEAVING_SECONDS
        with suppress(Exception, LeaseLost):
            queue = None
            with suppress(StoreAway):
                queue = self.queue(storage)
                queue.release()
            if status and answers() and is_running(self.parent.run_id):
                try:
                    storage.retry(lambda: self.end(queue or self.queue(storage), status))
                except StoreAway:
                    self.parent.set_status(status)


@dataclass
class Outages:
    """Waits where the tracking store fails; not too often for the same piece of work."""

    message: Message
    setbacks: Counter[str] = field(default_factory=Counter)

    def passed(self, error: Exception, work: str) -> bool:
        """Say, after waiting for it to answer, whether the tracking store failed as it may for a while.

        StoreAway where it is away for too long.
        """
        if is_temporary(error) and self.setbacks[work] < MOST_SETBACKS:
            self.setbacks[work] += 1
            self.message(f"The tracking store failed ({reason(error)}); the work is resumed when it answers.")
            time.sleep(WAIT_SECONDS * self.setbacks[work])
        elif answers():
            return False
        if not wait_until_it_answers(OUTAGE_SECONDS):
            problem = f"The tracking store {shown_uri()} has been away for {OUTAGE_SECONDS} seconds; start it."
            raise StoreAway(problem) from error
        return True


@dataclass
class TrialCallback(Callback):
    """Reports a run's epochs to its trial, and lets the pruner decide."""

    worker: Worker
    lease: Lease
    best: float = 0.0
    run_id: str = ""

    def run_opened(self, run_id: str) -> None:
        """Note the run on the trial, so that whoever takes the trial up knows of it."""
        self.run_id = run_id
        self.worker.queue.note_run(self.lease, run_id)

    def run_resumed(self, accuracy: float) -> None:
        """Take over the best accuracy of the epochs that aren't trained again."""
        self.best = max(self.best, accuracy)

    def epoch_ended(self, result: EpochResult) -> bool:
        """Report the best accuracy so far, which is what a trial is worth; ask the pruner."""
        plan = self.worker.study.plan
        self.best = max(self.best, watched_accuracy(result.metrics))
        pruner = plan.pruner() if result.epoch < plan.epochs else None
        pruned = self.worker.queue.report(self.lease, result.epoch, self.best, pruner)
        self.worker.changed()
        return pruned

    def keeps_weights(self, accuracy: float) -> bool:
        """Keep what may turn out to be the best model of the study."""
        study = self.worker.study
        if study.options.log_model != "best" and not study.plan.searches:
            return False
        best = best_of(self.worker.queue.trials())
        return best is None or accuracy >= (best.value or 0.0)


@dataclass
class Worker:
    """Takes trial after trial until all wanted ones are finished, here or elsewhere.

    `changed` is called when a trial begins, after each of its epochs, and when it ends.
    """

    study: OpenedStudy
    queue: Queue
    load: LoadData
    reporter: Reporter
    changed: Callable[[], None]

    def work(self) -> None:
        """Work until nothing is left. The queue learns of a run that fails, and the rest is worked on."""
        outages = Outages(self.reporter.message)
        while True:
            lease = self.queue.lease()
            self.changed()
            if lease is not None:
                with self.queue.heartbeat(lease):
                    self._try(lease, outages)
                self.changed()
            elif self.queue.unfinished():
                time.sleep(POLL_SECONDS * random.uniform(0.5, 1.5))  # noqa: S311
            else:
                return

    def _try(self, lease: Lease, outages: Outages) -> None:
        try:
            self._attempt(lease)
        except StoreAway:
            raise
        except LeaseLost:
            pass
        except RunError as error:
            self.queue.fail(lease, error.problem, final=isinstance(error, Diverged))
        except Exception as error:  # a fault of ours or of a library costs one run, not the study
            if outages.passed(error, lease.name):
                self.queue.release()  # the trial is not to blame
            else:
                traceback.print_exc()
                self.queue.fail(lease, f"{type(error).__name__}: {error}", final=False)

    def _attempt(self, lease: Lease) -> None:
        """Let the plan find, resume or start the run of a trial; say how it ended."""
        study, queue, plan = self.study, self.queue, self.study.plan
        study.parent.set_status("RUNNING")  # where somebody who left had ended it
        params = queue.suggest(lease, plan.sampler(lease.number), plan.suggest)
        callback = TrialCallback(self, lease)
        spec = RunSpec(
            lease.name,
            study.parent.experiment_id,
            plan.name,
            str(params.get("arm", "")),
            study.parent.run_id,
            log_model=study.options.log_model == "all",
            checkpoints=study.options,
            fresh=study.fresh,
            previous=lease.previous_run,
            reporter=self.reporter,
            callback=callback,
            patience=OUTAGE_SECONDS,
        )
        try:
            ended = plan.execute(spec, params, self.load)
        except Diverged:
            if not plan.searches:
                raise
            # In a search an answer like any other: this is no place to look for the best.
            queue.finish(lease, TrialState.PRUNED, callback.best, callback.run_id)
            return
        run = ended.run
        if ended.was_finished and "train/loss" in ended.metrics:
            queue.report(lease, max(steps_of(run.run_id, "train/loss")), ended.accuracy)
        try:
            queue.finish(lease, TrialState.PRUNED if ended.pruned else TrialState.COMPLETE, ended.accuracy, run.run_id)
        except LeaseLost:
            if not ended.was_finished and queue.trials()[lease.name].user_attrs.get(RUN) != run.run_id:
                run.set_status("KILLED")  # the run of the worker that has the trial now counts
            raise


class WorkerReporter(Reporter):
    """Says what must be known, and nothing else: what a worker process does is seen through the storage."""

    def message(self, text: str) -> None:
        """Say it past the progress of the process that started this one."""
        print(text, file=sys.stderr)


def worker_process(study: OpenedStudy, storage_url: str, uri: str, threads: int, variables: Mapping[str, str]) -> None:
    """Work in a process of its own, which ends when the one that started it does; exit code AWAY after an outage.

    `uri` is that of the tracking store. `variables` are those of the environment: the fork may be of an older one.
    """
    os.environ.update(variables)  # which GPUs are seen, too: before CUDA is initialised
    tune_allocator()
    torch.set_num_threads(threads)
    use_store(uri)
    storage, starter = None, parent_process()
    with ending_signals():
        try:
            threading.Thread(target=_end_with, args=[starter], daemon=True).start()
            storage = reopen_storage(storage_url)
            load = load_once(lambda done, total: None)
            Worker(study, study.queue(storage), load, WorkerReporter(), lambda: None).work()
        except (KeyboardInterrupt, Terminated, StoreAway) as error:
            with suppress(Exception):
                storage = storage or reopen_storage(storage_url, LEAVING_SECONDS)
                # The process that started this one ends the study's run, unless it is gone.
                study.leave(storage, "" if starter is None or starter.is_alive() else "KILLED")
            if isinstance(error, RunError):
                print(error.problem, file=sys.stderr)
                sys.exit(AWAY)
            sys.exit(1)


def _end_with(starter: Any) -> None:
    """Wait for the end of the process that started this one, then end this one. Runs in a thread."""
    if starter is not None:
        connection.wait([starter.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ORPHAN_SECONDS)
        os._exit(1)
