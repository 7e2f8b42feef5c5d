"""Packages: the wheel runs in an empty folder, and the notebook runs from its first cell to its last."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, all_runs

IN_GIT = ["git", "-C", str(ROOT), "ls-files"]
SHORT = {"seeds": [0, 1, 2], "epochs": 1, "image_size": 8, "per_class": 12, "device": "cpu", "precision": "fp32"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy, since setuptools leaves files in its source."""
    pytest.importorskip("setuptools", "77")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    tracked = subprocess.run(IN_GIT, capture_output=True, text=True, check=True).stdout.splitlines()
    subprocess.run(["cp", "-Pr", "--parents", *tracked, str(source)], cwd=ROOT, check=True)
    words = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)]
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_a_wheel_runs_its_studies_in_an_empty_folder(wheel: Path, tmp_path: Path, sqlite_store: str) -> None:
    place, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
        names = {name for name in archive.namelist() if not name.endswith("/")}
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "effv2").rglob("*") if path.is_file()}
    files |= {f"effv2/sweeps/{path.name}" for path in (ROOT / "sweeps").glob("*.yaml")}
    assert {name for name in files if "__pycache__" not in name} <= names
    assert not [name for name in names if name.startswith("tests")]
    words = ["--epochs", "1", "--image-size", "8", "--per-class", "4", "--device", "cpu", "--log-model", "none"]
    command = [sys.executable, "-m", "effv2", "ablate", "--study", "ablate-digits", "--variant", "half_layers", *words]
    environment = os.environ | {"PYTHONPATH": str(place)}
    done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "half_layers against default" in done.stdout, done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "effv2", "report", "--export", "report"],
        cwd=empty,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and (empty / "report" / "report.html").is_file(), done.stderr


def test_the_notebook_runs_from_its_first_cell_to_its_last(sqlite_store: str, tmp_path: Path) -> None:
    """With a shorter protocol, and without the installation."""
    cells = json.loads((ROOT / "notebooks" / "ablate.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert sources.pop(0) == "%pip install -q effv2" and not any(cell.get("outputs") for cell in cells)
    known: dict[str, Any] = {}
    for source in sources:
        exec(compile(source, "ablate.ipynb", "exec"), known)  # noqa: S102
        if source.startswith("PROTOCOL"):
            known["PROTOCOL"] = SHORT
    assert len(known["study"].verdicts) == 1 and (tmp_path / "report" / "report.html").is_file()
    assert len([run for run in all_runs() if "mlflow.parentRunId" in run.data.tags]) == 6
