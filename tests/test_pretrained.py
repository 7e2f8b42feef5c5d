"""Published weights: found, verified, evaluated as torchvision would, ranked; seeded networks and real weights."""

from __future__ import annotations

import argparse
import csv
import hashlib
import math
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image
from torchvision import models
from torchvision.datasets import Imagenette

from effv2.cli.main import evaluate_pretrained
from effv2.core.calibration import calibration_error
from effv2.core.errors import InputError
from effv2.core.words import percent
from effv2.evidence.results import networks_results
from effv2.evidence.statistics import holm, mcnemar, wilson
from effv2.pretrained import evaluation
from effv2.pretrained.config import ImagesConfig
from effv2.pretrained.evaluation import scores
from effv2.pretrained.images import (
    SEEN,
    TEST,
    UNKNOWN,
    UNSEEN,
    EvaluationImages,
    choose_images,
    class_names,
    origin,
    outputs_of,
    wnids,
)
from effv2.run.weights import Requested, find_all_weights, load_network, network_names, parse_models
from effv2.tracking.read import RunRecord
from effv2.tracking.studies import NO_STUDY, TrackedStudy
from effv2.training import evaluation as training_evaluation
from tests.conftest import ROOT, running

SQUEEZENET = "weights/squeezenet1_1-imagenet-caffe-ndf.pth"


def invoke(*words: str | Path) -> Result:
    return CliRunner().invoke(evaluate_pretrained, [str(word) for word in words], catch_exceptions=False)


def evaluate_squeezenets(images: Path, files: Sequence[Path], *words: str) -> Result:
    """Evaluate the networks in `files` on a folder of images."""
    models_ = ",".join(f"squeezenet1_1={file}" for file in files)
    return invoke("--models", models_, "--dataset", "folder", "--data-dir", images, *words)


def all_runs() -> list[Run]:
    return list(MlflowClient().search_runs(["0"], order_by=["start_time ASC"]))


def artifact(run: Run, name: str, folder: Path) -> list[dict[str, str]]:
    path = MlflowClient().download_artifacts(run.info.run_id, name, str(folder))
    with Path(path).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def seeded_weights(path: Path, network: str, seed: int = 0) -> Path:
    """Save a freshly initialised network as the published files are saved: a state dict."""
    torch.manual_seed(seed)
    torch.save(models.get_model(network, weights=None).state_dict(), path)
    return path


@pytest.fixture
def few_images(tmp_path: Path) -> Path:
    """Write four images per class for two classes, half of them named as ImageNet's validation images."""
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
def two_files(tmp_path: Path) -> list[Path]:
    return [seeded_weights(tmp_path / f"{seed}.pth", "squeezenet1_1", seed) for seed in (1, 2)]


@pytest.fixture
def short_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time a full batch of 2 images, since 128 of them take long, and time it once."""
    monkeypatch.setattr(evaluation, "FULL_BATCH_IMAGES", 2)
    monkeypatch.setattr(training_evaluation, "TIMED_PASSES", 1)


# Statistics, against computations that share nothing with them.


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_mcnemar_counts_coins(pairs: list[tuple[bool, bool]]) -> None:
    first, second = (np.array(side) for side in zip(*pairs, strict=True))
    only_first, only_second, p = mcnemar(first, second)
    b, c = sum(x and not y for x, y in pairs), sum(y and not x for x, y in pairs)
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c)
    assert (only_first, only_second) == (b, c)
    assert p == pytest.approx(min(1, 2 * tail))
    assert mcnemar(second, first)[2] == pytest.approx(p)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_as_his_steps_do(p_values: list[float]) -> None:
    corrected = [p for p, _ in holm(p_values)]
    for level in (0.01, 0.05, 0.2):
        rejected: set[int] = set()
        for step, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
            if p_values[index] * (len(p_values) - step) >= level:
                break
            rejected.add(index)
        assert {i for i, p in enumerate(corrected) if p < level} == rejected


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60))
def test_calibration_error_is_the_weighted_gap_of_each_bin(rows: list[tuple[float, bool]]) -> None:
    gap = 0.0
    for index in range(15):
        low, high = np.linspace(0, 1, 16)[index : index + 2]
        members = [(p, hit) for p, hit in rows if low < p <= high or (index == 0 and p == 0)]
        gap += abs(sum(p for p, _ in members) - sum(hit for _, hit in members)) / len(rows)
    confidence, right = (np.array(side, dtype=float) for side in zip(*rows, strict=True))
    assert calibration_error(confidence, right) == pytest.approx(gap, abs=1e-12)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1e-9, 1.0]))
def test_what_is_right_over_all_classes_is_right_among_few_and_in_the_top_five(seed: int, spread: float) -> None:
    """Also of an untrained network, whose logits are so close that their probabilities tie."""
    generator = np.random.default_rng(seed)
    logits = torch.from_numpy(generator.normal(0, spread, (40, 12)).astype(np.float32))
    present = np.sort(generator.choice(12, 7, replace=False))
    found = scores(logits, generator.choice(present, 40), present)
    assert found["top1_accuracy"] <= min(found["top1_present"], found["top5_accuracy"])


def test_scores_are_those_of_a_plain_loop() -> None:
    generator = np.random.default_rng(0)
    logits, present = torch.from_numpy(generator.normal(0, 2, (60, 12)).astype(np.float32)), np.array([1, 4, 5, 9])
    logits[0] = 0  # all tie: the first output is predicted
    true = np.array([5, *generator.choice(present, 59)])
    counts = {"top1_accuracy": 0, "top1_present": 0, "top5_accuracy": 0}
    losses, confidences, hits = [], [], []
    for row, target in zip(logits.double().tolist(), true.tolist(), strict=True):
        order = sorted(range(12), key=lambda output: -row[output])
        hits.append(order[0] == target)
        counts["top1_accuracy"] += order[0] == target
        counts["top5_accuracy"] += target in order[:5]
        counts["top1_present"] += next(output for output in order if output in present) == target
        probabilities = [math.exp(value) / sum(map(math.exp, row)) for value in row]
        losses.append(-math.log(probabilities[target]))
        confidences.append(probabilities[order[0]])
    found = scores(logits, true, present)
    assert found.pop("images") == 60
    assert found.pop("loss") == pytest.approx(sum(losses) / 60, rel=1e-5)
    assert found.pop("ece") == pytest.approx(calibration_error(np.array(confidences), np.array(hits)), abs=1e-6)
    assert found == pytest.approx({name: count / 60 for name, count in counts.items()})


def ranking(rights: dict[str, list[bool]], where: str = UNSEEN) -> str:
    """Return what is said of networks that got these images right."""
    params = {"evaluation.ranked_on": "eval", "evaluation.ranked_origin": where}
    runs = [RunRecord(name, name, "FINISHED", params, {}, {}) for name in rights]
    found = networks_results(
        TrackedStudy(NO_STUDY, runs), lambda run: dict(zip(map(str, range(99)), rights[run.name], strict=False))
    )
    assert sorted(found.details[0][1:]) == sorted(rights)
    return found.short


def test_a_difference_is_claimed_only_where_it_is_real() -> None:
    best, good = [True] * 30 + [False] * 2, [True] * 29 + [False] * 3
    poor = [True] * 10 + [False] * 22
    text = ranking({"poor": poor, "best": best, "good": good})
    assert "best is better than poor (p < 0.001); good is better than poor (p < 0.001)" in text
    assert "undecided which is better: best or good (p = 1.00)" in text
    assert "Holm-corrected for 3" in text and "32 images of ImageNet's validation set" in text
    assert "this says little about other images" in ranking({"a": best, "b": good}, SEEN)
    assert "not known" in ranking({"a": best, "b": good}, UNKNOWN)
    assert "nothing to compare" in ranking({"a": best})


def test_many_networks_are_all_named() -> None:
    rights = {str(count): [True] * count + [False] * (99 - count) for count in (99, 70, 40, 39, 5)}
    text = ranking(rights)
    assert "99 is better than 70, 40, 39 and 5; 70 is better than 40, 39 and 5; 40 is better than 5; 39" in text
    assert "undecided which is better: 40 or 39." in text


def test_the_published_comparison_on_138_images_decides_nothing() -> None:
    """116, 112 and 109 right, even if they differed in no more images than they must."""
    rights = {name: [True] * right + [False] * (138 - right) for name, right in (("s", 116), ("r", 112), ("b", 109))}
    assert "which is better: s or r" in ranking(rights)


# Classes and names.


def test_class_map_agrees_with_torchvision() -> None:
    assert len(set(wnids())) == len(class_names()) == 1000 and list(wnids()) == sorted(wnids())
    for wnid, names in Imagenette._WNID_TO_CLASS.items():
        (output,) = outputs_of([wnid], ImagesConfig())
        assert class_names()[output] == names[0]
        for name in (names[0], names[0].replace(" ", "_")):
            assert outputs_of([name], ImagesConfig()) == output
    assert len(outputs_of(["Cardigan", "cardigan"], ImagesConfig())) == 2


def test_origins_are_told_by_names() -> None:
    assert origin("val/n01440764/ILSVRC2012_val_00000293.JPEG") == UNSEEN
    assert origin("n01440764/n01440764_10026.JPEG") == SEEN
    assert origin("n01440764/holiday.jpg") == origin("x/my_ILSVRC2012_val_00000293.JPEG") == UNKNOWN


def images_of(tmp_path: Path, files: dict[str, list[str]]) -> EvaluationImages:
    for folder, names in files.items():
        for name in names:
            path = tmp_path / "set" / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 9)).save(path, "JPEG")
    return choose_images(ImagesConfig(dataset="folder", dir=str(tmp_path / "set")))


@pytest.mark.parametrize(
    ("tench", "church", "ranked", "others"),
    [  # also where one image of the validation set has strayed among one's own
        ("own own", "own val", (TEST, UNKNOWN), {UNSEEN: 1}),
        ("val train", "val own", (UNSEEN, UNSEEN), {UNSEEN: 2, SEEN: 1, UNKNOWN: 3}),
        ("own train", "own", (UNKNOWN, UNKNOWN), {SEEN: 1, UNKNOWN: 2}),
        ("train", "train", (TEST, SEEN), {}),
    ],
)
def test_rankings_rest_on_what_is_not_known_to_be_seen(
    tmp_path: Path, tench: str, church: str, ranked: tuple[str, str], others: dict[str, int]
) -> None:
    names = {"own": "{}.jpg", "val": "ILSVRC2012_val_0000000{}.JPEG", "train": "n01440764_{}.JPEG"}
    kinds = {"tench": tench.split(), "church": church.split()}
    files = {folder: [names[kind].format(i) for i, kind in enumerate(each)] for folder, each in kinds.items()}
    found = images_of(tmp_path, files)
    counts = {name: len(each) for name, each in found.sets.items()}
    assert found.ranked == ranked and counts == {TEST: sum(map(len, files.values()))} | others


def test_a_quick_look_draws_as_many_unseen_images(tmp_path: Path) -> None:
    names = [f"n01440764_{i}.JPEG" for i in range(9)], [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(9)]
    trees = {f"{part}/{folder}": [*names[0], *names[1]] for part in ("train", "val") for folder in ("tench", "church")}
    whole = images_of(tmp_path, trees)
    assert (whole.tests, len(whole.sets["unseen"]), len(whole.sets["seen"])) == (36, 36, 18)
    for seed in (0, 1):
        config = ImagesConfig(dataset="folder", dir=str(tmp_path / "set"), limit=5, seed=seed)
        few = choose_images(config)
        assert few.tests == 5 and 5 <= len(few.sets["unseen"]) <= 10 and few.ranked[0] == UNSEEN
        other = choose_images(config.model_copy(update={"seed": 9}))
        assert few.part.ids == choose_images(config).part.ids != other.part.ids
        each = choose_images(ImagesConfig(dataset="folder", dir=str(tmp_path / "set"), per_class=2, seed=seed))
        assert np.bincount(each.part.labels[: each.tests]).tolist() == [2, 2]
        assert np.bincount(each.part.labels[each.tests :]).tolist() == [2, 2]


@given(st.sampled_from(network_names()))
@settings(max_examples=20)
def test_every_network_of_torchvision_is_known(name: str) -> None:
    for weights in models.get_model_weights(name):
        if weights.meta["categories"]:
            (requested,) = parse_models(f"{name}:{weights.name}")
            assert requested.weights is weights and requested.published["top1_accuracy"] > 0.5
            assert re.fullmatch("[0-9a-f]{8,64}", requested.hash_head)


# Files of weights.


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give torch a cache of its own, and no way to the network."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(urllib.request, "_opener", None)  # what urlopen makes of the proxies, once a process
    return tmp_path / "hub" / "checkpoints"


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
    """Something that a pickle would run."""

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
        result = invoke(*given_)
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
    """DataParallel, torchvision's own training with torch.compile, Lightning, and the like."""
    state = torch.load(seeded_weights(tmp_path / "plain.pth", "squeezenet1_1"), weights_only=True)
    saved: dict[str, Any] = {f"{held}{name}": value for name, value in state.items()}
    saved |= {"criterion.weight": torch.ones(1000)} if held == "model." else {}
    torch.save({key: saved if value is None else value for key, value in around.items()} or saved, tmp_path / "own.pth")
    (found,) = find_all_weights(parse_models(f"squeezenet1_1={tmp_path / 'own.pth'}"), None, False)
    loaded = load_network(found).state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)


# Images as the weights want them.


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


# Whole evaluations.


@pytest.mark.usefixtures("short_batches")
def test_real_weights_predict_as_plain_pytorch_does(sqlite_store: str, real_data: Path, tmp_path: Path) -> None:
    file = real_data / SQUEEZENET
    result = invoke("--models", f"squeezenet1_1={file}", "--data-dir", real_data, "--limit", "60", "--seed", "3")
    assert result.exit_code == 0, result.output
    network = models.squeezenet1_1()
    network.load_state_dict(torch.load(file, weights_only=True))
    network.eval()
    weights = models.SqueezeNet1_1_Weights.IMAGENET1K_V1
    (child,) = [run for run in all_runs() if "mlflow.parentRunId" in run.data.tags]
    rows = artifact(child, "predictions.csv", tmp_path)
    assert len(rows) == 60
    for row in rows:
        with Image.open(real_data / "imagenette2-160" / row["id"]) as image, torch.inference_mode():
            probabilities = network(weights.transforms()(image.convert("RGB"))[None]).softmax(1)[0]
        assert weights.meta["categories"][int(probabilities.argmax())] == row["predicted"]
        assert float(probabilities.max()) == pytest.approx(float(row["probability"]), abs=1e-5)
    share = sum(row["true"] == row["predicted"] for row in rows) / 60
    assert child.data.metrics["eval/top1_accuracy"] == pytest.approx(share)
    assert child.data.params["weights.sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.usefixtures("short_batches")
def test_the_published_comparison_from_names_to_report(sqlite_store: str, few_images: Path, tmp_path: Path) -> None:
    named = ["efficientnet_v2_s", "efficientnet_b0", "resnet50"]
    models_ = ",".join(f"{name}={seeded_weights(tmp_path / f'{name}.pth', name)}" for name in named)
    result = invoke("--models", models_, "--dataset", "folder", "--data-dir", few_images)
    assert result.exit_code == 0, result.output
    parent, *children = all_runs()
    assert [run.data.tags["mlflow.runName"] for run in children] == named
    for run, name in zip(children, named, strict=True):
        metrics, params = run.data.metrics, run.data.params
        assert run.info.status == "FINISHED" and run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        meta = models.get_model_weights(name).DEFAULT.meta
        assert metrics["model/parameters"] == meta["num_params"]
        assert metrics["model/gflops"] == pytest.approx(meta["_ops"], abs=1e-3)
        assert "published/top1_accuracy" not in metrics  # nobody published what these files reach
        assert (metrics["eval/images"], metrics["unseen/images"], metrics["seen/images"]) == (8, 4, 4)
        for figure in ("top1_accuracy", "top1_present", "top5_accuracy", "loss", "ece"):
            assert f"eval/{figure}" in metrics and f"unseen/{figure}" in metrics
        assert metrics["inference/single_image_seconds"] > 0 and metrics["inference/batch_128_seconds"] > 0
        assert metrics["throughput/evaluate_images_per_second"] > 0
        assert (params["evaluation.ranked_on"], params["evaluation.ranked_origin"]) == ("unseen", "unseen")
        assert params["weights.verified"] == "False" and params["transforms.crop"] == str(384 if "v2" in name else 224)
        rows = artifact(run, "predictions.csv", tmp_path)
        assert [row["true"] for row in rows] == ["church"] * 4 + ["tench"] * 4
        assert len(artifact(run, "unseen/predictions.csv", tmp_path)) == 4
    paths = {file.path for file in MlflowClient().list_artifacts(parent.info.run_id)}
    assert paths >= {"report.md", "ranking.csv", "pairs.csv", "accuracy_against_cost.png"}
    assert len(artifact(parent, "pairs.csv", tmp_path)) == 3
    ranking = artifact(parent, "ranking.csv", tmp_path)
    assert [int(row["right"]) for row in ranking] == sorted((int(row["right"]) for row in ranking), reverse=True)
    named_rows = {row["network"]: row for row in ranking}
    for run in children:
        row = named_rows.pop(run.info.run_name)
        assert (row["run_id"], row["images"]) == (run.info.run_id, "4")
        interval = wilson(round(4 * run.data.metrics["unseen/top1_accuracy"]), 4)
        assert (float(row["low"]), float(row["high"])) == (interval.low, interval.high)
        written = f"{percent(run.data.metrics['unseen/top1_accuracy'])} [{' to '.join(map(percent, interval))}]"
        assert written in parent.data.tags["mlflow.note.content"]
    assert not named_rows
    assert parent.data.metrics.keys() >= {f"{name}/eval/top1_accuracy" for name in named}
    assert "on 4 images of ImageNet's validation set" in result.output
    assert parent.info.status == "FINISHED" and "undecided which" in parent.data.tags["mlflow.note.content"]


@pytest.mark.usefixtures("short_batches")
def test_only_the_same_weights_on_the_same_images_are_not_repeated(
    sqlite_store: str, few_images: Path, tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A published file is not the user's own of the same bytes: its name and that it was verified are told."""
    own = seeded_weights(tmp_path / "mine.pth", "squeezenet1_1")
    head = hashlib.sha256(own.read_bytes()).hexdigest()[:8]
    published = models.SqueezeNet1_1_Weights.IMAGENET1K_V1
    monkeypatch.setattr(published.value, "url", f"http://127.0.0.1:9/squeezenet1_1-{head}.pth")
    hub.mkdir(parents=True)
    (hub / f"squeezenet1_1-{head}.pth").write_bytes(own.read_bytes())
    images = ("--dataset", "folder", "--data-dir", few_images)

    def evaluated(*words: str | Path) -> list[Run]:
        before = {run.info.run_id for run in all_runs()}
        assert invoke(*words, *images).exit_code == 0
        return [run for run in all_runs() if run.info.run_id not in before and "mlflow.parentRunId" in run.data.tags]

    (mine,) = evaluated("--models", f"squeezenet1_1={own}")
    (theirs,) = evaluated("--models", "squeezenet1_1")
    assert (mine.data.params["weights.verified"], mine.data.params["weights.name"]) == ("False", "mine.pth")
    assert (theirs.data.params["weights.verified"], theirs.data.params["weights.name"]) == ("True", str(published))
    assert theirs.data.metrics["published/top1_accuracy"] == pytest.approx(0.58178)
    assert not evaluated("--models", "squeezenet1_1")
    assert len(evaluated("--models", "squeezenet1_1", "--precision", "bf16")) == 1
    assert len(evaluated("--models", "squeezenet1_1", "--limit", "4")) == 1
    image = next(few_images.rglob("*.JPEG"))
    image.rename(image.with_name("other.JPEG"))
    assert len(evaluated("--models", "squeezenet1_1")) == 1
    Image.new("RGB", (40, 50), "red").save(image.with_name("other.JPEG"))
    assert len(evaluated("--models", "squeezenet1_1")) == 1


@pytest.mark.usefixtures("short_batches")
def test_weights_that_are_no_numbers_fail_their_run(sqlite_store: str, few_images: Path, tmp_path: Path) -> None:
    file = seeded_weights(tmp_path / "squeezenet1_1.pth", "squeezenet1_1")
    torch.save({name: value * math.nan for name, value in torch.load(file, weights_only=True).items()}, file)
    result = evaluate_squeezenets(few_images, [file])
    assert result.exit_code == 1 and "not all finite numbers; the weights are damaged" in result.stderr
    assert [run.info.status for run in all_runs()] == ["FAILED", "FAILED"]


def test_a_batch_too_large_for_the_memory_costs_its_latency_alone(
    sqlite_store: str, few_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(work: Any) -> float:
        if len(work.args[-1]) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return 0.5

    monkeypatch.setattr(evaluation, "median_seconds", timed)
    result = evaluate_squeezenets(few_images, [seeded_weights(tmp_path / "squeezenet1_1.pth", "squeezenet1_1")])
    assert result.exit_code == 0 and "not enough memory to time 128 images at once" in result.stderr
    metrics = all_runs()[-1].data.metrics
    assert metrics["eval/images"] == 8 and metrics["inference/single_image_seconds"] == 0.5
    assert "inference/batch_128_seconds" not in metrics


@pytest.mark.usefixtures("short_batches")
def test_what_was_evaluated_is_not_repeated(
    sqlite_store: str, few_images: Path, two_files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert evaluate_squeezenets(few_images, two_files[:1]).exit_code == 0
    before = [run.info.run_id for run in all_runs()]
    again = evaluate_squeezenets(few_images, two_files[:1])
    assert again.exit_code == 0 and "already finished; --fresh" in again.stderr
    assert [run.info.run_id for run in all_runs()] == before
    assert evaluate_squeezenets(few_images, two_files).exit_code == 0
    assert len(all_runs()) == len(before) + 2  # a parent and the second network
    assert evaluate_squeezenets(few_images, two_files, "--fresh", "--workers", "2").exit_code == 0
    assert len(all_runs()) == len(before) + 5

    # What --fresh began is gone on with, and takes nothing from those before it.
    def interrupted(evaluation_: Any, task: Any) -> Any:
        if evaluation_.requested.file == two_files[1]:
            raise KeyboardInterrupt
        return evaluate(evaluation_, task)

    evaluate = evaluation.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluate", interrupted)
        assert evaluate_squeezenets(few_images, two_files, "--fresh").exit_code == 130
    assert evaluate_squeezenets(few_images, two_files).exit_code == 0
    assert len(all_runs()) == len(before) + 8 and {run.info.status for run in all_runs()} == {"FINISHED"}


CUT_SHORT = """
import os, signal, sys
from effv2.cli.main import evaluate_pretrained
from effv2.pretrained import evaluation
from effv2.training import evaluation as training

scores, calls = evaluation.scores, 0

def cut_short(*args):
    global calls
    calls += 1
    if calls > 3:  # three sets a network
        os.kill(os.getpid(), {signal})
    return scores(*args)

evaluation.scores, evaluation.FULL_BATCH_IMAGES, training.TIMED_PASSES = cut_short, 2, 1
evaluate_pretrained(sys.argv[1:])
"""


@pytest.mark.usefixtures("short_batches")
@pytest.mark.parametrize(
    ("number", "code", "left"), [(signal.SIGTERM, 143, "KILLED"), (signal.SIGKILL, -signal.SIGKILL, "RUNNING")]
)
def test_a_comparison_that_was_cut_short_is_resumed_in_its_run(
    sqlite_store: str, few_images: Path, two_files: list[Path], number: int, code: int, left: str
) -> None:
    """A comparison of others that comes before ends runs that a killed one left open."""
    words = ["--models", ",".join(f"squeezenet1_1={file}" for file in two_files)]
    words += ["--dataset", "folder", "--data-dir", str(few_images)]
    script = CUT_SHORT.format(signal=int(number))
    with running("-c", script, *words) as process:
        said = process.rest()
    assert process.returncode == code, said
    assert [run.info.status for run in all_runs()] == [left, "FINISHED", left]
    if left == "RUNNING":
        assert evaluate_squeezenets(few_images, two_files[1:], "--fresh").exit_code == 0
        assert [run.info.status for run in all_runs()] == ["RUNNING", "FINISHED", "KILLED", "FINISHED", "FINISHED"]
    assert invoke(*words).exit_code == 0
    parent, *children = all_runs()
    own = [run for run in children if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert parent.info.status == "FINISHED"
    if left == "KILLED":
        assert [run.info.status for run in own] == ["FINISHED", "KILLED", "FINISHED"] and own == children
    else:  # the other comparison has evaluated the second network meanwhile
        assert [run.info.status for run in own] == ["FINISHED", "KILLED"] and len(children) == 4


def test_mlflow_run_adopts_its_run(sqlite_store: str, few_images: Path, tmp_path: Path) -> None:
    file = seeded_weights(tmp_path / "shufflenet_v2_x0_5.pth", "shufflenet_v2_x0_5")
    command = [sys.executable, "-m", "mlflow", "run", str(ROOT), "-e", "evaluate-pretrained", "--env-manager", "local"]
    command += ["-P", f"models=shufflenet_v2_x0_5={file}", "-P", "dataset=folder", "-P", f"data_dir={few_images}"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    parent, child = all_runs()
    assert parent.data.tags["mlflow.project.entryPoint"] == "evaluate-pretrained"
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert {run.info.status for run in (parent, child)} == {"FINISHED"}


@pytest.mark.usefixtures("short_batches")
def test_one_network_that_fails_does_not_cost_the_others(
    sqlite_store: str, few_images: Path, two_files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(requested: Requested) -> Any:
        if requested.file == two_files[0]:
            raise torch.OutOfMemoryError("no memory")
        return load_network(requested)

    monkeypatch.setattr(evaluation, "load_network", failing)
    result = evaluate_squeezenets(few_images, two_files)
    assert result.exit_code == 1
    assert "1 of 2 runs failed. squeezenet1_1 1: The device's memory is full; lower --batch-size." in result.stderr
    assert [run.info.status for run in all_runs()] == ["FAILED", "FAILED", "FINISHED"]


@pytest.mark.usefixtures("short_batches")
def test_bf16_says_what_it_changes(sqlite_store: str, few_images: Path, tmp_path: Path) -> None:
    file = seeded_weights(tmp_path / "squeezenet1_1.pth", "squeezenet1_1")
    assert evaluate_squeezenets(few_images, [file], "--precision", "bf16", "--limit", "6").exit_code == 0
    metrics = all_runs()[-1].data.metrics
    assert metrics["eval/images"] == 6 <= metrics["bf16/compared_images"] <= 8
    assert "bf16, predictions changed" in all_runs()[0].data.tags["mlflow.note.content"]
    assert -1 <= metrics["bf16/top1_difference"] <= 1 and 0 <= metrics["bf16/predictions_changed"] <= 1


@pytest.mark.usefixtures("short_batches")
def test_the_best_network_is_served_with_its_own_preprocessing(
    sqlite_store: str, few_images: Path, tmp_path: Path, two_files: list[Path]
) -> None:
    import mlflow.pyfunc

    first = min(few_images.rglob("*.JPEG"))  # the example of a request, whatever its mode
    with Image.open(first) as image:
        image.convert("CMYK").save(first)
    result = evaluate_squeezenets(few_images, two_files, "--log-model", "best")
    assert result.exit_code == 0, result.output
    outputs = [(run, run.outputs.model_outputs) for run in all_runs() if run.outputs]
    ((run, (logged,)),) = [(run, logged) for run, logged in outputs if logged]
    model = mlflow.pyfunc.load_model(f"models:/{logged.model_id}")
    for row in artifact(run, "predictions.csv", tmp_path):
        (answer,) = model.predict([few_images / row["id"]])
        assert answer["label"] == row["predicted"]
        assert answer["probability"] == pytest.approx(float(row["probability"]), abs=1e-5)


@pytest.mark.network
def test_published_weights_are_downloaded_and_as_good_as_published(
    sqlite_store: str, real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    result = invoke("--models", "efficientnet_b0,squeezenet1_1", "--data-dir", real_data)
    assert result.exit_code == 0, result.output
    for run in all_runs()[1:]:
        metrics = run.data.metrics
        assert run.data.params["weights.verified"] == "True"
        assert metrics["unseen/top1_accuracy"] == pytest.approx(metrics["published/top1_accuracy"], abs=0.12)
    assert "efficientnet_b0 is better than squeezenet1_1" in result.output
