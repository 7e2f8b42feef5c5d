"""Work on a study's queue until nothing is left: claim a trial, train its run, say how it ended."""

from __future__ import annotations

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
from typing import Literal

import torch
from optuna.trial import TrialState

from effv2.core.errors import Diverged, LeaseLost, RunError, Terminated
from effv2.core.reporter import Reporter
from effv2.core.signals import ending_signals
from effv2.execution.allocator import tune_allocator
from effv2.run.labels import Labels, identity
from effv2.run.run import discard_checkpoints, run_experiment
from effv2.run.watching import Observer
from effv2.studies.plan import LoadData, LoadedData, best_of
from effv2.studies.queue import RUN, Claim, Queue
from effv2.studies.session import Session
from effv2.studies.storage import OUTAGE_SECONDS, Storage, StorageAway, hurry, reopen_storage
from effv2.tracking.accuracies import reached_accuracy
from effv2.tracking.entries import may_pass
from effv2.tracking.outbox import TrackingAway
from effv2.tracking.read import Identity, RunRecord, find_finished, read_runs
from effv2.tracking.recovery import is_busy, send
from effv2.tracking.store import (
    WAIT_SECONDS,
    TrackingAway,
    answers,
    is_temporary,
    reason,
    shown_uri,
    use_store,
    wait_until_it_answers,
)
from effv2.tracking.tags import OUTCOME
from effv2.tracking.writer import TrackedRun
from effv2.training.loop import EpochResult
from effv2.training.state import watched_accuracy

POLL_SECONDS = 1.0  # between two looks at a queue whose last trials others work on
AWAY = 3  # exit code of a worker that waited in vain for a database or the tracking store
MOST_SETBACKS = 5  # so often a trial is given back because the tracking store failed, and answered again
ORPHAN_SECONDS = 60  # so long a worker may take to end after the process that started it


class WorkerReporter(Reporter):
    """Says what must be known, and nothing else: what a worker process does is seen through the storage."""

    def message(self, text: str) -> None:
        """Say it past the progress of the process that started this one."""
        print(text, file=sys.stderr)


class TrialObserver(Callback):
    """Reports a run's epochs to its trial, and lets the pruner decide."""

    def __init__(self, worker: Worker, claim: Claim) -> None:
        self.worker, self.claim = worker, claim
        self.best, self.run_id = 0.0, ""

    def run_opened(self, run_id: str) -> None:
        """Note the run on the trial, so that whoever takes the trial up knows of it."""
        self.run_id = run_id
        self.worker.queue.note_run(self.claim, run_id)

    def run_resumed(self, accuracy: float) -> None:
        """Take over the best accuracy of the epochs that aren't trained again."""
        self.best = max(self.best, accuracy)

    def epoch_ended(self, result: EpochResult) -> bool:
        """Report the best accuracy so far, which is what a trial is worth; ask the pruner."""
        queue, plan = self.worker.queue, self.worker.session.plan
        self.best = max(self.best, watched_accuracy(result.metrics))
        queue.report(self.claim, result.epoch, self.best)
        self.worker.changed()
        if not plan.samples or result.epoch >= plan.epochs:
            return False
        return queue.prunes(self.claim, result.epoch, plan.pruner())

    def keeps_weights(self, accuracy: float) -> bool:
        """Keep what may turn out to be the best model of the study."""
        session = self.worker.session
        if session.log_model != "best" and not session.plan.samples:
            return False
        best = best_of(self.worker.queue.trials())
        return best is None or accuracy >= (best.value or 0.0)


@dataclass
class Worker:
    """Takes trial after trial until all wanted ones are finished, here or elsewhere.

    `changed` is called when a trial begins, after each of its epochs, and when it ends.
    """

    session: Session
    queue: Queue
    load: LoadData
    reporter: Reporter
    changed: Callable[[], None]
    _setbacks: Counter[str] = field(default_factory=Counter)

    def work(self) -> None:
        """Work until nothing is left. A run that fails is told to the queue and the rest goes on."""
        while True:
            claim = self.queue.claim()
            self.changed()
            if claim is not None:
                self._try(claim)
                self.changed()
            elif self.queue.unfinished():
                time.sleep(POLL_SECONDS * random.uniform(0.5, 1.5))  # noqa: S311
            else:
                return

    def _try(self, claim: Claim) -> None:
        with self.queue.heartbeat(claim):
            try:
                self._attempt(claim)
            except StorageAway:
                raise
            except LeaseLost:
                pass
            except TrackingAway as error:
                self.queue.release()
                raise StorageAway(str(error)) from error
            except RunError as error:
                self.queue.fail(claim, str(error), final=isinstance(error, Diverged))
            except Exception as error:  # a fault of ours or of a library costs one run, not the study
                if self._is_setback(error, claim) or not answers():
                    self._wait_for_tracking()
                else:
                    traceback.print_exc()
                    self.queue.fail(claim, f"{type(error).__name__}: {error}", final=False)

    def _is_setback(self, error: Exception, claim: Claim) -> bool:
        """Say, after a pause, whether the tracking store failed as for a moment, and not too often for this trial."""
        if not is_temporary(error) or self._setbacks[claim.slot] == MOST_SETBACKS:
            return False
        self._setbacks[claim.slot] += 1
        self.reporter.message(f"The tracking store failed ({reason(error)}); the run goes on when it answers.")
        time.sleep(WAIT_SECONDS * self._setbacks[claim.slot])
        return True

    def _wait_for_tracking(self) -> None:
        """Give the trial back, which is not to blame, once the tracking store answers again."""
        back = wait_until_it_answers(OUTAGE_SECONDS)
        self.queue.release()
        if not back:
            raise StorageAway(
                f"The tracking store {shown_uri()} has been away for {OUTAGE_SECONDS} seconds; start it and give the "
                "same command again, which goes on from here."
            )

    def _attempt(self, claim: Claim) -> None:
        """Train the run of a trial, unless a finished one with the same identity is there; tell how it ended."""
        session, queue, plan = self.session, self.queue, self.session.plan
        session.parent.set_status("RUNNING")  # where somebody who left had ended it
        planned = queue.suggest(claim, plan.sampler(claim.number), lambda trial: plan.run_of(claim.slot, trial))
        dataset = self.load(planned.config.data)
        done = self._done_before(claim, identity(planned.config, dataset))
        if done is not None:
            discard_checkpoints(done.run_id, session.checkpoints)
            if epochs := TrackedRun(done.run_id, session.experiment_id).steps("train/loss"):
                queue.report(claim, max(epochs), reached_accuracy(done.metrics))
            queue.finish(claim, _state(done.tags[OUTCOME] == "pruned"), reached_accuracy(done.metrics), done.run_id)
            return
        labels = RunSpec(
            planned.name,
            session.experiment_id,
            plan.purpose.name,
            planned.arm,
            session.parent_id,
            resumes=self._left_of(claim),
        )
        observer = TrialObserver(self, claim)
        log_model = session.log_model == "all"
        try:
            outcome = train_run(
                planned.config,
                dataset,
                labels,
                self.reporter,
                log_model,
                checkpoints=session.checkpoints,
                observer=observer,
                patience=OUTAGE_SECONDS,
            )
        except Diverged:
            if not plan.samples:
                raise
            # In a search an answer like any other: this is no place to look for the best.
            queue.finish(claim, TrialState.PRUNED, observer.best, observer.run_id)
            return
        try:
            queue.finish(claim, _state(outcome.pruned), outcome.watched_accuracy, outcome.run.run_id)
        except LeaseLost:
            if queue.trials()[claim.slot].user_attrs.get(RUN) != outcome.run.run_id:
                outcome.run.set_status("KILLED")  # the run of the worker that has the trial now counts
            raise

    def _left_of(self, claim: Claim) -> str:
        """Return the run that an earlier attempt left, which goes on; empty where none is in the store, or it is busy.

        Busy is one whose process was only stopped for a while: it will find that the trial isn't its own any longer.
        """
        left = read_run(claim.previous_run) if claim.previous_run and not is_busy(claim.previous_run) else None
        return left.run_id if left is not None else ""

    def _done_before(self, claim: Claim, wanted: Identity) -> RunRecord | None:
        """Return a finished run that answers the trial: of an earlier attempt, or of any study of the experiment.

        An earlier attempt that its process left open is marked as killed.
        """
        session = self.session
        if claim.previous_run:
            send(claim.previous_run, self.reporter.message)
        there = read_run(claim.previous_run) if claim.previous_run else None
        for record in read_runs([there.run_id] if there else [], []):
            complete = TrackedRun(record.run_id, session.experiment_id).end_left_open()
            if record.status == "FINISHED" or complete:
                return record
        return find_finished(wanted, session.experiment_id, session.parent_id if session.fresh else "")


def _state(pruned: bool) -> Literal[TrialState.COMPLETE, TrialState.PRUNED]:
    return TrialState.PRUNED if pruned else TrialState.COMPLETE


def worker_process(session: Session, threads: int) -> None:
    """Work in a process of its own, which ends when the one that started it does; exit code AWAY after an outage."""
    tune_allocator()
    torch.set_num_threads(threads)
    use_store(session.tracking_uri)
    storage: Storage | None = None
    with ending_signals():
        try:
            _end_with_parent()
            storage = reopen_storage(session.storage_url)
            queue = session.queue(storage)
            Worker(session, queue, LoadedData(lambda done, total: None), WorkerReporter(), lambda: None).work()
        except (KeyboardInterrupt, Terminated):
            _leave(session, storage)
            sys.exit(1)
        except StorageAway as error:
            _leave(session, storage)
            print(error.sentences(session.fresh), file=sys.stderr)
            sys.exit(AWAY)


def _leave(session: Session, storage: Storage | None) -> None:
    """Give back the work; end the study's run if the process that started this one, which would do it, is gone."""
    parent = parent_process()
    with suppress(Exception), hurry():
        storage = storage or reopen_storage(session.storage_url)
        if parent is None or parent.is_alive():
            session.queue(storage).release()
        else:
            session.leave(storage, "KILLED")


def _end_with_parent() -> None:
    """Watch the process that started this one from a thread."""
    parent = parent_process()
    if parent is None:
        return

    def watch(sentinel: int) -> None:
        connection.wait([sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ORPHAN_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, args=[parent.sentinel], daemon=True).start()
