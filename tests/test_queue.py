"""The queue: each trial is leased to one worker at a time, retried, and finished exactly once."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import sqlalchemy
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.pruners import SuccessiveHalvingPruner
from optuna.trial import FrozenTrial, TrialState

from effv2.core.errors import LeaseLost
from effv2.studies import queue as queue_module
from effv2.studies.queue import ERROR, MOST_LOST, RUN, Queue
from effv2.studies.storage import Database, Storage, open_storage
from tests.conftest import running
from tests.queues import LEASE_ALL, make_queue, trials, worker


def test_processes_never_lease_the_same_trial(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'queue.db'}"
    storage = open_storage(url)
    make_queue(storage, trials=24)
    with ExitStack() as stack:
        processes = [stack.enter_context(running("-c", LEASE_ALL, url)) for _ in range(3)]
        leased = sorted(name for process in processes for name in process.rest().split())
    assert leased == sorted(map(str, range(24)))
    assert len(trials(storage)) == 24
    storage.close()


@pytest.fixture
def storage(empty_queue: Path, tmp_path: Path) -> Iterator[Storage]:
    opened = open_storage(f"sqlite:///{shutil.copy(empty_queue, tmp_path)}")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def empty_queue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create the tables of a storage once. Copying them takes milliseconds."""
    path = tmp_path_factory.mktemp("queue") / "queue.db"
    open_storage(f"sqlite:///{path}").close()
    return path


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["work", "fail", "release", "die"])), max_size=12))
def test_every_trial_is_finished_exactly_once_whatever_happens(
    empty_queue: Path, events: list[tuple[int, str]]
) -> None:
    """Three workers lease, fail, give back and die in any order. A fourth one finishes the rest."""
    gone: set[str] = set()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(queue_module, "MOST_LOST", 100)
        storage = open_storage(f"sqlite:///{shutil.copy(empty_queue, folder)}")
        queue = make_queue(storage, retries=100)
        told: list[int] = []
        for index, (number, event) in enumerate([*events, *[(3, "work")] * 3]):
            with worker(f"{index}" if event == "die" else f"worker {number}", gone):
                lease = queue.lease()
                if event == "die":
                    gone.add(f"{index}")
                elif lease is not None and event == "work":
                    queue.finish(lease, TrialState.COMPLETE, 0.5, "")
                    told.append(lease.number)
                elif lease is not None and event == "fail":
                    queue.fail(lease, "for a test", final=False)
                elif lease is not None:
                    queue.release()
        assert sorted(told) == [0, 1, 2]
        assert [trial.state for trial in queue.trials().values()] == [TrialState.COMPLETE] * 3
        assert not queue.unfinished()
        storage.close()


def test_a_failed_trial_is_retried_as_often_as_the_study_says(storage: Storage) -> None:
    queue = make_queue(storage, trials=1, retries=2)
    attempts = 0
    while (lease := queue.lease()) is not None:
        attempts += 1
        queue.note_run(lease, "its run")
        queue.report(lease, 1, 0.5)
        queue.fail(lease, "for a test", final=False)
    assert attempts == 3 and queue.trials()["0"].state == TrialState.FAIL
    queue.repeat(())  # the command was given again: failed trials get another attempt
    again = queue.lease()
    assert again is not None and again.user_attrs[RUN] == "its run"
    assert queue.trials()["0"].intermediate_values == {1: 0.5}
    queue.fail(again, "diverged", final=True)
    queue.repeat(())
    assert queue.lease() is None


@pytest.mark.parametrize(
    "end",
    [
        pytest.param(lambda queue, lease: queue.finish(lease, TrialState.PRUNED, 0.9, ""), id="diverged"),
        pytest.param(lambda queue, lease: queue.fail(lease, "for a test", final=True), id="failed"),
    ],
)
def test_results_of_a_lost_trial_prune_no_other(storage: Storage, end: Callable[[Queue, FrozenTrial], None]) -> None:
    queue, pruner = make_queue(storage), SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)
    pruned = []
    for accuracy in (0.9, 0.8, 0.7):
        lease = queue.lease()
        assert lease is not None
        pruned.append(queue.report(lease, 1, accuracy, pruner))
        if len(pruned) == 1:
            end(queue, lease)
        else:
            queue.finish(lease, TrialState.PRUNED if pruned[-1] else TrialState.COMPLETE, accuracy, "")
    assert pruned == [False, False, True]


def test_a_trial_that_kills_its_workers_is_given_up(storage: Storage) -> None:
    queue = make_queue(storage, trials=1)
    gone: set[str] = set()
    while True:
        with worker(f"{len(gone)}", gone):
            if queue.lease() is None:
                break
        gone.add(f"{len(gone)}")
    assert len(gone) == MOST_LOST
    assert "its worker was gone" in queue.trials()["0"].user_attrs[ERROR]


def test_a_worker_on_a_lost_machine_is_replaced_and_may_not_finish(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = make_queue(storage, trials=1)
    lease = queue.lease()
    assert lease is not None and isinstance(storage, Database)
    with sqlalchemy.create_engine(storage.url).begin() as connection:
        old = "UPDATE trial_heartbeats SET heartbeat = datetime(heartbeat, '-1 day')"
        connection.execute(sqlalchemy.text(old))
    with worker("elsewhere", set()):
        assert queue.lease() is None  # at first, the database may only have been away
        monkeypatch.setattr(queue_module, "SECOND_LOOK_SECONDS", 0)
        taken = queue.lease()
        assert taken is not None and taken.number == lease.number
    with pytest.raises(LeaseLost):
        queue.finish(lease, TrialState.COMPLETE, 0.5, "")
    queue.fail(lease, "no longer ours to say", final=True)
    queue.release()
    assert queue.trials()["0"].state == TrialState.RUNNING
