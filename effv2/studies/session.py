"""An opened study, as its workers and its coordinator share it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from effv2.config.options import CheckpointOptions, LogModel
from effv2.studies.plan import Plan
from effv2.studies.queue import Queue
from effv2.studies.storage import Storage, StorageAway, hurry, patient
from effv2.tracking.read import find_running
from effv2.tracking.run import TrackedRun
from effv2.tracking.store import impatient


@dataclass(frozen=True)
class Session:
    """All that a worker needs to know, as plain data: the plan, the queue, where its runs go."""

    plan: Plan
    storage_url: str
    study: str
    parent_id: str
    experiment_id: str
    tracking_uri: str
    fresh: bool
    log_model: LogModel
    saving: CheckpointOptions

    def queue(self, storage: Storage) -> Queue:
        """Return the queue of the study in its opened storage."""
        return Queue(storage, self.study, self.plan.purpose.retries, self.plan.slots)

    @property
    def parent(self) -> TrackedRun:
        """Return the run of the study."""
        return TrackedRun(self.parent_id, self.experiment_id)

    def end(self, queue: Queue, status: str) -> None:
        """End the study's run, and children that a dead process left open, unless somebody still works on it.

        Who claims a trial afterwards sets the study's run to RUNNING again.
        """
        patient(self._end)(queue, status)

    def _end(self, queue: Queue, status: str) -> None:
        with queue.storage.lock(self.study), impatient():  # nobody claims a trial meanwhile
            if queue.deserted():
                for child in find_running(self.experiment_id, self.parent_id):
                    TrackedRun(child.run_id, self.experiment_id).end_left_open()
                self.parent.set_status(status)

    def leave(self, storage: Storage, status: str) -> None:
        """Give back what this process works on and end the study's run if it is open, within seconds, on the way out.

        Where the storage is away, its trials are taken up for want of a heartbeat. Nothing hides the reason to leave.
        """
        with suppress(Exception), hurry(), impatient():
            try:
                queue = self.queue(storage)
                queue.release()
                if self.parent.is_running():
                    self.end(queue, status)
            except StorageAway:
                if self.parent.is_running():
                    self.parent.set_status(status)
