"""An opened study, as its workers and its coordinator share it."""

from __future__ import annotations

from dataclasses import dataclass

from effv2.studies.options import LogModel
from effv2.studies.plan import Plan
from effv2.studies.queue import Queue
from effv2.studies.storage import Storage
from effv2.tracking.read import find_running
from effv2.tracking.run import TrackedRun


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

    def queue(self, storage: Storage) -> Queue:
        """Return the queue of the study in its opened storage."""
        return Queue(storage, self.study, self.plan.purpose.retries, self.plan.slots)

    @property
    def parent(self) -> TrackedRun:
        """Return the run of the study."""
        return TrackedRun(self.parent_id, self.experiment_id)

    def leave(self, queue: Queue, status: str) -> None:
        """End the study's run, and children that a dead process left open, unless somebody still works on it."""
        if not queue.deserted():
            return
        for run_id in find_running(self.experiment_id, self.parent_id):
            TrackedRun(run_id, self.experiment_id).set_status("KILLED")
        self.parent.set_status(status)
