"""What runs log reaches the tracking store once and in order, whatever happens to the store, the disk, the process."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from effv2.core.errors import RunError, Terminated
from effv2.core.paths import outbox_folder
from effv2.tracking import entries, outbox
from effv2.tracking.entries import Entry
from effv2.tracking.journal import Journal
from effv2.tracking.outbox import TrackingAway
from effv2.tracking.recovery import is_busy, open_experiment, send_all
from effv2.tracking.run import TrackedRun, start_run
from effv2.tracking.store import open_store, store_name
from effv2.tracking.tags import PROCESS


@pytest.fixture(autouse=True)
def own_outbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EFFV2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(outbox, "WAIT_SECONDS", 0.05)
    return outbox_folder()


class Store:
    """The real store behind a door that can be shut, before or after it took what was sent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shut: str = ""
        for name in ("log_batch", "set_terminated", "log_artifacts", "log_inputs", "search_experiments"):
            monkeypatch.setattr(MlflowClient, name, self._behind_the_door(getattr(MlflowClient, name)))

    def _behind_the_door(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            if self.shut == "before":
                raise MlflowException("Max retries exceeded")
            answer = call(*args, **kwargs)
            if self.shut == "after":
                raise MlflowException("Max retries exceeded")
            return answer

        return called


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch) -> Store:
    return Store(monkeypatch)


def history(run_id: str, name: str) -> list[tuple[int, float]]:
    return [(each.step, each.value) for each in MlflowClient().get_metric_history(run_id, name)]


def folder_of(tmp_path: Path, text: str) -> Path:
    folder = tmp_path / "made"
    folder.mkdir(exist_ok=True)
    (folder / "table.csv").write_text(text)
    return folder


def text_of(run_id: str, name: str) -> str:
    return Path(MlflowClient().download_artifacts(run_id, name)).read_text()


@pytest.mark.parametrize("shut", ["before", "after"])
def test_an_outage_costs_nothing_and_is_told_once(store: str, door: Store, tmp_path: Path, shut: str) -> None:
    said: list[str] = []
    with start_run("run", open_store(""), {}, message=said.append) as run:
        run.log_metrics({"loss": 3.0}, step=1)
        run.check()
        door.shut = shut
        seconds = []
        for epoch in range(2, 7):
            began = time.perf_counter()
            run.log_metrics({"loss": 4.0 - epoch, "accuracy": 0.1 * epoch}, step=epoch)
            seconds.append(time.perf_counter() - began)
        run.log_folder(folder_of(tmp_path, "as it was"))
        folder_of(tmp_path, "changed since")
        run.set_tags({"a": "b"})
        time.sleep(0.3)
        door.shut = ""
    assert statistics.median(seconds) < 0.05 and max(seconds) < 2
    assert [text.partition(" is ")[2][:4] for text in said] == ["away", "back"]
    assert history(run.run_id, "loss") == [(1, 3.0), *((epoch, 4.0 - epoch) for epoch in range(2, 7))]
    assert history(run.run_id, "accuracy") == [(epoch, 0.1 * epoch) for epoch in range(2, 7)]
    assert text_of(run.run_id, "table.csv") == "as it was"
    ended = MlflowClient().get_run(run.run_id)
    assert ended.info.status == "FINISHED" and ended.data.tags["a"] == "b"
    assert not list(outbox_folder().iterdir())


def test_what_a_run_could_not_deliver_is_sent_later(store: str, door: Store, tmp_path: Path) -> None:
    opened = start_run("run", open_store(""), {}, message=print, patience=0.2)
    with pytest.raises(TrackingAway, match="effv2 sync"), opened as run:
        run.check()
        door.shut = "after"
        for epoch in (1, 2, 3):
            run.log_metrics({"loss": 1 / epoch}, step=epoch)
        run.log_folder(folder_of(tmp_path, "kept"))
    door.shut = ""
    assert [each.end for each in send_all(print)] == ["sent"]
    assert history(run.run_id, "loss") == [(1, 1.0), (2, 1 / 2), (3, 1 / 3)]
    assert text_of(run.run_id, "table.csv") == "kept"
    assert MlflowClient().get_run(run.run_id).info.status == "FINISHED"
    assert not send_all(print)


def test_a_call_that_succeeds_late_leaves_nothing_behind(sqlite_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = threading.Event()
    deliver = entries.deliver

    def delivered_late(*args: Any, **kwargs: Any) -> None:
        slow.wait(30)
        deliver(*args, **kwargs)

    opened = start_run("run", open_store(""), {}, message=print, patience=1.0)
    monkeypatch.setattr(outbox, "LAST_CALL", 0.0)
    with pytest.raises(TrackingAway, match="effv2 sync"), opened as run:
        run.check()
        monkeypatch.setattr(outbox, "deliver", delivered_late)
    assert is_busy(run.run_id)
    slow.set()
    deadline = time.monotonic() + 30
    while (outbox_folder() / run.run_id).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not (outbox_folder() / run.run_id).exists()


def left_by_a_dead_process(run: TrackedRun, *written: Entry, process: str = "gone") -> Path:
    """Write a journal as a process that was killed leaves it."""
    folder = outbox_folder() / run.run_id
    journal = Journal.create(folder, {"store": store_name(), "process": process})
    for entry in written:
        journal.append(entry)
    journal.close()
    return folder


@pytest.fixture
def open_run(sqlite_store: str) -> Iterator[TrackedRun]:
    run = MlflowClient().create_run(open_store(""), tags={PROCESS: "gone"})
    yield TrackedRun(run.info.run_id, run.info.experiment_id)


def test_what_belongs_to_no_run_any_longer_is_put_aside(sqlite_store: str) -> None:
    open_store("")
    gone = TrackedRun("0" * 32, "0")
    left_by_a_dead_process(gone, entries.metrics({"loss": 1.0}, 1))
    assert [each.end for each in send_all(print)] == ["refused"]
    assert send_all(print) == []


def test_journals_that_were_damaged_lose_what_was_damaged_and_no_more(open_run: TrackedRun, tmp_path: Path) -> None:
    made = folder_of(tmp_path, "0123456789")
    written = [entries.metrics({"loss": float(epoch)}, epoch) for epoch in (1, 2, 3)]
    folder = left_by_a_dead_process(open_run, *written, Entry("artifacts", {}, made))
    lines = (folder / "journal").read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b"2.0", b"8.0")
    (folder / "journal").write_bytes(b"".join(lines) + b"0123 cut sho")
    copy = folder / "files" / "0" / "table.csv"
    copy.unlink()
    copy.write_text("012345678?")
    said: list[str] = []
    assert [each.end for each in send_all(said.append)] == ["sent"]
    assert history(open_run.run_id, "loss") == [(1, 1.0), (3, 3.0)]
    assert not MlflowClient().list_artifacts(open_run.run_id)
    assert "2 of its entries were damaged" in said[-1]
    assert MlflowClient().get_run(open_run.run_id).info.status == "KILLED"  # whoever held the journal is gone


def test_what_another_process_says_of_the_run_meanwhile_stands(open_run: TrackedRun) -> None:
    """It went on with the run; of what the dead one left only metrics that the run lacks are sent."""
    status = Entry("status", {"status": "KILLED", "end_time": 1})
    left_by_a_dead_process(
        open_run,
        entries.metrics({"loss": 1.0}, 1),
        entries.metrics({"loss": 2.0}, 2),
        entries.tags({"a": "old"}),
        status,
    )
    open_run.set_tags({PROCESS: "another", "a": "new"})
    open_run.log_metrics({"loss": 2.5}, step=2)
    send_all(print)
    run = MlflowClient().get_run(open_run.run_id)
    assert run.info.status == "RUNNING" and run.data.tags["a"] == "new"
    assert sorted(history(open_run.run_id, "loss")) == [(1, 1.0), (2, 2.5)]


def test_journals_wait_for_their_own_store(
    open_run: TrackedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_by_a_dead_process(open_run, entries.tags({"a": "b"}))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    assert [each.end for each in send_all(print)] == ["waits"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    open_experiment("", print)
    assert MlflowClient().get_run(open_run.run_id).data.tags["a"] == "b"


def test_the_journal_of_a_run_that_was_deleted_is_put_aside(open_run: TrackedRun) -> None:
    folder = left_by_a_dead_process(open_run, entries.metrics({"loss": 1.0}, 1))
    MlflowClient().delete_run(open_run.run_id)
    said: list[str] = []
    assert [each.end for each in send_all(print)] == ["refused"]
    assert not folder.exists() and len(list(outbox_folder().glob("*.refused"))) == 1
    assert not send_all(said.append) and not said


def test_what_the_store_refuses_ends_the_run(sqlite_store: str) -> None:
    with pytest.raises(RunError, match="refused"), start_run("run", open_store(""), {}, message=print) as run:
        run.log_params({"x" * 300: "a name that is too long"})
        for _ in range(100):
            run.log_metrics({"loss": 1.0})
            time.sleep(0.05)
    assert MlflowClient().get_run(run.run_id).info.status == "FAILED"


def test_a_full_disk_is_told_and_costs_nothing_while_the_store_is_there(
    sqlite_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> Entry:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Journal, "append", full)
    said: list[str] = []
    with start_run("run", open_store(""), {}, message=said.append) as run:
        run.log_metrics({"loss": 1.0}, step=1)
        run.log_folder(folder_of(tmp_path, "there"))
    assert len(said) == 1 and "No space left" in said[0]
    assert history(run.run_id, "loss") == [(1, 1.0)] and text_of(run.run_id, "table.csv") == "there"


def test_a_run_that_was_complete_ends_finished_whatever_interrupts_its_end(sqlite_store: str) -> None:
    with pytest.raises(Terminated), start_run("run", open_store(""), {}, message=print) as run:
        run.complete()
        raise Terminated
    assert MlflowClient().get_run(run.run_id).info.status == "FINISHED"


def test_a_run_that_a_living_process_works_on_is_left_alone(open_run: TrackedRun) -> None:
    journal = Journal.create(outbox_folder() / open_run.run_id, {})
    opened = start_run("", open_run.experiment_id, {}, continues=open_run.run_id, message=print)
    with pytest.raises(RunError, match="another process works on it"), opened:
        pass
    journal.close()
    run = MlflowClient().get_run(open_run.run_id)
    assert run.info.status == "RUNNING" and run.data.tags[PROCESS] == "gone"


def test_what_waits_of_a_run_is_never_written_over(open_run: TrackedRun) -> None:
    folder = left_by_a_dead_process(open_run, entries.metrics({"loss": 1.0}, 1))
    opened = start_run("", open_run.experiment_id, {}, continues=open_run.run_id, message=print)
    with pytest.raises(RunError, match="effv2 sync"), opened:
        pass
    assert (folder / "journal").stat().st_size
    assert [each.end for each in send_all(print)] == ["sent"] and history(open_run.run_id, "loss") == [(1, 1.0)]


def test_a_replay_deletes_nothing_that_came_to_stay(open_run: TrackedRun, tmp_path: Path) -> None:
    discards = (Entry("discard", {"name": "checkpoints", "but": name}) for name in ("first", "second"))
    left_by_a_dead_process(open_run, *discards)
    (tmp_path / "second").write_text("the last one")
    open_run.log_only(tmp_path / "second", "checkpoints")
    send_all(print)
    assert [file.path for file in MlflowClient().list_artifacts(open_run.run_id, "checkpoints")] == [
        "checkpoints/second"
    ]


def test_a_disk_that_was_full_for_a_while_leaves_no_gap_in_the_journal(
    sqlite_store: str, door: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, calls = Journal.append, []

    def full_once(journal: Journal, entry: Entry) -> Entry:
        calls.append(entry)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        return append(journal, entry)

    monkeypatch.setattr(Journal, "append", full_once)
    opened = start_run("run", open_store(""), {}, message=print, patience=0.2)
    with pytest.raises(TrackingAway, match="the disk had no room for all"), opened as run:
        run.check()
        door.shut = "before"
        for epoch in range(1, 6):
            run.log_metrics({"loss": 1.0}, step=epoch)
        run.complete()
    door.shut = ""
    send_all(print)
    assert [step for step, _ in history(run.run_id, "loss")] == [1, 2]
    assert MlflowClient().get_run(run.run_id).info.status == "KILLED"  # to be gone on with, from its checkpoint
