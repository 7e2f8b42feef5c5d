"""The logged model takes images, contains its preprocessing, and is no pickle."""

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
import PIL
import pytest
import torch
from click.testing import CliRunner
from mlflow import MlflowClient
from PIL import Image
from torch import nn

from effv2.cli.main import export, train
from effv2.core.errors import InputError
from effv2.data import decoder
from effv2.data.batches import NORMALISATIONS
from effv2.data.images import CentreCrop, LabelledImages, Preparation, Square, decode
from effv2.serving.export import OPSET, read_program, write_served
from effv2.serving.image_classifier import ImageClassifier
from effv2.tracking.models import fetch_model, model_address
from tests.conftest import TINY_TABLE, make_image_tree, running

OUTPUTS = 7  # more outputs than the three classes: the rest is the column `other`


Trained = tuple[Path, Path, list[dict[str, str]]]


@pytest.fixture(scope="module")
def trained(template_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    """Train on a folder of images; return that folder, the model's folder, and the logged predictions."""
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


@pytest.fixture(scope="module")
def exported(trained: Trained) -> Path:
    """Export the model of the run to a folder; return the folder."""
    folder = trained[0].with_name("onnx form")
    output = invoke(f"runs:/{only_run()}", folder)
    assert f"--model-uri {folder} --env" in output
    return folder


def invoke(*words: str | Path, code: int = 0) -> str:
    """Run the export with these words, check its exit code, and return its output."""
    result = CliRunner().invoke(export, list(map(str, words)), catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def only_run() -> str:
    (run,) = MlflowClient().search_runs(["0"])
    return str(run.info.run_id)


@pytest.fixture(params=["torch", "onnx"])
def server(trained: Trained, request: pytest.FixtureRequest) -> Iterator[str]:
    """Serve the model over HTTP without effv2 on its path and with pickles forbidden."""
    model = trained[1] if request.param == "torch" else request.getfixturevalue("exported")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(model), "--env-manager", "local"]
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


def ask(address: str, images: list[str], **params: Any) -> tuple[int, Any]:
    body = json.dumps({"inputs": images, "params": params}).encode()
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
    status, (first, *_) = ask(server, files, top_k=2)
    assert status == 200 and len(first["probabilities"]) == 2 and next(iter(first["probabilities"])) == first["label"]
    status, text = ask(server, files, top_k=-1)
    assert status == 400 and "top_k is -1: give" in text
    assert ask(server, files, top_k="two")[0] == 400
    for place in ("ping", "health"):
        with urllib.request.urlopen(f"{server}/{place}") as answer:
            assert answer.status == 200
    status, text = ask(server, [files[0], base64.b64encode(b"no image").decode()])
    assert status == 400 and "Image 1 of the request can't be read" in text and files[0] not in text
    assert ask(server, []) == (200, [])
    status, text = ask(server, [str(root / rows[0]["id"])])
    assert status == 400  # the server never opens a path for a client
    large = io.BytesIO()
    Image.new("1", (10_000, 8_000)).save(large, "PNG")
    began = time.monotonic()
    status, text = ask(server, 20 * [base64.b64encode(large.getvalue()).decode()])
    assert status == 400 and "holds 1,600,000,000 pixels, more than 300,000,000: send fewer" in text
    frame = io.BytesIO()
    Image.new("1", (5_000, 4_000)).save(frame, "GIF")
    header, drawn = frame.getvalue()[:781], frame.getvalue()[781:-1]  # the header has a palette of 256 colours
    status, text = ask(server, [base64.b64encode(header + 20 * drawn + b";").decode()])
    assert status == 400 and "holds 320,000,000 pixels, more than 300,000,000: send fewer" in text
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
def test_postscript_is_never_executed(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "program.jpg").write_bytes(content)
    with pytest.raises(ValueError, match="PostScript, a program"):
        LabelledImages.of_files([tmp_path / "program.jpg"], [0], ["program"]).open(0)


def test_nothing_in_the_model_is_a_pickle(trained: Trained, exported: Path) -> None:
    names = []
    for path in (*trained[1].rglob("*"), *exported.rglob("*")):
        names.append(path.name)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names += archive.namelist()
                heads = {name: archive.read(name)[:2] for name in archive.namelist()}
            assert not [name for name, head in heads.items() if head in (b"\x80\x02", b"\x80\x04", b"\x80\x05")]
    assert {"program.pt2", "model.onnx"} <= set(names)
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


WITHOUT_TORCH = """
import json, pathlib, sys
for name in [each for each in sys.modules if each.partition(".")[0] in ("torch", "effv2")]:
    del sys.modules[name]
sys.modules["torch"] = sys.modules["effv2"] = None
import mlflow
model = mlflow.pyfunc.load_model(sys.argv[1])
print("answers", json.dumps(model.predict([pathlib.Path(each) for each in sys.argv[2:]])))
"""


def test_the_onnx_form_answers_as_torch_does_without_it(trained: Trained, exported: Path) -> None:
    import mlflow.pyfunc

    root, location, rows = trained
    paths = [root / row["id"] for row in rows]
    expected = mlflow.pyfunc.load_model(str(location)).predict(paths)
    with running("-c", WITHOUT_TORCH, exported, *paths) as process:
        said = process.rest()
    assert process.returncode == 0, said
    answers = json.loads(said.rpartition("answers ")[2])
    model = mlflow.pyfunc.load_model(str(exported))
    singly = [model.predict([path])[0] for path in paths]  # a batch may have any size
    for answer, alone, row in zip(answers, singly, expected, strict=True):
        assert answer["label"] == alone["label"] == row["label"]
        for probabilities in (answer["probabilities"], alone["probabilities"]):
            assert list(probabilities) == list(row["probabilities"])
            assert probabilities == pytest.approx(row["probabilities"], abs=1e-5)


def test_the_onnx_form_is_one_file_of_a_stated_opset_and_needs_no_torch(exported: Path) -> None:
    import onnx

    assert sorted(path.name for path in (exported / "artifacts").iterdir()) == [
        "decoder.py",
        "model.onnx",
        "settings.json",
    ]
    model = onnx.load(exported / "artifacts" / "model.onnx")
    onnx.checker.check_model(model)
    assert [each.version for each in model.opset_import if not each.domain] == [OPSET]
    (images,) = model.graph.input
    assert [each.dim_param or each.dim_value for each in images.type.tensor_type.shape.dim] == ["batch", 3, 8, 8]
    assert str(Path(torch.__file__).parent).encode() not in model.SerializeToString()  # no path of this machine
    requirements = (exported / "requirements.txt").read_text()
    assert "onnxruntime==" in requirements and "torch" not in requirements


@pytest.mark.parametrize("form", ["torch", "onnx"])
def test_the_most_likely_classes_are_listed_the_label_first(trained: Trained, exported: Path, form: str) -> None:
    import mlflow.pyfunc

    model = mlflow.pyfunc.load_model(str(exported if form == "onnx" else trained[1]))
    images = [np.full((8, 8, 3), grey, dtype=np.uint8) for grey in (0, 128, 255)]
    for every, answer in zip(model.predict(images), model.predict(images, params={"top_k": 3}), strict=True):
        (label, _), *others = answer["probabilities"].items()
        assert label == answer["label"] == every["label"] and len(every["probabilities"]) == 4
        rest = sorted((value for name, value in every["probabilities"].items() if name != label), reverse=True)
        assert [value for _, value in others] == pytest.approx(rest[:2])
    with pytest.raises(Exception, match="top_k is -1"):
        model.predict(images, params={"top_k": -1})


def test_a_program_that_holds_a_pickle_is_refused(trained: Trained, tmp_path: Path) -> None:
    program, changed = trained[1] / "artifacts" / "program.pt2", tmp_path / "program.pt2"
    assert read_program(program).state_dict
    for change in ("use_pickle", "a file more"):
        with zipfile.ZipFile(program) as given, zipfile.ZipFile(changed, "w") as made:
            for name in given.namelist():
                content = given.read(name)
                made.writestr(
                    name, content.replace(b'"use_pickle": false', b'"use_pickle": true', int(change == "use_pickle"))
                )
            if change == "a file more":
                made.writestr("program/data/constants/opaque_obj_0", b"")
        with pytest.raises(InputError, match="holds more than tensors and a graph"):
            read_program(changed)


def test_a_request_of_many_images_is_answered_in_parts(exported: Path) -> None:
    import mlflow.pyfunc

    model = mlflow.pyfunc.load_model(str(exported))
    images = np.random.default_rng(0).integers(0, 256, (130, 9, 9, 3), dtype=np.uint8)
    answers = model.predict(list(images))
    assert len(answers) == 130
    for at in (0, 64, 129):  # the last images of the second and third part
        (alone,) = model.predict([images[at]])
        assert alone["probabilities"] == pytest.approx(answers[at]["probabilities"], abs=1e-5)


def test_a_model_is_found_by_each_of_its_addresses(trained: Trained, tmp_path: Path) -> None:
    client, run_id = MlflowClient(), only_run()
    address = model_address(run_id)
    client.create_registered_model("birds")
    version = client.create_model_version("birds", address, run_id, model_id=address.partition("/")[2])
    client.set_registered_model_alias("birds", "champion", version.version)
    for number, name in enumerate((address, f"runs:/{run_id}", "models:/birds@champion", "models:/birds/1")):
        assert fetch_model(name, tmp_path / str(number))[0].run_id == run_id
        assert (tmp_path / str(number) / "artifacts" / "program.pt2").is_file()


def test_what_cannot_be_exported_is_named_before_anything_is_written(
    trained: Trained, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id, folder = only_run(), tmp_path / "new"
    for address, said in {
        "m-1234": "model m-1234: is not an address; give runs:/ID, models:/ID or models:/NAME@ALIAS.",
        "models:/m-1234": "has no model there",
        "models:/nobody@champion": "has no model there",
        "runs:/1234": "has no model there",
    }.items():
        assert said in invoke(address, folder, code=2), address
    assert "exists and is not empty; name another one" in invoke(f"runs:/{run_id}", exported, code=2)
    monkeypatch.setattr("effv2.serving.export.ONNX_NEEDS", ("onnx", "no_such_package"))
    said = invoke(f"runs:/{run_id}", folder, code=2)
    assert "ONNX needs the packages no_such_package; install them with: pip install 'effv2[onnx]'." in said
    assert not folder.exists()


DEEP = {"I;16": np.uint16, "I": np.int32, "F": np.float32}
MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", *DEEP]
if int(PIL.__version__.split(".")[0]) < 13:
    MODES.remove("YCbCr")  # it can't read such a TIFF of its own


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
    files = write_served(tmp_path, network, NORMALISATIONS["none"], preparation, classes=["a", "b"], outputs=2)
    model: Any = ImageClassifier()
    model.load_context(SimpleNamespace(artifacts=files))
    images = LabelledImages.of_files(paths, [0] * len(paths), MODES)
    for path, pixels in zip(paths, decode(images, preparation).pixels, strict=True):
        assert np.array_equal(model.pixels(path.read_bytes()), pixels), path
        assert pixels.std() > 1, path
