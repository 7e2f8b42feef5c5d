"""Studies of processes that share only a folder: exactly as many trials as planned, whatever is killed."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from optuna.trial import TrialState

from effv2.cli.main import main
from effv2.core.errors import InputError, LeaseLost, StoreAway, Terminated
from effv2.core.internals import trial_id
from effv2.core.processes import ending_signals
from effv2.studies import journal
from effv2.studies import queue as queue_module
from effv2.studies.journal import LockFile, Log, LogAway
from effv2.studies.storage import Journal, check_storage, open_storage
from tests.conftest import ROOT, invoke, running
from tests.queues import LEASE_ALL, make_queue, trials, worker
from tests.test_engine import RUNS, SMALL, check_small, end, in_mid_epoch, runs, undisturbed, wait_for

__all__ = ["undisturbed"]  # a fixture
DAY = 86_400.0


@pytest.fixture
def url(tmp_path: Path) -> str:
    (tmp_path / "shared").mkdir()
    return f"journal://{tmp_path}/shared/study.log"


def age(path: Path) -> None:
    os.utime(path, (time.time() - DAY,) * 2)


def test_processes_that_share_a_folder_finish_a_study_though_one_is_killed(
    file_store: str, url: str, tmp_path: Path, undisturbed: object
) -> None:
    """Three commands run without a database, a server or a coordinator."""
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
        said = [process.rest() for process in processes]
        assert sorted(process.returncode or 0 for process in processes) == [-signal.SIGKILL, 0, 0], "\n".join(said)
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
        assert queue.lease() is None  # it sent a heartbeat
        age(Path(f"{storage.file}.alive", str(trial_id(lease))))
        assert queue.lease() is None  # at first, the file system may only have been away
        monkeypatch.setattr(queue_module, "SECOND_LOOK_SECONDS", 0)
        taken = queue.lease()
        assert taken is not None and taken.number == lease.number
    with pytest.raises(LeaseLost):
        queue.finish(lease, TrialState.COMPLETE, 0.5, "")


@pytest.mark.parametrize("owner", ["another/machine/1/1/x y", ""])  # the empty one's owner died before it had written
def test_the_lock_of_a_silent_owner_is_taken_and_the_owner_writes_no_more(tmp_path: Path, owner: str) -> None:
    path = tmp_path / "lock"
    lock = LockFile(path, grace=60, longer=0.3)
    path.write_text(owner)
    with pytest.raises(StoreAway, match=r"holds the lock"), lock.held(0.5):
        pass
    assert path.read_text() == owner, "an owner with heartbeats keeps its lock"
    age(path)
    began = time.monotonic()
    with lock.held(5):
        assert time.monotonic() - began > 0.3 and lock.is_held()
        path.write_text("another/machine/1/1/x z")
        assert lock.is_lost()
    assert path.exists() and [*tmp_path.iterdir()] == [path], "a lock of another process is not removed"


def test_a_process_that_lost_its_lock_changes_nothing(url: str) -> None:
    storage = open_storage(url)
    assert isinstance(storage, Journal) and storage.file is not None
    queue, lock = make_queue(storage, trials=1), Path(f"{storage.file}.lock")
    before = storage.file.read_bytes()
    with pytest.raises(LogAway, match="another one took its lock"), storage.lock("q"):
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


def test_a_file_that_is_no_log_is_refused_and_left_unchanged(sqlite_store: str, url: str, tmp_path: Path) -> None:
    """The refusal comes before the experiment and a folder are created."""
    log = tmp_path / "shared" / "study.log"
    start = b'{"op_code":0,"worker_id":"w","study_name":"q","directions":[2]}\n'
    for text in (b"my thesis", b"my thesis\n", b'{"a": 1}', start + b"!\n" + start):
        log.write_bytes(text)
        result = invoke(main, "ablate", "--storage", url, "--experiment", "new")
        assert result.exit_code == 2 and "give another file" in result.stderr, text
        assert log.read_bytes() == text
    for path in (log.parent, "/proc/study.log"):  # a folder, and one without write access
        with pytest.raises(InputError, match="give another file"):
            check_storage(f"journal://{path}")
    assert MlflowClient().get_experiment_by_name("new") is None and [*log.parent.iterdir()] == [log]
    log.write_bytes(start)
    storage = open_storage(url)
    log.write_bytes(start + b"my thesis")
    with pytest.raises(StoreAway, match="does not end with an entry"):
        storage.retry(lambda: storage.optuna.set_study_user_attr(0, "name", "value"))
    assert log.read_bytes() == start + b"my thesis"


def test_a_folder_that_is_away_is_named_with_what_helps(url: str) -> None:
    storage = open_storage(url)

    def away() -> None:
        raise LogAway("Stale file handle")

    storage.patience = -1
    with pytest.raises(
        StoreAway, match=r"has not answered .* \(Stale file handle\); check that .*/shared/study.log can be read and"
    ):
        storage.retry(away)


def test_both_ends_of_a_long_log_are_checked(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "CHECKED_BYTES", 500)
    log, lines = Path(url.removeprefix("journal://")), [b'{"op_code":0,"worker_id":"w","study_name":"q"}\n'] * 40
    log.write_bytes(b"".join(lines))
    check_storage(url)
    for at, refused in ((0, True), (len(lines) // 2, False), (len(lines) - 2, True)):
        log.write_bytes(b"".join([*lines[:at], b"!" + lines[at], *lines[at + 1 :]]))
        with pytest.raises(InputError, match="give another file") if refused else nullcontext():
            check_storage(url)


class Slept(LockFile):
    """The process slept after it had taken its lock, or, if `late`, after it had checked it."""

    late = False

    @contextmanager
    def held(self, patience: float) -> Iterator[None]:
        with super().held(patience):
            if not self.late:
                self.path.write_text("another/machine/1/1/x z")
            yield

    def is_lost(self) -> bool:
        if not self.late:
            return super().is_lost()
        with (self.path.parent / "study.log").open("ab") as file:
            file.write(b'{"op_code":1}\n')
        return False


def test_a_process_that_slept_before_writing_overwrites_nothing(tmp_path: Path) -> None:
    lock = Slept(tmp_path / "lock", 60, 20)
    log = Log(tmp_path / "study.log", [lock], lambda: 1.0)
    with pytest.raises(LogAway, match="another one took its lock"):
        log.append_logs([{"op_code": 2}])
    assert log.path.read_bytes() == b""
    lock.path.unlink()
    lock.late = True
    log.append_logs([{"op_code": 2}])
    assert log.path.read_bytes() == b'{"op_code":1}\n{"op_code":2}\n'


def test_a_lock_that_a_process_keeps_is_named(url: str) -> None:
    storage = open_storage(url)
    queue = make_queue(storage, trials=1)
    storage.patience = 0.3
    for name in ("lock", "append.lock"):
        lock = Path(f"{storage.file}.{name}")
        lock.write_text("another/machine/1/1/x y")
        with pytest.raises(StoreAway, match=rf"^Another process holds the lock .*\.{name}; end that process"):
            queue.lease()
        lock.unlink()
    assert queue.lease() is not None


def test_heartbeats_end_with_the_work_and_cost_one_look_at_the_clock(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(url)
    queue = make_queue(storage, trials=3)
    looks: list[object] = []
    make = tempfile.TemporaryFile

    def counted(**words: Any) -> Any:
        looks.append(words)
        return make(**words)

    monkeypatch.setattr(tempfile, "TemporaryFile", counted)
    for name in ("a", "b", "c"):
        with worker(name, set()):
            lease = queue.lease()
            assert lease is not None
    assert len(looks) == 2, "one per lease while others run"
    with worker("a", {"b"}):
        queue.release()
        queue.lease()
    with worker("c", set()):
        assert lease is not None
        queue.finish(lease, TrialState.COMPLETE, 0.5, "")
    running = [trial_id(each) for each in trials(storage) if each.state == TrialState.RUNNING]
    assert [each.name for each in Path(f"{storage.file}.alive").iterdir()] == [*map(str, running)] and len(running) == 1
    looks.clear()
    Path(f"{storage.file}.lock").write_text("another/machine/1/1/x y")
    storage.patience = 0.5
    with pytest.raises(StoreAway):
        queue.lease()
    assert len(looks) == 1


def test_a_signal_while_a_lock_is_taken_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, opened = LockFile(tmp_path / "lock", 60, 20), Path.open

    def interrupted(*args: Any, **words: Any) -> Any:
        file = opened(*args, **words)
        os.kill(os.getpid(), signal.SIGTERM)
        return file

    with pytest.raises(Terminated), ending_signals(), monkeypatch.context() as patch:
        patch.setattr(Path, "open", interrupted)
        with lock.held(5):
            pass
    assert not lock.path.exists()


def test_a_signal_within_a_lease_waits_for_its_end(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(url)
    queue = make_queue(storage, trials=1)
    beat = storage.beat

    def interrupted(trial: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        beat(trial)

    monkeypatch.setattr(storage, "beat", interrupted)
    with pytest.raises(Terminated), ending_signals():
        queue.lease()
    assert [each.state for each in trials(storage)] == [TrialState.RUNNING]


def test_wrong_addresses_are_refused(tmp_path: Path, url: str) -> None:
    assert check_storage(url) == tmp_path / "shared" / "study.log"
    with pytest.raises(InputError, match="no such folder"):
        check_storage("journal:///nowhere/study.log")
    with pytest.raises(InputError, match="no such kind of storage"):
        check_storage("journal://")
    with pytest.raises(InputError, match=r"no such kind of storage; use .* or journal:///FOLDER/FILE"):
        check_storage("journal://study.log")  # a relative path, which is another file on every machine
