"""Stores, data and tiny networks for the tests. Real data is found through EFFV2_TEST_DATA."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from effv2.config.schema import TrainConfig
from tests.forks import COMMANDS, LONGEST_LIFE, STARTED, Forked, forks

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # processes of the suite divide the cores among them
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

ROOT = Path(__file__).parents[1]
settings.register_profile("effv2", deadline=None)  # another process may hold the machine for a moment
settings.load_profile("effv2")
# Files of tests that take long, the longest first: who begins with them doesn't end with one alone.
LONGEST = [f"test_{name}" for name in ("engine", "pretrained", "report", "search", "resume", "outages", "commands")]
TINY_TABLE = "F 1 3 1 8 8 1 / M 2 3 2 8 16 2"
OTHER_TINY_TABLE = "M 1 3 1 8 8 1 / M 2 3 2 8 16 1"
TINY: dict[str, dict[str, Any]] = {
    "data": {"image_size": 8, "per_class": 12},
    "model": {"variant": "tiny", "table": TINY_TABLE},
    "optimiser": {"batch_size": 32},
    "schedule": {"epochs": 2},
    "execution": {"device": "cpu", "precision": "fp32"},
}
TINY_STUDY = f"""
name: tiny
config:
  data: {{image_size: 8, per_class: 12}}
  schedule: {{epochs: 2}}
  execution: {{device: cpu, precision: fp32}}
arms:
  default: {{model: {{variant: tiny, table: {TINY_TABLE}}}}}
  other: {{model: {{variant: other, table: {OTHER_TINY_TABLE}}}}}
"""


def pytest_collection_finish() -> None:
    gc.freeze()  # what was imported needn't be looked through again and again


@pytest.hookimpl(trylast=True)  # once those that aren't wanted are out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put some of the longest files first in each of the equal parts into which --dist worksteal cuts the tests."""
    files = {name: [item for item in items if item.path.stem == name] for name in LONGEST}
    rest = iter([item for item in items if item.path.stem not in files])
    processes, left = int(workers or 1), len(items)
    items.clear()
    for number in range(processes):
        first = [item for name in LONGEST[number::processes] for item in files[name]]
        size = left // (processes - number)
        items += [*first, *islice(rest, max(0, size - len(first)))]
        left -= size
    items += rest


def tiny_config(**groups: Any) -> TrainConfig:
    """Return the tiny configuration with whole groups updated."""
    merged: dict[str, Any] = {}
    for name in TINY.keys() | groups.keys():
        new = groups.get(name, {})
        merged[name] = {**TINY.get(name, {}), **new} if isinstance(new, dict) else new
    return TrainConfig.model_validate(merged)


@contextmanager
def running(*words: str | Path) -> Iterator[Forked]:
    """Run Python with these words; it is killed if it still runs at the end, so that no failed test waits for it."""
    reading, writing = os.pipe()
    with os.fdopen(reading, encoding="utf-8") as said:
        try:
            process = forks(*COMMANDS).start([*map(str, words)], said, writing, os.environ)
        finally:
            os.close(writing)
        watch = threading.Timer(LONGEST_LIFE, process.show_where)
        watch.start()
        try:
            yield process
        finally:
            if watch.finished.is_set():
                print(f"it ran for {LONGEST_LIFE} seconds: {said.read()}")
            watch.cancel()
            process.kill()


@pytest.fixture(autouse=True, scope="session")
def _isolated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep caches, MLflow's settings and ignored signals of the user out of the tests."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a suite in the background of a shell
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFV2_CACHE", str(tmp_path_factory.mktemp("cache")))
        for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
            patch.delenv(name)
        patch.setenv("MLFLOW_EXPERIMENT_ID", "0")  # which every store has
        yield
    for each in STARTED:
        each.close()


@pytest.fixture(scope="session")
def template_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a migrated database once; a copy takes milliseconds."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("template")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # the default experiment's artifacts go below the working directory
        MlflowClient(f"sqlite:///{folder / 'mlflow.db'}").search_experiments()
    return folder / "mlflow.db"


@pytest.fixture
def sqlite_store(template_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Point MLflow at an empty sqlite store in the test's own folder, which becomes the working directory."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    shutil.copy(template_database, tmp_path / "mlflow.db")
    yield from _use_store(uri, tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def empty_database(template_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copy(template_database, tmp_path_factory.mktemp("empty") / "mlflow.db"))


@pytest.fixture
def empty_store(empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Point MLflow at a store that tests share, since nothing is created in it; opening one takes a moment."""
    yield from _use_store(f"sqlite:///{empty_database}", tmp_path, monkeypatch)


@pytest.fixture
def file_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Point MLflow at an empty file store."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    yield from _use_store(f"file:{tmp_path / 'runs'}", tmp_path, monkeypatch)


@pytest.fixture(params=["sqlite", "file"])
def store(request: pytest.FixtureRequest) -> str:
    """Run the test on both local stores."""
    uri: str = request.getfixturevalue(f"{request.param}_store")
    return uri


def _use_store(uri: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    import mlflow

    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    yield uri
    while mlflow.active_run():
        mlflow.end_run()


@pytest.fixture
def tiny_study(tmp_path: Path) -> Path:
    """Write a study of two tiny arms on digits."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_STUDY)
    return path


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder of real data sets."""
    folder = os.environ.get("EFFV2_TEST_DATA")
    if not folder:
        pytest.skip("EFFV2_TEST_DATA is not set: no real images to test with")
    return Path(folder)


def make_image_tree(root: Path, parts: tuple[str, ...] = ("",), classes: int = 3, images: int = 6) -> Path:
    """Write a tree of class folders of small random images of several sizes and modes; return `root`."""
    generator = np.random.default_rng(0)
    modes = ("RGB", "L", "RGBA", "P")
    for part in parts:
        for label in range(classes):
            folder = root / part / f"class {label}"
            folder.mkdir(parents=True)
            for index in range(images):
                height, width = generator.integers(9, 30, 2)
                pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
                mode = modes[index % len(modes)]
                suffix = "png" if mode in ("RGBA", "P") else "jpg"
                Image.fromarray(pixels).convert(mode).save(folder / f"{index}.{suffix}")
    return root
