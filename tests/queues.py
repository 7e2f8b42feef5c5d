"""A queue of trials and its workers, for the tests of the queue and the engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from effv2.core.internals import study_id
from effv2.studies import queue as queue_module
from effv2.studies.queue import Queue
from effv2.studies.storage import Storage


def trials(storage: Storage) -> list[FrozenTrial]:
    (study,) = storage.optuna.get_all_studies()
    return storage.optuna.get_all_trials(study_id(study))


LEASE_ALL = """
import sys
from optuna.trial import TrialState
from effv2.studies.queue import Queue
from effv2.studies.storage import open_storage
names = {str(number): {} for number in range(24)}
queue = Queue(open_storage(sys.argv[1]), "q", 0, lambda trials: names)
while (lease := queue.lease()) is not None:
    print(lease.user_attrs["slot"])
    queue.finish(lease, TrialState.COMPLETE, 0.5, "")
"""


def make_queue(storage: Storage, trials: int = 3, retries: int = 1) -> Queue:
    if "q" not in [study.study_name for study in storage.optuna.get_all_studies()]:
        storage.optuna.create_new_study([StudyDirection.MAXIMIZE], "q")
    return Queue(storage, "q", retries, lambda _: {str(number): {} for number in range(trials)})


@contextmanager
def worker(name: str, gone: set[str]) -> Iterator[None]:
    """Act as the worker of this name. For it, the workers in `gone` are dead."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(queue_module, "this_process", lambda: name)
        patch.setattr(queue_module, "is_gone", gone.__contains__)
        yield
