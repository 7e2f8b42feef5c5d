"""Networks with heads of the data's classes: logged models, state dicts, rankings, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from mlflow import MlflowClient
from mlflow.entities import Run
from torchvision import models

from effv2.cli.main import evaluate_pretrained, train
from effv2.pretrained import evaluation
from effv2.training import evaluation as training_evaluation
from tests.conftest import TINY_TABLE, make_image_tree


@pytest.fixture
def images(tmp_path: Path, sqlite_store: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(evaluation, "FULL_BATCH_IMAGES", 2)
    monkeypatch.setattr(training_evaluation, "TIMED_PASSES", 1)
    return make_image_tree(tmp_path / "set", ("train", "test"))


def trained(images: Path, seed: int, outputs: int = 0) -> Run:
    settings = f"model.variant=tiny,model.table={TINY_TABLE},model.outputs={outputs},data.normalise=imagenet"
    words = [
        "--dataset",
        "folder",
        "--data-dir",
        str(images),
        "--image-size",
        "16",
        "--epochs",
        "1",
        "--seed",
        str(seed),
    ]
    words += ["--set", settings, "--precision", "fp32"]
    assert CliRunner().invoke(train, words, catch_exceptions=False).exit_code == 0
    (run, *_) = MlflowClient().search_runs(["0"])
    return run


def evaluate(images: Path, networks: str, *more: str) -> Result:
    words = ["--models", networks, "--dataset", "folder", "--data-dir", str(images), *more]
    return CliRunner().invoke(evaluate_pretrained, words, catch_exceptions=False)


def test_logged_models_and_state_dicts_are_ranked_as_they_were_tested(images: Path, tmp_path: Path) -> None:
    first, wide = trained(images, 0), trained(images, 1, outputs=7)
    torch.manual_seed(0)
    torch.save(models.get_model("squeezenet1_1", num_classes=3).state_dict(), tmp_path / "squeezenet1_1.pth")
    named = f"first=runs:/{first.info.run_id},wide=runs:/{wide.info.run_id},squeezenet1_1={tmp_path}/squeezenet1_1.pth"
    result = evaluate(images, named)
    assert result.exit_code == 0, result.stderr
    assert "Top-1 over 3 or 7 classes" in result.output
    found = {
        run.info.run_name: run.data for run in MlflowClient().search_runs(["0"]) if "model.name" in run.data.params
    }
    assert found.keys() == {"first", "wide", "squeezenet1_1"}
    for name, run in (("first", first), ("wide", wide)):
        assert found[name].metrics["eval/top1_accuracy"] == pytest.approx(run.data.metrics["selected/test_accuracy"])
        assert found[name].params["transforms.crop"] == "16"
        assert found[name].params["weights.name"].startswith("models:/")
    assert found["first"].metrics["eval/images"] == 18


def test_heads_of_other_classes_are_refused(images: Path, tmp_path: Path) -> None:
    torch.save(models.get_model("squeezenet1_1", num_classes=5).state_dict(), tmp_path / "five.pth")
    before = len(MlflowClient().search_runs(["0"]))
    for network, words in (
        (f"squeezenet1_1={tmp_path}/five.pth", "it has 5 outputs, but the data has 3 classes"),
        ("mine=runs:/0123456789abcdef0123456789abcdef", "no model there"),
    ):
        result = evaluate(images, network)
        assert result.exit_code == 2 and words in result.stderr, result.stderr
    assert len(MlflowClient().search_runs(["0"])) == before


def test_images_that_cannot_be_read_are_left_out_for_all_networks_if_asked(images: Path, tmp_path: Path) -> None:
    run = trained(images, 0)
    torch.save(models.get_model("squeezenet1_1", num_classes=3).state_dict(), tmp_path / "squeezenet1_1.pth")
    (images / "test" / "class 1" / "0.jpg").write_bytes(b"no image")
    networks = f"mine=runs:/{run.info.run_id},squeezenet1_1={tmp_path}/squeezenet1_1.pth"
    refused = evaluate(images, networks)
    assert refused.exit_code == 2 and "0.jpg" in refused.stderr and "give --skip-broken" in refused.stderr
    done = evaluate(images, networks, "--skip-broken", "--log-model", "all")
    assert done.exit_code == 0 and "can't be read: 1 image (test/class 1/0.jpg)" in done.output, done.output
    found = [run for run in MlflowClient().search_runs(["0"]) if "model.name" in run.data.params]
    assert [run.data.metrics["eval/images"] for run in found] == [17, 17]
    for each in found:
        text = MlflowClient().download_artifacts(each.info.run_id, "data_notes.txt", str(tmp_path))
        assert Path(text).read_text().splitlines()[-1] == "test/class 1/0.jpg"
        again = evaluate(images, f"again=runs:/{each.info.run_id}", "--skip-broken")
        assert again.exit_code == 2 and "logged by an evaluation of weights" in again.stderr, again.stderr
    shutil.rmtree(images / "test" / "class 2")
    done = evaluate(images, f"fewer=runs:/{run.info.run_id}", "--skip-broken")
    assert done.exit_code == 0 and "classes that test lacks, such as class 2" in done.output, done.output


def test_own_heads_and_published_networks_are_ranked_together(
    tmp_path: Path, sqlite_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images have WordNet's names. Each network is scored on the outputs that mean their classes."""
    monkeypatch.setattr(evaluation, "FULL_BATCH_IMAGES", 2)
    monkeypatch.setattr(training_evaluation, "TIMED_PASSES", 1)
    images = make_image_tree(tmp_path / "set", ("train", "val"), classes=2)
    for part in ("train", "val"):
        for label, name in enumerate(("n01440764", "n03028079")):
            (images / part / f"class {label}").rename(images / part / name)
    run = trained(images, 0)
    torch.manual_seed(0)
    torch.save(models.get_model("squeezenet1_1", weights=None).state_dict(), tmp_path / "squeezenet1_1.pth")
    result = evaluate(images, f"mine=runs:/{run.info.run_id},squeezenet1_1={tmp_path}/squeezenet1_1.pth")
    assert result.exit_code == 0, result.stderr
    found = {
        run.info.run_name: run.data for run in MlflowClient().search_runs(["0"]) if "model.name" in run.data.params
    }
    assert found["mine"].metrics["eval/top1_accuracy"] == pytest.approx(run.data.metrics["selected/test_accuracy"])
    assert {each.params["evaluation.outputs"] for each in found.values()} == {"2", "1000"}
    assert {each.metrics["eval/images"] for each in found.values()} == {12}
    assert "Top-1 over 2 or 1000 classes" in result.output, result.output
