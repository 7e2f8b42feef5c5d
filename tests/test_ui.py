"""`effv2 ui` shows the comparison of the newest study, on a server that it starts or on a running one."""

from __future__ import annotations

import signal
from pathlib import Path
from urllib.request import urlopen

import psutil
import pytest
from mlflow import MlflowClient

from effv2.cli.main import main
from effv2.tracking.ui import comparison
from effv2.tracking.writer import TrackedRun, page_of, run_address
from tests.conftest import invoke, running
from tests.servers import free_port


def make_study(experiment: str = "0") -> str:
    run = MlflowClient().create_run(experiment)
    TrackedRun(run.info.run_id, experiment).log_params({"study.kind": "ablate"})
    with TrackedRun(run.info.run_id, experiment).new_artifacts() as folder:
        (folder / "report.html").write_text("the comparison")
    return str(run.info.run_id)


def test_it_serves_the_comparison_until_it_is_told_to_end(sqlite_store: str) -> None:
    study = make_study()
    MlflowClient().create_run("0")  # a newer run without a study
    port = free_port()
    with running("-m", "effv2", "ui", "--port", str(port)) as process:
        address = process.until(r"http://.*\n").strip()
        page = page_of("0", study, "report.html")
        assert address.endswith(f"http://127.0.0.1:{port}/{page}") and "workflowType=machine_learning" in page
        with urlopen(f"http://127.0.0.1:{port}/get-artifact?path=report.html&run_uuid={study}") as answer:
            assert answer.read() == b"the comparison"
        process.send_signal(signal.SIGINT)
        process.rest()
    assert process.returncode == 0
    with pytest.raises(OSError):
        urlopen(f"http://127.0.0.1:{port}/health")


def test_a_finished_run_is_shown_and_for_one_of_a_study_its_study(sqlite_store: str) -> None:
    study, client = make_study(), MlflowClient()
    for tags, shown in (({"mlflow.parentRunId": study}, study), ({}, "")):
        run = client.create_run("0", tags=tags).info.run_id
        client.set_terminated(run)
        assert f"/runs/{shown or run}" in comparison("")


def test_without_runs_or_with_another_server_it_says_so(
    empty_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = invoke(main, "ui")
    assert result.exit_code == 2 and "holds no runs yet" in result.stderr
    assert invoke(main, "ui", "--experiment", "nobody's").exit_code == 2
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none.db")
    nowhere = invoke(main, "ui")
    assert nowhere.exit_code == 2 and "there is no such file" in nowhere.stderr and not list(tmp_path.glob("*.db"))
    assert run_address("R", "0").endswith("see it with: effv2 ui")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000/")
    assert run_address("R", "7") == "http://server:5000/#/experiments/7/runs/R?workflowType=machine_learning"


def test_an_invalid_port_and_a_dead_server_are_named(sqlite_store: str) -> None:
    assert "70000 is not in the range" in invoke(main, "ui", "--port", "70000").stderr
    make_study()
    with running("-m", "effv2", "ui", "--port", str(free_port())) as process:
        process.until(r"http://.*\n")
        for each in reversed(psutil.Process(process.pid).children(recursive=True)):
            each.kill()
        assert "MLflow's UI has ended" in process.rest()
    assert process.returncode == 1
