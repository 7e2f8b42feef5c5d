"""Stores, data and tiny networks for the tests. EFFV2_TEST_DATA names the folder of real data."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import settings
from PIL import Image

from effv2.config.schema import DataConfig, TrainConfig
from tests.forks import COMMANDS, LONGEST_LIFE, STARTED, Forked, forks

if TYPE_CHECKING:
    from mlflow.entities import Run

    from effv2.data.dataset import Dataset

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # the processes of the suite share the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

ROOT = Path(__file__).parents[1]
settings.register_profile("effv2", deadline=None)  # other processes may slow the machine down
settings.load_profile("effv2")
# The slowest test files, the slowest first. They start first, so that no process ends with one of them.
LONGEST = [
    f"test_{name}"
    for name in ("engine", "pretrained", "report", "search", "resume", "outages", "commands", "mlflow_run")
]
TINY_TABLE = "F 1 3 1 8 8 1 / M 2 3 2 8 16 2"
OTHER_TINY_TABLE = "M 1 3 1 8 8 1 / M 2 3 2 8 16 1"
TINY_MODEL = f"  model: {{variant: tiny, table: {TINY_TABLE}}}\n"  # the last line of a study's `config`
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
    gc.freeze()  # the garbage collector skips what was imported


@pytest.hookimpl(trylast=True)  # after the deselection
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Spread the slowest files: --dist worksteal cuts the tests into equal parts, and each begins with some."""
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
    """Return the tiny configuration with updated groups."""
    merged: dict[str, Any] = {}
    for name in TINY.keys() | groups.keys():
        new = groups.get(name, {})
        merged[name] = {**TINY.get(name, {}), **new} if isinstance(new, dict) else new
    return TrainConfig.model_validate(merged)


def all_runs() -> list[Run]:
    from mlflow import MlflowClient

    client = MlflowClient()
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(experiments, order_by=["start_time ASC"]))


def invoke(command: Any, *words: str | Path) -> Result:
    return CliRunner().invoke(command, [str(word) for word in words], catch_exceptions=False)


@contextmanager
def running(*words: str | Path) -> Iterator[Forked]:
    """Run Python with these words. Kill it at the end if it still runs, so that no failed test waits for it."""
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
    """Isolate the tests from the user's caches, MLflow settings and ignored signals."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # the suite runs in the background of a shell
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFV2_CACHE", str(tmp_path_factory.mktemp("cache")))
        for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
            patch.delenv(name)
        patch.setenv("MLFLOW_EXPERIMENT_ID", "0")  # every store has it
        yield
    for each in STARTED:
        each.close()


@pytest.fixture(scope="session")
def template_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a migrated database once. Copying it takes milliseconds."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("template")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # the default experiment's artifacts go below the working directory
        MlflowClient(f"sqlite:///{folder / 'mlflow.db'}").search_experiments()
    return folder / "mlflow.db"


@pytest.fixture
def sqlite_store(template_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Point MLflow at an empty sqlite store in the test's folder, and work there."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    shutil.copy(template_database, tmp_path / "mlflow.db")
    yield from _use_store(uri, tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def empty_database(template_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copy(template_database, tmp_path_factory.mktemp("empty") / "mlflow.db"))


@pytest.fixture
def empty_store(empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Point MLflow at an empty store that several tests share. They create nothing in it."""
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
    """Write class folders of small random images in several sizes and modes; return `root`."""
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


def seeded_weights(path: Path, network: str, seed: int = 0) -> Path:
    """Save the state dict of a freshly initialised network, as the published files hold it."""
    import torch
    from torchvision import models

    torch.manual_seed(seed)
    torch.save(models.get_model(network, weights=None).state_dict(), path)
    return path


@pytest.fixture
def few_images(tmp_path: Path) -> Path:
    """Write two classes of four images. Half of them have names of ImageNet's validation images."""
    generator = np.random.default_rng(0)
    for folder in ("n01440764", "church"):
        for index in range(4):
            name = f"ILSVRC2012_val_{index:08d}" if index % 2 else f"n01440764_{index}"
            path = tmp_path / "images" / folder / f"{name}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            height, width = generator.integers(30, 90, 2)
            Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path, "JPEG")
    return tmp_path / "images"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give torch an empty cache and no network access."""
    import torch

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(urllib.request, "_opener", None)  # urlopen reads the proxies once per process
    return tmp_path / "hub" / "checkpoints"


def load_folder(root: Path, **values: Any) -> Dataset:
    from effv2.data.dataset import load_dataset

    return load_dataset(DataConfig(dataset="folder", dir=str(root), image_size=8, **values))


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EFFV2_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_tree(root: Path, *folders: str, images: int = 4) -> Path:
    """Write folders of different small random images. A name that ends in .txt or .csv is that of a text file."""
    generator = np.random.default_rng(1)
    for name in folders:
        if name.endswith((".txt", ".csv")):
            (root / name).write_text("text")
            continue
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(images):
            pixels = generator.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{Path(name).name}{number}.png")
    return root


def within(*parts: str) -> tuple[str, ...]:
    return tuple(f"{part}/{name}" for part in parts for name in ("ant", "bee", "cow"))
