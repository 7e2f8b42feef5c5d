"""Work on a study's queue until nothing is left: lease a trial, work on its run, record how it ended."""

import os
import random
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import connection, parent_process

import torch
from optuna.trial import FrozenTrial, TrialState

from effv2.config.options import StudyOptions
from effv2.core.errors import Diverged, InputError, LeaseLost, RunError, StoreAway, Terminated, listed
from effv2.core.processes import ending_signals, leave, tune_allocator
from effv2.core.reporter import LineReporter, Reporter
from effv2.data.dataset import LoadData, load_once
from effv2.run.run import Attempt, RunSpec
from effv2.studies.plan import Plan, best_of
from effv2.studies.queue import ERROR, FINAL, NAME, RUN, Params, Queue
from effv2.studies.seeds import ELSEWHERE
from effv2.studies.storage import LEAVING_SECONDS, OUTAGE_SECONDS, TAKEOVER_SECONDS, Storage, open_storage
from effv2.tracking.read import find_runs, read_history, read_run
from effv2.tracking.run import end_left_open
from effv2.tracking.store import answers, configure, outage_passed
from effv2.tracking.tags import PARENT
from effv2.tracking.writer import TrackedRun

POLL_SECONDS = 1.0  # seconds between two looks at a queue whose last trials belong to others
AWAY = 3  # exit code of a worker after it waited in vain for a database or the tracking store
ORPHAN_SECONDS = 60  # seconds that a worker may take to end after the process that started it


@dataclass(frozen=True)
class OpenedStudy:
    """An opened study, which its workers and the process that started them share: only plain data.

    `name` is the queue's name, `parent` is the study's run, and with `fresh` the study repeats runs that were finished
    before it.
    """

    plan: Plan
    options: StudyOptions
    name: str
    parent: TrackedRun
    fresh: bool

    def queue(self, storage: Storage) -> Queue:
        """Return the queue of the study in its opened storage."""
        return Queue(storage, self.name, self.plan.retries, self.plan.wanted)

    def end(self, queue: Queue, status: str) -> None:
        """End the study's run and the children of dead processes, unless a process works on it. A lease reopens it."""
        with queue.storage.lock(self.name):  # no process leases a trial meanwhile
            if queue.deserted():
                for child in find_runs(self.parent.experiment_id, {PARENT: self.parent.run_id}, running=True):
                    end_left_open(child.run_id)
                self.parent.set_status(status)

    def leave(self, storage: Storage, status: str = "") -> None:
        """Give back the trials of this process, and end the study's run if it is open and a status is given.

        This takes seconds at most, because the process ends. If the storage is away or fails, others take the trials
        when their heartbeat stops. No error here hides the reason for the end.
        """
        storage.patience = LEAVING_SECONDS
        with suppress(Exception):
            released = False
            with suppress(Exception, LeaseLost):
                self.queue(storage).release()
                released = True
            run = read_run(self.parent.run_id) if status and answers() else None
            if run is not None and run.status == "RUNNING":
                with suppress(Exception):
                    if released:
                        storage.retry(lambda: self.end(self.queue(storage), status))
                        return
                self.parent.set_status(status)


@dataclass
class Worker:
    """Takes one trial after the other. It calls `changed` when a trial begins, after each epoch, and when it ends."""

    study: OpenedStudy
    queue: Queue
    load: LoadData
    reporter: Reporter
    changed: Callable[[], None]
    setbacks: Counter[str] = field(default_factory=Counter)  # of each trial

    def work(self) -> None:
        """Work until nothing is left. A failed run is reported to the queue, and the work continues."""
        said = set[str]()
        while True:
            lease = self.queue.lease()
            self.changed()
            if lease is not None:
                with self.queue.heartbeat(lease):
                    self._try(lease)
                self.changed()
            elif left := self.queue.unfinished():
                if self.study.options.workers == 1 and not said.issuperset(left):  # not for workers of one command
                    text = f"Waiting for {listed(left, 5)}, which another process has. If that process is gone"
                    self.reporter.message(f"{text}, this one takes over in at most {TAKEOVER_SECONDS} seconds.")
                    said |= set(left)
                time.sleep(POLL_SECONDS * random.uniform(0.5, 1.5))  # noqa: S311
            else:
                return

    def _try(self, lease: FrozenTrial) -> None:
        name = lease.user_attrs[NAME]
        try:
            self._attempt(lease, name)
        except StoreAway:
            raise
        except LeaseLost:
            pass
        except (RunError, InputError) as error:
            self.queue.fail(lease, str(error), final=isinstance(error, Diverged))
        except Exception as error:  # an error in effv2 or in a library costs one run, not the study
            if outage_passed(error, self.setbacks, name, OUTAGE_SECONDS, self.reporter.message):
                self.queue.release()  # the trial is not the cause
            else:
                traceback.print_exc()
                self.queue.fail(lease, f"{type(error).__name__}: {error}", final=False)

    def _attempt(self, lease: FrozenTrial, name: str) -> None:
        """Let the plan find, resume or start the run of a trial, and record how it ended."""
        study, queue, plan = self.study, self.queue, self.study.plan
        study.parent.set_status("RUNNING")  # another process may have ended it
        params = queue.suggest(lease, plan.sampler(lease.number), plan.suggest)

        def epoch_ended(epoch: int, best: float) -> bool:
            pruned = queue.report(lease, epoch, best, plan.pruner() if epoch < plan.epochs else None)
            self.changed()
            return pruned

        def may_be_best(accuracy: float) -> bool:
            wanted, best = study.options.log_model == "best" or plan.searches, best_of(queue.trials().values())
            return wanted and (best is None or accuracy >= (best.value or 0.0))

        spec = RunSpec(
            name,
            study.parent.experiment_id,
            plan.name,
            str(params.get("arm", "")),
            study.parent.run_id,
            log_model=study.options.log_model == "all",
            checkpoints=study.options,
            fresh=study.fresh,
            previous=lease.user_attrs.get(RUN, ""),
            reporter=self.reporter,
            patience=OUTAGE_SECONDS,
            run_opened=lambda run_id: queue.note_run(lease, run_id),  # so that the next worker of the trial knows it
            epoch_ended=epoch_ended,
            keeps_weights=may_be_best,
        )
        try:
            ended = plan.execute(spec, params, self.load)
        except Diverged as error:
            if not plan.searches:
                raise
            trial = queue.trials()[name]  # in a search this is a valid result: the ranges include bad values
            best = max(trial.intermediate_values.values(), default=0.0)
            queue.finish(lease, TrialState.PRUNED, best, trial.user_attrs[RUN], {ERROR: str(error), FINAL: True})
            return
        self._finish(lease, params, ended)

    def _finish(self, lease: FrozenTrial, params: Params, ended: Attempt) -> None:
        """Finish a trial with the result of its run, or of the equal run that was found finished."""
        queue, run_id, about = self.queue, ended.run.run_id, self.study.plan.facts(params, ended.metrics)
        if ended.found and "train/loss" in ended.metrics:
            queue.report(lease, max(read_history(run_id, "train/loss")), ended.accuracy)
        if ended.found and ended.found.parent != self.study.parent.run_id:
            about[ELSEWHERE] = True
        try:
            state = TrialState.PRUNED if ended.pruned else TrialState.COMPLETE
            queue.finish(lease, state, ended.accuracy, run_id, about)
        except LeaseLost:
            if not ended.found and queue.trials()[lease.user_attrs[NAME]].user_attrs.get(RUN) != run_id:
                ended.run.set_status("KILLED")  # the run of the trial's current worker counts
            raise


def worker_process(study: OpenedStudy, threads: int, gpu: str) -> None:
    """Work in a separate process, which ends when its parent process ends; exit code AWAY after an outage.

    The environment names the tracking store. If a GPU is named, the worker only sees that one.
    """
    storage, starter = None, parent_process()

    def end_with_starter() -> None:
        connection.wait([starter.sentinel])  # type: ignore[union-attr]
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ORPHAN_SECONDS)
        os._exit(1)

    if gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # before CUDA is initialised
    tune_allocator()
    torch.set_num_threads(threads)
    configure()
    with ending_signals(repeated=False):  # the parent process may also send it
        try:
            threading.Thread(target=end_with_starter, daemon=True).start()
            storage = open_storage(study.options.storage, OUTAGE_SECONDS)
            load = load_once(Reporter())
            Worker(study, study.queue(storage), load, LineReporter(lines=False), lambda: None).work()
        except (KeyboardInterrupt, Terminated, StoreAway) as error:
            with suppress(Exception):
                storage = storage or open_storage(study.options.storage, LEAVING_SECONDS)
                # The parent process ends the study's run, unless it is gone.
                study.leave(storage, "" if starter is not None and starter.is_alive() else "KILLED")
            if isinstance(error, RunError):
                print(error, file=sys.stderr)
                leave(AWAY)
            leave(1)
