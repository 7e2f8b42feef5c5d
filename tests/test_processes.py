"""Processes and signals: how signals end commands, and which processes are alive."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from effv2.api.console import ConsoleReporter
from effv2.cli.main import ablate
from effv2.core import processes
from effv2.core.errors import Terminated
from effv2.core.processes import ending_signals, is_alive, is_gone, this_process, uninterrupted
from effv2.studies.storage import open_storage
from effv2.tracking.sender import Sender
from tests.conftest import ROOT, all_runs, invoke, running


def test_sigterm_leaves_no_run_running(sqlite_store: str, tiny_study: Path) -> None:
    tiny_study.write_text(tiny_study.read_text().replace("epochs: 2", "epochs: 100000"))
    with running(ROOT / "entry_points" / "ablate.py", "--study", tiny_study) as process:
        while not any("train/loss" in run.data.metrics for run in all_runs()):
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        errors = process.rest()
    assert process.returncode == 143 and "KILLED" in errors and "Traceback" not in errors
    assert [run.info.status for run in all_runs()] == ["KILLED", "KILLED"]


class Swallows:
    """A signal arrives in its destructor, where Python drops the exception."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("looks", ["a step", "a wait for the store", "a call of the queue", "progress"])
def test_a_signal_that_python_swallowed_ends_what_follows(sqlite_store: str, tmp_path: Path, looks: str) -> None:
    run = MlflowClient().create_run("0")
    storage = open_storage(f"sqlite:///{tmp_path / 'optuna.db'}")

    def look() -> None:
        if looks == "a step":
            with uninterrupted():
                pass
        elif looks == "a wait for the store":
            with closing(Sender(run.info.run_id, print, resumed=False)) as sender:
                sender.put(lambda: time.sleep(0.5))
                sender.flush(60)
        elif looks == "a call of the queue":
            storage.retry(lambda: None)
        else:
            with ConsoleReporter() as reporter:
                reporter.step(1, 1, 2, 3.0)

    with ending_signals():
        Swallows()
        with pytest.raises(Terminated):
            look()
        try:
            raise Terminated
        except Terminated:
            look()  # nothing is interrupted once the process is ending
    look()


@pytest.mark.parametrize(("seconds", "code"), [(0.0, 0), (0.8, -signal.SIGTERM)])
def test_a_second_signal_ends_a_process_that_ignores_the_first(seconds: float, code: int) -> None:
    """A signal that comes with the first one has no effect."""
    script = (
        "import os, signal, time\nfrom contextlib import suppress\nfrom effv2.core.processes import ending_signals\n"
        "with ending_signals():\n    for pause in (0, SECONDS):\n        time.sleep(pause)\n"
        "        with suppress(BaseException):\n            os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    with running("-c", script.replace("SECONDS", str(seconds))) as process:
        process.rest()
    assert process.returncode == code


def test_a_signal_waits_for_the_end_of_the_outermost_block() -> None:
    done = False
    with ending_signals(), pytest.raises(Terminated), uninterrupted():
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGTERM)
        done = True
    assert done


def test_a_second_signal_does_not_interrupt_the_update_of_the_status(
    sqlite_store: str, tiny_study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under `mlflow run`, a SIGTERM follows Ctrl-C."""
    from mlflow.tracking.client import MlflowClient as Client

    from effv2.training import loop

    ended, signals = Client.set_terminated, iter([signal.SIGTERM])

    def signalled_again(*args: Any, **kwargs: Any) -> None:
        for number in signals:
            os.kill(os.getpid(), number)
        ended(*args, **kwargs)

    monkeypatch.setattr(processes, "TOGETHER_SECONDS", 60)  # for slow machines
    monkeypatch.setattr(Client, "set_terminated", signalled_again)
    monkeypatch.setattr(loop, "evaluate", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert invoke(ablate, "--study", tiny_study).exit_code == 130
    assert [run.info.status for run in all_runs()] == ["KILLED", "KILLED"]


@pytest.mark.parametrize("fails", ["release", "deserted"])
def test_a_storage_that_a_signal_broke_leaves_no_run_running(
    sqlite_store: str, tiny_study: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    from effv2.studies.queue import Queue
    from effv2.training import loop

    def break_storage(*_: Any) -> None:
        monkeypatch.setattr(Queue, fails, broken)
        os.kill(os.getpid(), signal.SIGTERM)

    def broken(_: Queue) -> None:
        raise RuntimeError("a session of SQLAlchemy that was interrupted")

    monkeypatch.setattr(loop, "evaluate", break_storage)
    assert invoke(ablate, "--study", tiny_study).exit_code == 143
    assert [run.info.status for run in all_runs()] == ["KILLED", "KILLED"]


@pytest.mark.parametrize("pid", ["x", "-1", "1e3", "9" * 30, ""])
def test_a_malformed_process_tag_stops_no_command(pid: str) -> None:
    *where, _, started, unique = this_process().split("/")
    assert is_alive("/".join([*where, pid, started, unique])) is None


def test_ignored_hangup_stays_ignored(sqlite_store: str, tiny_study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell ignores it under nohup."""
    from effv2.training import loop
    from effv2.training.evaluation import evaluate

    evaluated = evaluate

    def hang_up(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGHUP)
        return evaluated(*args)

    monkeypatch.setattr(loop, "evaluate", hang_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert invoke(ablate, "--study", tiny_study, "--log-model", "none").exit_code == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture(params=["linux", "macos"])
def _processes(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Find processes with /proc, or without it as on macOS."""
    caches = (processes.this_process, processes._where)
    for cached in caches:
        cached.cache_clear()
    if request.param == "macos":
        monkeypatch.setattr(processes, "PROC", tmp_path / "nowhere")
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.usefixtures("_processes")
def test_processes_of_this_machine_are_known_to_live_or_not() -> None:
    assert not is_gone(this_process())
    boot, space, _, started, unique = this_process().split("/")
    with subprocess.Popen([sys.executable, "-c", "pass"]) as process:
        process.wait()
    assert is_gone(f"{boot}/{space}/{process.pid}/{started}/{unique}")
    assert is_gone(f"{boot}/{space}/{os.getpid()}/1/{unique}")  # another process had this number before
    assert not is_gone(f"another machine/{space}/{process.pid}/{started}/{unique}")
    assert not is_gone(unique)
