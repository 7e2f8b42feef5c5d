"""The sender: metrics reach the tracking store once and in order, whatever happens to the store or the run."""

from __future__ import annotations

import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from effv2.config.options import CheckpointOptions
from effv2.core.errors import RunError, StoreAway, Terminated
from effv2.core.processes import ending_signals
from effv2.tracking import run as tracking_run
from effv2.tracking import sender
from effv2.tracking.run import begin_run, open_experiment, open_run
from effv2.tracking.store import open_store
from effv2.tracking.tags import CREATION, OUTCOME, PROCESS
from effv2.training.checkpoint import Checkpointer


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "WAIT_SECONDS", 0.05)
    monkeypatch.setattr(tracking_run, "EARLY_PATIENCE", 0.3)


class Store:
    """The real store behind a door. Shut, it fails before or after the store took a request."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shut: str = ""
        for name in ("log_batch", "set_terminated", "log_artifacts", "log_text", "log_inputs", "search_experiments"):
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
def door(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    store = Store(monkeypatch)
    yield store
    store.shut = ""


def history(run_id: str, name: str) -> list[tuple[int, float]]:
    return [(each.step, each.value) for each in MlflowClient().get_metric_history(run_id, name)]


@pytest.mark.parametrize("shut", ["before", "after"])
def test_an_outage_costs_nothing_and_is_announced_once(store: str, door: Store, tmp_path: Path, shut: str) -> None:
    said: list[str] = []
    (tmp_path / "checkpoint").write_text("as it was")
    with open_run("run", open_store(""), {}, message=said.append) as run:
        run.log_metrics({"loss": 3.0}, step=1)
        run.sender.check()
        door.shut = shut
        seconds = []
        for epoch in range(2, 7):
            began = time.perf_counter()
            run.log_metrics({"loss": 4.0 - epoch, "accuracy": 0.1 * epoch}, step=epoch)
            seconds.append(time.perf_counter() - began)
        for _ in range(2):  # the second one returns at once, since one already waits
            run.upload_checkpoint(tmp_path / "checkpoint")
        run.set_tags({"a": "b"})
        time.sleep(0.3)
        door.shut = ""
    assert statistics.median(seconds) < 0.05 and max(seconds) < 2
    assert ["answers again" in text for text in said] == [False, True]
    assert history(run.run_id, "loss") == [(1, 3.0), *((epoch, 4.0 - epoch) for epoch in range(2, 7))]
    assert history(run.run_id, "accuracy") == [(epoch, 0.1 * epoch) for epoch in range(2, 7)]
    ended = MlflowClient().get_run(run.run_id)
    assert ended.info.status == "FINISHED" and ended.data.tags["a"] == "b"
    assert Path(MlflowClient().download_artifacts(run.run_id, "checkpoints/checkpoint")).read_text() == "as it was"
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_what_a_run_could_not_deliver_is_delivered_when_it_is_resumed(store: str, door: Store) -> None:
    """The last calls may have arrived or not. Nothing is missing, and nothing is there twice."""
    losses = [{"loss": 1 / epoch} for epoch in (1, 2, 3)]
    opened = open_run("run", open_store(""), {}, message=print, patience=0.2)
    with pytest.raises(StoreAway, match="start it") as error, opened as run:
        run.sender.check()
        run.log_metrics(losses[0], step=1)
        run.sender.flush(10)
        door.shut = "after"
        run.log_metrics(losses[1], step=2)
    assert error.value.resumes  # the commands report it
    door.shut = ""
    with open_run("run", run.experiment_id, {}, resumes=run.run_id, message=print) as again:
        for epoch, metrics in enumerate(losses, 1):
            again.log_metrics(metrics, step=epoch)
        again.log_text("kept", "table.csv")
    assert history(run.run_id, "loss") == [(1, 1.0), (2, 1 / 2), (3, 1 / 3)]
    assert MlflowClient().get_run(run.run_id).info.status == "FINISHED"


def test_a_store_that_takes_nothing_is_named_before_anything_is_trained(store: str, door: Store) -> None:
    opened = open_run("run", open_store(""), {}, message=print)
    began = time.monotonic()
    with pytest.raises(RunError, match=r"doesn't accept values of the run .* fix it"), opened as run:
        door.shut = "before"
        run.log_text("a study", "study.yaml")
    assert time.monotonic() - began < 10


def test_a_slow_store_is_not_away(sqlite_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    log_text = MlflowClient.log_text

    def slow(*words: Any) -> None:
        time.sleep(0.5)
        log_text(*words)

    monkeypatch.setattr(MlflowClient, "log_text", slow)
    with open_run("run", open_store(""), {}, message=print, patience=0.1) as run:
        run.log_text("a model", "model.txt")
    assert MlflowClient().get_run(run.run_id).info.status == "FINISHED"


def test_what_the_store_refuses_ends_the_run_and_costs_nothing_else(sqlite_store: str) -> None:
    with pytest.raises(RunError, match="refused"), open_run("run", open_store(""), {}, message=print) as run:
        run.log_metrics({"loss": 1.0}, step=1)
        run.log_params({"x" * 300: "a name that is too long"})
        for epoch in range(2, 100):
            run.log_metrics({"loss": 1.0}, step=epoch)
            time.sleep(0.05)
    assert MlflowClient().get_run(run.run_id).info.status == "FAILED"
    assert [step for step, _ in history(run.run_id, "loss")][:2] == [1, 2]


def test_a_run_that_was_complete_ends_finished_whatever_interrupts_its_end(
    sqlite_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking_run, "EARLY_PATIENCE", 30)
    with pytest.raises(Terminated), open_run("run", open_store(""), {}, message=print) as run:
        run.complete()
        raise Terminated
    assert MlflowClient().get_run(run.run_id).info.status == "FINISHED"


@pytest.mark.parametrize(("fault", "status"), [(Terminated, "KILLED"), (RuntimeError, "FAILED")])
def test_a_fault_while_a_run_begins_ends_it(
    sqlite_store: str, monkeypatch: pytest.MonkeyPatch, fault: type[BaseException], status: str
) -> None:
    """The fault is a signal during its creation, or a thread that can't start."""
    create = MlflowClient.create_run

    def created(*words: Any, **how: Any) -> Any:
        run = create(*words, **how)
        if fault is Terminated:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            patch.setattr(threading.Thread, "start", Mock(side_effect=fault))
        return run

    experiment = open_store("")
    with monkeypatch.context() as patch, ending_signals(), pytest.raises(fault):
        patch.setattr(MlflowClient, "create_run", created)
        with open_run("run", experiment, {}, message=print):
            raise AssertionError
    assert [run.info.status for run in MlflowClient().search_runs([experiment])] == [status]


def test_a_resumed_run_does_not_keep_the_error_of_its_failed_attempt(sqlite_store: str) -> None:
    experiment = open_store("")
    with pytest.raises(ZeroDivisionError), open_run("run", experiment, {}, message=print) as run:
        raise ZeroDivisionError("a fault")
    assert "a fault" in MlflowClient().get_run(run.run_id).data.tags["effv2.error"]
    with open_run("run", experiment, {}, resumes=run.run_id, message=print) as run:
        run.complete()
    ended = MlflowClient().get_run(run.run_id)
    assert ended.info.status == "FINISHED" and not ended.data.tags["effv2.error"]


def test_a_run_that_was_created_twice_is_kept_once(sqlite_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of other processes stay, even if they began the same in the same millisecond."""
    create, others = MlflowClient.create_run, list[str]()

    def answer_lost(client: Any, experiment: str, start_time: int | None = None, **how: Any) -> Any:
        known = {name: value for name, value in how["tags"].items() if name != CREATION}
        others.append(create(client, experiment, 1, tags=known).info.run_id)
        create(client, experiment, 1, **how)
        return create(client, experiment, 1, **how)

    monkeypatch.setattr(MlflowClient, "create_run", answer_lost)
    begun = begin_run("study", "0", {"effv2.queue": "study#1"})
    assert {run.info.run_id for run in MlflowClient().search_runs(["0"])} == {begun.run_id, *others}


@pytest.mark.parametrize(("outcome", "status"), [({}, "KILLED"), ({OUTCOME: "complete"}, "FINISHED")])
def test_a_run_that_a_dead_process_left_open_is_ended(sqlite_store: str, outcome: dict[str, str], status: str) -> None:
    """The next command ends it. Runs of processes on other machines are not touched."""
    boot, space, _, started, unique = sender_process().split("/")
    dead = MlflowClient().create_run("0", tags={PROCESS: f"{boot}/{space}/1/not {started}/{unique}", **outcome})
    elsewhere = MlflowClient().create_run("0", tags={PROCESS: f"another/{space}/1/{started}/{unique}"})
    open_experiment("", print)
    assert MlflowClient().get_run(dead.info.run_id).info.status == status
    assert MlflowClient().get_run(elsewhere.info.run_id).info.status == "RUNNING"


def sender_process() -> str:
    from effv2.core.processes import this_process

    return this_process()


def test_a_run_that_a_living_process_works_on_is_left_unchanged(tmp_path: Path) -> None:
    options = CheckpointOptions(checkpoint_dir=str(tmp_path))
    first, second = (Checkpointer("run", options, {}, print) for _ in range(2))
    with first.lock(), pytest.raises(RunError, match="another process works on it"), second.lock():
        pass
    with second.lock():
        pass
