"""The logged model takes images, brings its preprocessing along, and is no pickle."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from mlflow import MlflowClient
from PIL import Image
from torch import nn

from effv2.cli.main import train
from effv2.data import decoder
from effv2.data.batches import NORMALISATIONS
from effv2.data.images import CentreCrop, LabelledImages, Preparation, Square, decode
from effv2.serving.export import write_served
from effv2.serving.image_classifier import ImageClassifier
from tests.conftest import TINY_TABLE, make_image_tree

OUTPUTS = 7  # wider than the three classes: the rest is the column `other`


Trained = tuple[Path, Path, list[dict[str, str]]]


@pytest.fixture(scope="module")
def trained(template_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    """Train on a folder set; return its folder, that of the model, and the logged predictions."""
    folder = tmp_path_factory.mktemp("served")
    shutil.copy(template_database, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        yield train_in(folder)


def train_in(folder: Path) -> Trained:
    root = make_image_tree(folder / "set", ("train", "test"))
    study = folder / "study.yaml"
    study.write_text(
        f"name: served\nconfig:\n  data: {{image_size: 8, normalise: imagenet}}\n  model: {{variant: tiny, "
        f"table: {TINY_TABLE}, outputs: {OUTPUTS}}}\n  schedule: {{epochs: 2}}\n"
        "  execution: {device: cpu, precision: fp32}\n"
    )
    words = ["--study", str(study), "--dataset", "folder", "--data-dir", str(root)]
    result = CliRunner().invoke(train, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    client = MlflowClient()
    (run,) = client.search_runs(["0"])
    assert run.outputs
    (output,) = run.outputs.model_outputs
    location = client.get_logged_model(output.model_id).artifact_location
    predictions = client.download_artifacts(run.info.run_id, "predictions.csv", str(folder))
    with Path(predictions).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return root, Path(location.removeprefix("file://")), rows


@pytest.fixture
def server(trained: Trained) -> Iterator[str]:
    """Serve the model over HTTP without the training package on its path, pickles forbidden."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(trained[1]), "--env-manager", "local"]
    environment = os.environ | {
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    with subprocess.Popen(
        [*command, "-p", str(port), "-h", "127.0.0.1"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        address = f"http://127.0.0.1:{port}"
        try:
            deadline = time.monotonic() + 180
            while True:
                try:
                    urllib.request.urlopen(f"{address}/ping", timeout=1).close()
                    break
                except OSError:
                    assert process.poll() is None and time.monotonic() < deadline
                    time.sleep(0.2)
            yield address
        finally:
            os.killpg(process.pid, 15)
            process.wait(20)


def ask(address: str, images: list[str]) -> tuple[int, Any]:
    body = json.dumps({"inputs": images}).encode()
    request = urllib.request.Request(f"{address}/invocations", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)["predictions"]
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_served_model_answers_files_as_training_saw_them(trained: Trained, server: str) -> None:
    root, _, rows = trained
    files = [base64.b64encode((root / row["id"]).read_bytes()).decode() for row in rows]
    status, answers = ask(server, files)  # mixed sizes, modes and formats in one request
    assert status == 200
    for row, answer in zip(rows, answers, strict=True):
        assert answer["label"] == row["predicted"]
        assert list(answer["probabilities"]) == ["class 0", "class 1", "class 2", "other"]
        assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        if answer["label"] != "other":
            assert answer["probability"] == pytest.approx(float(row["probability"]), abs=1e-5)
    status, text = ask(server, [files[0], base64.b64encode(b"no image").decode()])
    assert status == 400 and "Image 1 of the request can't be read" in text and files[0] not in text
    assert ask(server, []) == (200, [])
    status, text = ask(server, [str(root / rows[0]["id"])])
    assert status == 400  # a path is never opened for a caller
    large = io.BytesIO()
    Image.new("1", (10_000, 8_000)).save(large, "PNG")
    began = time.monotonic()
    status, text = ask(server, 20 * [base64.b64encode(large.getvalue()).decode()])
    assert status == 400 and "holds 1,600,000,000 pixels, more than 300,000,000: send fewer" in text
    status, text = ask(server, 1_001 * files[:1])
    assert status == 400 and "holds 1,001 images, more than 1,000" in text and time.monotonic() - began < 15


def test_an_image_too_long_to_be_enlarged_is_refused() -> None:
    with pytest.raises(ValueError, match="1x1500 pixels is too long"):
        decoder.prepare(Image.new("RGB", (1, 1500)), 224, 256)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"


def iptc(record: int, dataset: int, content: bytes) -> bytes:
    return bytes([0x1C, record, dataset]) + len(content).to_bytes(2, "big") + content


IPTC = (
    iptc(3, 20, b"\0\x08")
    + iptc(3, 30, b"\0\x08")
    + iptc(3, 60, b"\1\0")
    + iptc(3, 120, b"\5")
    + iptc(8, 10, POSTSCRIPT)
)


@pytest.mark.parametrize("content", [POSTSCRIPT, IPTC], ids=["as it is", "in IPTC"])
def test_postscript_is_run_by_nobody(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "program.jpg").write_bytes(content)
    with pytest.raises(ValueError, match="is a program"):
        LabelledImages.of_files([tmp_path / "program.jpg"], [0], ["program"]).open(0)


def test_nothing_in_the_model_is_a_pickle(trained: Trained) -> None:
    names = []
    for path in trained[1].rglob("*"):
        names.append(path.name)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names += archive.namelist()
                heads = {name: archive.read(name)[:2] for name in archive.namelist()}
            assert not [name for name, head in heads.items() if head in (b"\x80\x02", b"\x80\x04", b"\x80\x05")]
    assert "program.pt2" in names
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".pth"))]


def test_model_loads_in_python_and_takes_what_notebooks_hold(trained: Trained) -> None:
    import mlflow.pyfunc

    root, location, rows = trained
    path = next(root / row["id"] for row in rows if row["id"].endswith("0.jpg"))
    with Image.open(path) as image:
        pixels = np.asarray(image)
        model = mlflow.pyfunc.load_model(str(location))
        answers = [model.predict([item])[0] for item in (image, path, path.read_bytes(), pixels)]
        assert all(answer == answers[0] for answer in answers)
        with pytest.raises(Exception, match="must hold bytes"):
            model.predict([pixels / 255])


DEEP = {"I;16": np.uint16, "I": np.int32, "F": np.float32}
MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", *DEEP]


@pytest.mark.parametrize("preparation", [Square(8), CentreCrop(7, 9, "bicubic")], ids=["train", "evaluate-pretrained"])
def test_a_served_model_gets_the_pixels_that_training_and_evaluation_get(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preparation: Preparation
) -> None:
    monkeypatch.setenv("EFFV2_CACHE", str(tmp_path / "cache"))
    generator, exif = np.random.default_rng(0), Image.Exif()
    exif[0x0112] = 6
    paths = []
    for number, mode in enumerate(MODES):
        image = Image.fromarray(generator.integers(0, 4096, (20 + number, 15)).astype(DEEP.get(mode, np.uint8)))
        image = image if mode in DEEP else image.convert("P" if mode == "PA" else mode)
        if mode in ("P", "PA"):
            image.info["transparency"] = 3 if mode == "P" else bytes(range(256))
        paths.append(tmp_path / f"{number}.{'tif' if mode in ('CMYK', 'YCbCr', 'LAB', 'I', 'F') else 'png'}")
        image.save(paths[-1], exif=exif)
    network = nn.Sequential(nn.Flatten(), nn.LazyLinear(2))
    network(torch.zeros(1, 3, preparation.size, preparation.size))
    files = write_served(tmp_path, network, NORMALISATIONS["none"], preparation, ["a", "b"])
    model: Any = ImageClassifier()
    model.load_context(SimpleNamespace(artifacts=files))
    images = LabelledImages.of_files(paths, [0] * len(paths), MODES)
    for path, pixels in zip(paths, decode(images, preparation).pixels, strict=True):
        assert np.array_equal(model.pixels(path.read_bytes()), pixels), path
        assert pixels.std() > 1, path
