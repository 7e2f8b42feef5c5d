"""Studies of processes that share nothing but a folder: exactly as many trials as are wanted, whatever is killed."""

from __future__ import annotations

import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from optuna.trial import TrialState

from effv2.core.errors import InputError, LeaseLost, StoreAway
from effv2.core.internals import trial_id
from effv2.studies import queue as queue_module
from effv2.studies.journal import LockFile, LogAway
from effv2.studies.storage import Journal, check_storage, open_storage
from tests.conftest import ROOT, running
from tests.test_engine import (
    LEASE_ALL,
    RUNS,
    SMALL,
    check_small,
    end,
    in_mid_epoch,
    make_queue,
    runs,
    trials,
    undisturbed,
    wait_for,
    worker,
)

__all__ = ["undisturbed"]  # a fixture
DAY = 86_400.0


@pytest.fixture
def url(tmp_path: Path) -> str:
    (tmp_path / "shared").mkdir()
    return f"journal://{tmp_path}/shared/study.log"


def age(path: Path) -> None:
    os.utime(path, (time.time() - DAY,) * 2)


def test_processes_that_share_a_folder_finish_a_study_of_which_one_is_killed(
    file_store: str, url: str, tmp_path: Path, undisturbed: object
) -> None:
    """Three commands: no database, no server, no process that started the others."""
    study = tmp_path / "shared" / "small.yaml"
    study.write_text(SMALL)
    words: list[str | Path] = [
        "--study",
        study,
        "--storage",
        url,
        "--log-model",
        "none",
        "--checkpoint-dir",
        tmp_path / "shared" / "kept",
    ]
    storage = open_storage(url)
    with ExitStack() as stack:
        processes = [stack.enter_context(running(ROOT / "entry_points" / "ablate.py", *words)) for _ in range(3)]
        killed = wait_for(lambda: in_mid_epoch(storage, 1), processes[0])
        os.kill(killed, signal.SIGKILL)
        codes: list[int] = []
        for process in processes:
            process.rest()
            codes.append(process.returncode or 0)
        assert sorted(codes) == [-signal.SIGKILL, 0, 0]
        end(stack.enter_context(running(ROOT / "entry_points" / "ablate.py", *words)))
    check_small(storage, undisturbed(1), tmp_path)  # type: ignore[operator]
    (parent,) = (run for run in runs() if "mlflow.parentRunId" not in run.data.tags)
    assert parent.info.status == "FINISHED" and len(trials(storage)) == RUNS


def test_processes_never_lease_the_same_trial_though_some_are_killed(url: str) -> None:
    storage = open_storage(url)
    make_queue(storage, trials=24)
    slow = LEASE_ALL.replace("    print", "    __import__('time').sleep(0.02)\n    print")
    with ExitStack() as stack:
        processes = [stack.enter_context(running("-c", slow, url)) for _ in range(3)]
        while sum(trial.state.is_finished() for trial in trials(storage)) < 3:
            time.sleep(0.02)
        for process in processes[:2]:
            process.kill()
        processes.append(stack.enter_context(running("-c", slow, url)))
        said = [name for process in processes for name in process.rest().split()]
    assert set(said) == set(map(str, range(24)))
    assert [trial.state for trial in trials(storage)] == [TrialState.COMPLETE] * 24


def test_a_machine_that_is_lost_is_replaced_and_may_not_finish(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(url)
    queue = make_queue(storage, trials=1)
    lease = queue.lease()
    assert lease is not None
    with worker("elsewhere", set()):
        assert queue.lease() is None  # it gave a sign of life
        age(Path(f"{storage.file}.alive", str(trial_id(lease))))
        assert queue.lease() is None  # at first sight the file system may just have been away
        monkeypatch.setattr(queue_module, "SECOND_LOOK_SECONDS", 0)
        taken = queue.lease()
        assert taken is not None and taken.number == lease.number
    with pytest.raises(LeaseLost):
        queue.finish(lease, TrialState.COMPLETE, 0.5, "")


@pytest.mark.parametrize("owner", ["another/machine/1/1/x y", ""])  # the latter died before it had written
def test_a_lock_of_a_silent_owner_is_taken_and_that_one_writes_no_more(tmp_path: Path, owner: str) -> None:
    path = tmp_path / "lock"
    lock = LockFile(path, grace=60, longer=0.3)
    path.write_text(owner)
    with pytest.raises(LogAway, match=r"keeps .* locked"), lock.held(0.5):
        pass
    assert path.read_text() == owner, "an owner that isn't silent keeps it"
    age(path)
    began = time.monotonic()
    with lock.held(5):
        assert time.monotonic() - began > 0.3 and lock.is_held()
        path.write_text("another/machine/1/1/x z")
        assert lock.is_lost()
    assert path.exists() and [*tmp_path.iterdir()] == [path], "what is another's is not removed"


def test_who_lost_its_lock_changes_nothing(url: str) -> None:
    storage = open_storage(url)
    assert isinstance(storage, Journal) and storage.file is not None
    queue, lock = make_queue(storage, trials=1), Path(f"{storage.file}.lock")
    before = storage.file.read_bytes()
    with pytest.raises(LogAway, match="others took its lock"), storage.lock("q"):
        lock.write_text("another/machine/1/1/x z")
        storage.optuna.set_study_user_attr(queue.study_id, "name", "value")
    assert storage.file.read_bytes() == before
    lock.unlink()
    assert queue.lease() is not None


def test_half_a_line_is_cut_off_and_a_lost_log_is_named(url: str) -> None:
    storage = open_storage(url)
    assert storage.file is not None
    queue = make_queue(storage, trials=2)
    with storage.file.open("ab") as file:
        file.write(b'{"op_code": 8, "work')
    assert len(open_storage(url).optuna.get_all_studies()) == 1
    lease = queue.lease()
    assert lease is not None
    queue.finish(lease, TrialState.COMPLETE, 0.5, "")
    (other,) = open_storage(url).optuna.get_all_studies()
    assert other.study_name == "q" and storage.file.read_bytes().endswith(b"}\n")
    storage.file.unlink()
    with pytest.raises(StoreAway, match=r"study.log was removed, replaced or damaged"):
        queue.lease()


def test_wrong_addresses_are_refused(tmp_path: Path, url: str) -> None:
    assert check_storage(url) == tmp_path / "shared" / "study.log"
    with pytest.raises(InputError, match="no such folder"):
        check_storage("journal:///nowhere/study.log")
    with pytest.raises(InputError, match="no such kind of storage"):
        check_storage("journal://")
