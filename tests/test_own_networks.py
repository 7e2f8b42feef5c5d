"""Heads of the data's own classes beside ImageNet's: logged models, state dicts, and what is refused of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from mlflow import MlflowClient
from mlflow.entities import Run
from torchvision import models

from effv2.cli.main import evaluate_pretrained, train
from effv2.pretrained import evaluation
from effv2.training import loop
from tests.conftest import TINY_TABLE, make_image_tree


@pytest.fixture
def images(tmp_path: Path, sqlite_store: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(evaluation, "FULL_BATCH_IMAGES", 2)
    monkeypatch.setattr(loop, "TIMED_PASSES", 1)
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


def evaluate(images: Path, networks: str) -> Result:
    words = ["--models", networks, "--dataset", "folder", "--data-dir", str(images)]
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
        (f"squeezenet1_1={tmp_path}/five.pth", "it has 5 outputs, and the data 3 classes"),
        ("mine=runs:/0123456789abcdef0123456789abcdef", "none there"),
    ):
        result = evaluate(images, network)
        assert result.exit_code == 2 and words in result.stderr, result.stderr
    assert len(MlflowClient().search_runs(["0"])) == before
