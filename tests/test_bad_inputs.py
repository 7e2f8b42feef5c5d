"""Generated bad inputs: each gives one sentence or is harmless. None gives a traceback, a hang, a run or a file."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from PIL import Image

from effv2.cli.main import ablate, train
from effv2.config.schema import DATASETS, DataConfig
from effv2.core.errors import InputError, RunError
from effv2.data.dataset import load_dataset
from effv2.data.folders import Source
from effv2.data.images import LabelledImages
from effv2.training.evaluation import EPOCH_METRICS, Evaluation, epoch_metrics
from tests.conftest import TINY_STUDY

BAD_VALUES = ["x", "-1", "nan", "inf", "1e99", "null", "[]", "\x00", "ä" * 300, "../..", "0.5.5", "~", "$HOME"]
PIECES = [b"", b"\n  ", b": ", b"- x", b"{", b"}", b"&a *a", b"\xff\x00", b"1e400", b"!!python/x", b"\t"]
OPTIONS = [option.name or "" for option in train.params if option.name not in ("study", "experiment")]
generated = settings(max_examples=250, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Reached(RunError):
    """The input was valid: training would begin."""


@pytest.fixture
def no_training(sqlite_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise an exception where training would begin."""
    from effv2.run import run
    from effv2.studies import engine

    def reached(*_: Any, **__: Any) -> None:
        raise Reached("reached")

    monkeypatch.setattr(run.RunSpec, "open_run", reached)
    monkeypatch.setattr(engine, "_open", reached)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "cache" not in path.parts}


def check(command: Any, words: list[str], folder: Path) -> None:
    """Check that a command ends with one sentence and creates nothing."""
    before = files(folder)
    result = CliRunner().invoke(command, words, catch_exceptions=False)
    assert result.exit_code in (1, 2), result.output
    *_, last = result.stderr.strip().splitlines()
    assert (last.startswith("Error: ") and len(last) > 20) or "reached" in last, result.stderr
    assert "Traceback" not in result.output
    if "reached" not in last:
        assert files(folder) == before
    assert not MlflowClient().search_runs(["0"])


@generated
@given(st.dictionaries(st.sampled_from(OPTIONS), st.sampled_from(BAD_VALUES), min_size=1, max_size=3))
def test_values_of_options(no_training: None, tmp_path: Path, values: dict[str, str]) -> None:
    check(train, [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", value)], tmp_path)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Draw a damaged copy: pieces are cut out, inserted or overwritten."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at, length = draw(st.integers(0, len(content))), draw(st.integers(0, 30))
        new = draw(st.sampled_from(PIECES))
        content[at : at + length] = new
    return bytes(content)


@generated
@given(content=damaged(TINY_STUDY.encode()))
def test_study_files(no_training: None, tmp_path: Path, content: bytes) -> None:
    study = tmp_path / "study.yaml"
    study.write_bytes(content)
    check(ablate, ["--study", str(study)], tmp_path)


def image_bytes(kind: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a set of two classes with four images each."""
    root = tmp_path_factory.mktemp("set")
    for label in ("a", "b"):
        (root / label).mkdir()
        for number in range(4):
            (root / label / f"{number}.png").write_bytes(image_bytes("PNG"))
    return root


def load(root: Path) -> None:
    with suppress(InputError):
        load_dataset(DataConfig(dataset="folder", dir=str(root), image_size=8))


@generated
@given(data=st.data())
def test_bytes_of_images(tree: Path, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM"]))
    (tree / "a" / "damaged.png").write_bytes(data.draw(damaged(image_bytes(kind))))
    load(tree)


def own_source(**changes: Any) -> Source:
    images: dict[str, Any] = {"items": np.zeros((4, 8, 8), np.uint8), "labels": np.arange(4) % 2, "ids": tuple("abcd")}
    return Source("", ("x", "y"), LabelledImages(**(images | changes)))


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: dict[str, Any]()["key"], "KeyError: 'key'"),
        (lambda: None, "AttributeError"),
        (lambda: own_source(labels=np.arange(4)), "labels must be whole numbers .* from 0 to 1"),
        (lambda: own_source(labels=np.zeros(4)), "labels must be whole numbers"),
        (lambda: own_source(ids=()), "4 images, 4 labels, 0 ids"),
        (lambda: own_source(items=np.zeros(0, np.uint8), labels=np.arange(0), ids=()), "0 images"),
        (lambda: own_source(items=np.zeros((4, 8, 8))), "paths or bytes"),
    ],
)
def test_a_faulty_data_set_of_the_user_is_named(
    monkeypatch: pytest.MonkeyPatch, made: Callable[[], Any], said: str
) -> None:
    monkeypatch.setitem(DATASETS._functions, "mine", lambda config: made())
    with pytest.raises(InputError, match=rf"^data\.dataset mine: .*{said}.*; correct it\.$"):
        load_dataset(DataConfig(dataset="mine"))
    monkeypatch.setitem(DATASETS._functions, "mine", lambda config: own_source())
    assert load_dataset(DataConfig(dataset="mine", validation_fraction=0, image_size=8)).classes == ("x", "y")


@pytest.mark.parametrize("measure", [lambda found: found.nothing, lambda found: None, lambda found: found.logits])
def test_a_faulty_metric_of_the_user_is_named(monkeypatch: pytest.MonkeyPatch, measure: Any) -> None:
    monkeypatch.setitem(EPOCH_METRICS, "mine", measure)
    with pytest.raises(RunError, match=r"The metric 'mine' of EPOCH_METRICS failed \(\w+: .*\); correct it\."):
        epoch_metrics(Evaluation(0.5, 0.5, torch.zeros(2, 3), torch.zeros(2)))


NAMES = st.sampled_from(["a", "b", "train", "test", "val", ".hidden", "x.png", "y.jpg", "\udcff", "c d"])


@generated
@given(data=st.data())
def test_trees_of_folders(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    root = tmp_path_factory.mktemp("tree")
    places = [root]
    for _ in range(data.draw(st.integers(0, 12))):
        path = data.draw(st.sampled_from(places)) / data.draw(NAMES)
        kind = data.draw(st.sampled_from(["folder", "folder", "image", "image", "link", "broken", "pipe"]))
        with suppress(OSError):
            if kind == "folder":
                path.mkdir()
                places.append(path)
            elif kind == "pipe":
                os.mkfifo(path)
            elif kind == "link":
                path.symlink_to(data.draw(st.sampled_from([root, path, root / "a", Path("..")])))
            elif not path.exists():
                path.write_bytes(image_bytes("PNG") if kind == "image" else b"no image")
    load(root)


@pytest.fixture
def thirty(tmp_path: Path, tree: Path) -> Iterator[list[str]]:
    """Return thirty wrong command lines."""
    loop = tmp_path / "loop"
    loop.mkdir()
    (loop / "a").mkdir()
    (loop / "b").symlink_to(loop)
    study = tmp_path / "study.yaml"
    study.write_text(TINY_STUDY.replace("image_size", "image size"))
    values, files = ("x", "-1", "nan", "1e99"), (study, tree, "/dev/null", "/nowhere")
    words = [f"train --{name} {value}" for name in ("lr", "epochs", "image-size", "seed") for value in values]
    words += [f"{name} --study {file}" for name in ("train", "ablate", "search") for file in files]
    yield [*words, f"train --dataset folder --data-dir {loop}", "evaluate-pretrained --models nothing"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_thirty_processes(sqlite_store: str, tmp_path: Path, thirty: list[str]) -> None:
    before = files(tmp_path)
    assert len(thirty) == 30
    for words in thirty:
        command = [sys.executable, "-m", "effv2", *words.split()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
        assert done.returncode == 2 and "Traceback" not in done.stderr, (words, done.stderr)
        assert done.stderr.strip().splitlines()[-1].startswith("Error: "), (words, done.stderr)
    assert files(tmp_path) == before and not MlflowClient().search_runs(["0"])
