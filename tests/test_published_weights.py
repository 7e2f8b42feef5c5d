"""Published weights: found, verified, loaded, with torchvision's classes and transforms."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import models
from torchvision.datasets import Imagenette

from effv2.cli.main import evaluate_pretrained
from effv2.core.errors import InputError
from effv2.pretrained.config import ImagesConfig
from effv2.pretrained.images import (
    class_names,
    outputs_of,
    wnids,
)
from effv2.run.weights import Requested, find_all_weights, load_network, network_names, parse_models
from tests.conftest import all_runs, invoke, seeded_weights


def test_class_map_agrees_with_torchvision() -> None:
    assert len(set(wnids())) == len(class_names()) == 1000 and list(wnids()) == sorted(wnids())
    for wnid, names in Imagenette._WNID_TO_CLASS.items():
        (output,) = outputs_of([wnid], ImagesConfig())
        assert class_names()[output] == names[0]
        for name in (names[0], names[0].replace(" ", "_")):
            assert outputs_of([name], ImagesConfig()) == output
    assert len(outputs_of(["Cardigan", "cardigan"], ImagesConfig())) == 2


@given(st.sampled_from(network_names()))
@settings(max_examples=20)
def test_every_network_of_torchvision_is_known(name: str) -> None:
    for weights in models.get_model_weights(name):
        if weights.meta["categories"]:
            (requested,) = parse_models(f"{name}:{weights.name}")
            assert requested.weights is weights and requested.published["top1_accuracy"] > 0.5
            assert re.fullmatch("[0-9a-f]{8,64}", requested.hash_head)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """Serve a folder over HTTP."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as served:
        thread = threading.Thread(target=served.serve_forever, args=[0.02])
        thread.start()
        yield folder, f"http://127.0.0.1:{served.server_port}"
        served.shutdown()
        thread.join()


def test_published_files_are_verified_however_they_came(hub: Path, server: tuple[Path, str], tmp_path: Path) -> None:
    folder, address = server
    content = b"weights"
    name = f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    (folder / name).write_bytes(content)
    weights: Any = SimpleNamespace(url=f"{address}/{name}")
    requested = Requested("resnet50", "resnet50", weights)

    def find(weights_dir: Path | None = None) -> Requested:
        (found,) = find_all_weights([requested], weights_dir, progress=False)
        return found

    found = find()
    assert found.path == hub / name and found.verified and found.sha256 == hashlib.sha256(content).hexdigest()

    own = tmp_path / "own"
    own.mkdir()
    (own / name).write_bytes(content)
    assert find(own).path == own / name
    for place, weights_dir in ((own, own), (hub, None)):
        (place / name).write_bytes(b"other")
        with pytest.raises(InputError, match=rf"{name} is not the published file.*delete it and download {address}"):
            find(weights_dir)
    (hub / name).unlink()
    (folder / name).write_bytes(b"tampered")
    with pytest.raises(InputError, match="can't be downloaded"):
        find()
    assert not list(hub.iterdir())


WRONG_INPUT = {
    "--models resnt50": r"--models resnt50: torchvision has no .* network of this name; the nearest is 'resnet50'",
    "--models resnet50:IMAGENET1K_V9": r"no published weights 'IMAGENET1K_V9'; did you mean 'IMAGENET1K_V2'\?",
    "--models vgg16:IMAGENET1K_FEATURES": r"no published weights 'IMAGENET1K_FEATURES'",
    "--models resnet50,resnet50:DEFAULT": r"are the same weights",
    "--models resnet50=nowhere.pth": r"nowhere.pth is not a readable file",
    "--models ,": r"--models ,: names no network",
    "--models resnet50": r"resnet50: its weights can't be downloaded \(.*download https://\S+/resnet50-11ad3fa6.pth",
    "--models squeezenet1_1=truncated.pth": r"truncated.pth can't be loaded as weights of \S+ \(it is damaged",
    "--models squeezenet1_1=code.pth": r"code.pth can't be loaded .*holds something other than tensors",
    "--models resnet18=squeezenet.pth": r"squeezenet.pth can't be loaded as .* resnet18 \(parameters are missing",
    "--models squeezenet1_1=squeezenet.pth --weights-dir /nowhere": r"/nowhere: it is not a readable folder",
    "--models squeezenet1_1=squeezenet.pth --dataset imagenete": r"--dataset imagenete: .* did you mean 'imagenette'",
    "--models squeezenet1_1=squeezenet.pth --dataset digits --data-dir=": r"digits: the class '0' is not one of",
    "--models squeezenet1_1=squeezenet.pth --dataset imagenette": r"not imagenette2-160",
    "--models squeezenet1_1=squeezenet.pth --data-dir cats": r"the class 'Persian' is not one of ImageNet's "
    r"\(did you mean 'Persian cat'",
    "--models squeezenet1_1=squeezenet.pth --data-dir twins": r"church and n03028079 are the same class",
    "--models squeezenet1_1=squeezenet.pth --data-dir broken": r"1 images can't be read.*tench/1.jpg",
    "--models squeezenet1_1=squeezenet.pth --per-class 9": r"--per-class 9: the class",
    "--models squeezenet1_1=squeezenet.pth --limit -1": r"--limit -1",
    "--models squeezenet1_1=squeezenet.pth --precision fp8": r"--precision fp8",
}


class Code:
    """An object whose pickle runs code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("was-run",))


@pytest.fixture
def wrong_files(tmp_path: Path, few_images: Path) -> Path:
    whole = seeded_weights(tmp_path / "squeezenet.pth", "squeezenet1_1").read_bytes()
    (tmp_path / "truncated.pth").write_bytes(whole[: len(whole) // 2])
    torch.save({"weight": Code()}, tmp_path / "code.pth")
    for name in ("cats/Persian", "cats/tench", "twins/church", "twins/n03028079", "broken/church", "broken/tench"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / name / "0.jpg")
    (tmp_path / "broken/tench/1.jpg").write_bytes(b"no image")
    return tmp_path


@pytest.mark.usefixtures("hub", "sqlite_store")
def test_wrong_input_is_one_sentence_before_anything_is_created(wrong_files: Path) -> None:
    for words, expected in WRONG_INPUT.items():
        given_ = words.split()
        given_ += [] if "--dataset" in given_ else ["--dataset", "folder"]
        given_ += [] if "--data-dir" in words else ["--data-dir", str(wrong_files / "images")]
        result = invoke(evaluate_pretrained, *given_)
        assert result.exit_code == 2, words
        (line,) = result.stderr.strip().splitlines()
        assert line.startswith("Error: ") and re.search(expected, line) and line.endswith("."), line
    assert not (wrong_files / "was-run").exists() and not all_runs()


@pytest.mark.parametrize(
    ("held", "around"),
    [
        ("module.", {}),
        ("module._orig_mod.", {"model": None, "optimizer": {"state": {}}, "args": argparse.Namespace(path=Path("x"))}),
        ("model.", {"state_dict": None, "pytorch-lightning_version": "2.5", "hyper_parameters": {"lr": 0.1}}),
        ("", {"model": None, "model_ema": {"n_averaged": torch.tensor(1)}, "epoch": 3}),
        ("", {"model_state_dict": None, "loss": 0.5}),
    ],
)
def test_weights_are_found_in_what_training_programs_save(tmp_path: Path, held: str, around: dict[str, Any]) -> None:
    """The files of DataParallel, torchvision's training with torch.compile, Lightning and others."""
    state = torch.load(seeded_weights(tmp_path / "plain.pth", "squeezenet1_1"), weights_only=True)
    saved: dict[str, Any] = {f"{held}{name}": value for name, value in state.items()}
    saved |= {"criterion.weight": torch.ones(1000)} if held == "model." else {}
    torch.save({key: saved if value is None else value for key, value in around.items()} or saved, tmp_path / "own.pth")
    (found,) = find_all_weights(parse_models(f"squeezenet1_1={tmp_path / 'own.pth'}"), None, False)
    loaded = load_network(found).state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "RGBA", "P"])
def test_images_are_prepared_exactly_as_torchvision_does(mode: str, tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    for text in ("resnet50", "efficientnet_b0", "efficientnet_v2_s", "inception_v3", "efficientnet_b1:IMAGENET1K_V1"):
        (requested,) = parse_models(text)
        for height, width in ((61, 90), (300, 200), (400, 401)):
            pixels = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)
            path = tmp_path / f"image.{'png' if mode in ('RGBA', 'P') else 'jpg'}"
            pixels.save(path)
            with Image.open(path) as image:
                ours = torch.tensor(requested.preparation(image)).permute(2, 0, 1)
                theirs = requested.weights.transforms()(image.convert("RGB"))
            mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in requested.normalisation)
            assert torch.equal((ours / 255 - mean) / std, theirs)
