"""Commands under `mlflow run`: their parameters, the run that MLflow opens, and wrong input."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.projects._project_spec import load_project

from effv2.cli.main import ablate, evaluate_pretrained, hparam_check, report, search, train
from tests.conftest import ROOT, TINY_MODEL, all_runs, invoke

COMMANDS = {
    "train": train,
    "ablate": ablate,
    "hparam-check": hparam_check,
    "search": search,
    "evaluate-pretrained": evaluate_pretrained,
    "report": report,
}


@pytest.mark.parametrize("entry", ["train", "ablate"])
def test_mlflow_run_adopts_its_run(
    sqlite_store: str, tiny_study: Path, entry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tmp_path / "one.yaml"
    study.write_text(tiny_study.read_text().partition("arms:")[0] + TINY_MODEL)
    file = study if entry == "train" else tiny_study
    words = {"study": str(file), "epochs": "1", "image-size": "9", "lr": "1e-3"}
    alone = entry == "train"  # with its model; the runs of a study log theirs in the same way
    words |= {} if alone else {"storage": f"sqlite:///{tmp_path / 'optuna.db'}", "log-model": "none"}
    command = [sys.executable, "-m", "mlflow", "run", str(ROOT), "-e", entry, "--env-manager", "local"]
    for name, value in words.items():
        command += ["-P", f"{name.replace('-', '_')}={value}"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    # Repeat the command, with an open run as `mlflow run` prepares it.
    opened = MlflowClient().create_run("0", tags={"mlflow.source.name": "https://token@h/project"})
    monkeypatch.setenv("MLFLOW_RUN_ID", opened.info.run_id)
    assert (
        invoke(COMMANDS[entry], *(word for name, value in words.items() for word in (f"--{name}", value))).exit_code
        == 0
    )
    adopted, *children, again = all_runs()
    assert again.data.tags["effv2.continues"] == adopted.info.run_id
    assert again.data.tags["mlflow.source.name"] == "https://***@h/project"
    assert adopted.data.tags["mlflow.project.entryPoint"] == entry
    assert len(children) == (0 if alone else 2) and bool(adopted.outputs and adopted.outputs.model_outputs) == alone
    assert adopted.data.tags["effv2.study"] == "tiny"
    for run in (adopted, *children):
        assert run.info.status == "FINISHED"
    for run in children or [adopted]:
        assert run.data.params["schedule.epochs"] == "1" and run.data.params["optimiser.lr"] == "0.001"


def test_mlflow_run_fails_on_wrong_input_before_training(sqlite_store: str) -> None:
    command = [sys.executable, "-m", "mlflow", "run", str(ROOT), "-e", "train", "--env-manager", "local"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [*command, "-P", "variant=drop_two"], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode != 0
    assert "--variant drop_two: no such variant; did you mean 'drop_one'?" in done.stderr + done.stdout
    assert [run.info.status for run in all_runs()] == ["FAILED"]


def test_a_password_that_mlflow_run_has_logged_is_reported(sqlite_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", opened := MlflowClient().create_run("0").info.run_id)
    result = invoke(ablate, "--storage", "postgresql://me:secret@127.0.0.1:9/db")
    assert result.exit_code == 2 and "secret" not in result.output and result.stderr.count("\n") == 1
    for said in ("--storage postgresql://me:***@", f"runs delete --run-id {opened}`", "PGPASSWORD"):
        assert said in result.stderr
    for words in (["--data-dir", "https://me:secret@h/x"], ["--storag", "postgresql://me:secret@h/db"]):
        result = invoke(train, *words)
        assert result.exit_code == 2 and "secret" not in result.output and f"--run-id {opened}`" in result.stderr
    assert "can't be used" in invoke(ablate, "--storage", "postgresql://me@127.0.0.1:9/db").stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_parameters_of_mlflow_run_are_the_options_of_the_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow passes on every parameter by its name, even an empty one."""
    entry_point = load_project(str(ROOT)).get_entry_point(name)  # type: ignore[no-untyped-call]
    options = [str(option.name) for option in COMMANDS[name].params]
    words = shlex.split(entry_point.compute_command(dict.fromkeys(options, ""), None))
    assert words[:2] == ["python", f"entry_points/{name.replace('-', '_')}.py"] and (ROOT / words[1]).is_file()
    with COMMANDS[name].make_context(name, words[2:]) as context:
        assert context.params.keys() == set(options) and not any(context.params.values())
