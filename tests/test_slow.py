"""The README's quick example under `mlflow run`. It takes minutes: run it with -m slow."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.conftest import ROOT


@pytest.mark.slow
def test_quick_default_is_quick_and_learns(sqlite_store: str) -> None:
    command = [sys.executable, "-m", "mlflow", "run", str(ROOT), "-e", "ablate", "-P", "variant=drop_one"]
    command += ["-P", f"storage={sqlite_store.replace('mlflow.db', 'optuna.db')}"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    started = time.monotonic()
    subprocess.run([*command, "--env-manager", "local"], env=environment, check=True, timeout=600)
    seconds = time.monotonic() - started
    runs = {run.data.tags["mlflow.runName"]: run.data for run in MlflowClient().search_runs(["0"])}
    default, other = runs["default, seed 0"], runs["drop_one, seed 0"]
    assert default.metrics["selected/test_accuracy"] > 0.9
    assert default.params["schedule.epochs"] == "6"  # machines differ in speed, so work is limited instead of time
    assert sum(run.metrics["time/total_train_seconds"] for run in (default, other)) > seconds / 2
