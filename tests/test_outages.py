"""Outages of a real MLflow server, and trainers killed with it: every metric arrives exactly once."""

from __future__ import annotations

import shutil
import signal
import sqlite3
import statistics
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner
from mlflow import MlflowClient
from mlflow.entities import Metric, Run

from effv2.cli.main import train
from tests.conftest import ROOT, TINY_TABLE, running
from tests.forks import Forked
from tests.servers import Failing, Server

STUDY = f"""
name: outage
config:
  data: {{image_size: 16, per_class: 40}}
  model: {{variant: tiny, table: {TINY_TABLE}}}
  schedule: {{epochs: EPOCHS}}
  execution: {{device: cpu, precision: fp32}}
"""
long = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def server(template_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    database = shutil.copy(template_database, tmp_path / "server.db")
    with closing(sqlite3.connect(database)) as connection, connection:  # as a server creates it
        connection.execute("UPDATE experiments SET artifact_location = 'mlflow-artifacts:/0'")
    server = Server(f"sqlite:///{database}", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("EFFV2_CACHE", str(tmp_path / "cache"))
    server.start()
    yield server
    server.stop()


def make_study(folder: Path, epochs: int) -> Path:
    study = folder / "outage.yaml"
    study.write_text(STUDY.replace("EPOCHS", str(epochs)))
    return study


def only_run() -> Run | None:
    runs = MlflowClient().search_runs(["0"])
    assert len(runs) < 2
    return runs[0] if runs else None


def history(name: str) -> list[Metric]:
    run = only_run()
    return list(MlflowClient().get_metric_history(run.info.run_id, name)) if run else []


def wait_for_epoch(epoch: int, process: Forked) -> None:
    while len(history("train/loss")) < epoch:
        assert process.poll() is None, process.rest()
        time.sleep(0.3)  # each request costs the trainer and the server time


def check_complete(epochs: int) -> None:
    """Check that every metric of every epoch is logged once, and that the run is finished."""
    run = only_run()
    assert run is not None and run.info.status == "FINISHED"
    of_epochs = [name for name in run.data.metrics if name.startswith(("train/", "test/", "val/", "time/epoch"))]
    assert len(of_epochs) == 7
    for name in of_epochs:
        assert [each.step for each in history(name)] == list(range(1, epochs + 1)), name
    assert len(history("best/test_accuracy")) == 1
    assert len(run.outputs.model_outputs if run.outputs else []) == 1


@pytest.mark.parametrize(("seconds", "epochs"), [(3, 60), pytest.param(60, 900, marks=long)])
def test_an_outage_costs_no_metric_and_no_time(server: Server, tmp_path: Path, seconds: float, epochs: int) -> None:
    with running(ROOT / "entry_points" / "train.py", "--study", make_study(tmp_path, epochs)) as process:
        wait_for_epoch(epochs // 6, process)
        began = time.time() * 1000
        server.stop()
        errors = process.until("doesn't accept values")
        time.sleep(seconds)
        ended = time.time() * 1000
        server.start()
        errors += process.rest()
    assert process.returncode == 0, errors
    assert errors.count("doesn't accept values") == 1 and errors.count("answers again") == 1
    check_complete(epochs)
    times = history("time/epoch_seconds")
    before = [each.value for each in times if each.timestamp < began][2:]
    during = [each.value for each in times if began < each.timestamp < ended]
    assert len(during) > 3
    if seconds >= 60:
        assert statistics.median(during) < 1.03 * statistics.median(before)


@pytest.mark.parametrize(("seconds", "epochs"), [(1, 60), pytest.param(60, 900, marks=long)])
def test_a_trainer_that_dies_with_the_server_loses_nothing(
    server: Server, tmp_path: Path, seconds: int, epochs: int
) -> None:
    study = make_study(tmp_path, epochs)
    with running(ROOT / "entry_points" / "train.py", "--study", study) as process:
        wait_for_epoch(epochs // 6, process)
        server.stop()
        time.sleep(seconds)
        assert process.poll() is None
    server.start()
    result = CliRunner().invoke(train, ["--study", str(study)], catch_exceptions=False)
    assert result.exit_code == 0 and "resuming the run" in result.stderr
    check_complete(epochs)


def test_a_server_that_fails_in_a_third_of_all_requests_gets_everything_once(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, failing = make_study(tmp_path, 30), Failing(server.port, 0.3)
    with closing(failing.socket):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{failing.server_port}")
        with running(ROOT / "entry_points" / "train.py", "--study", study) as process:
            process.until("epoch 12/")
            process.send_signal(signal.SIGTERM)
            said = process.rest()
        assert process.returncode == 143, said
        with running(ROOT / "entry_points" / "train.py", "--study", study) as process:
            said = process.rest()
        assert process.returncode == 0 and "resuming the run" in said, said
        failing.shutdown()
    assert set(Failing.FAULTS) <= failing.failed.keys()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    check_complete(30)
