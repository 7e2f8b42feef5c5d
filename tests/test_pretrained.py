"""Evaluations of published weights: as plain PyTorch, ranked, resumed, never repeated."""

from __future__ import annotations

import csv
import hashlib
import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image
from torchvision import models

from effv2.cli.main import evaluate_pretrained
from effv2.core.words import percent
from effv2.evidence.statistics import wilson
from effv2.pretrained import evaluation
from effv2.run.weights import Requested, load_network
from effv2.training import evaluation as training_evaluation
from tests.conftest import ROOT, all_runs, invoke, running, seeded_weights

SQUEEZENET = "weights/squeezenet1_1-imagenet-caffe-ndf.pth"


def evaluate_squeezenets(images: Path, files: Sequence[Path], *words: str) -> Result:
    """Evaluate the networks in `files` on a folder of images."""
    models_ = ",".join(f"squeezenet1_1={file}" for file in files)
    return invoke(evaluate_pretrained, "--models", models_, "--dataset", "folder", "--data-dir", images, *words)


def artifact(run: Run, name: str, folder: Path) -> list[dict[str, str]]:
    path = MlflowClient().download_artifacts(run.info.run_id, name, str(folder))
    with Path(path).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def two_files(tmp_path: Path) -> list[Path]:
    return [seeded_weights(tmp_path / f"{seed}.pth", "squeezenet1_1", seed) for seed in (1, 2)]


@pytest.fixture
def short_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use 2 images as a full batch, since 128 take long, and time it once."""
    monkeypatch.setattr(evaluation, "FULL_BATCH_IMAGES", 2)
    monkeypatch.setattr(training_evaluation, "TIMED_PASSES", 1)


@pytest.mark.usefixtures("short_batches")
def test_real_weights_predict_as_plain_pytorch_does(sqlite_store: str, real_data: Path, tmp_path: Path) -> None:
    file = real_data / SQUEEZENET
    result = invoke(
        evaluate_pretrained,
        "--models",
        f"squeezenet1_1={file}",
        "--data-dir",
        real_data,
        "--limit",
        "60",
        "--seed",
        "3",
    )
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
    result = invoke(evaluate_pretrained, "--models", models_, "--dataset", "folder", "--data-dir", few_images)
    assert result.exit_code == 0, result.output
    parent, *children = all_runs()
    assert [run.data.tags["mlflow.runName"] for run in children] == named
    for run, name in zip(children, named, strict=True):
        metrics, params = run.data.metrics, run.data.params
        assert run.info.status == "FINISHED" and run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        meta = models.get_model_weights(name).DEFAULT.meta
        assert metrics["model/parameters"] == meta["num_params"]
        assert metrics["model/gflops"] == pytest.approx(meta["_ops"], abs=1e-3)
        assert "published/top1_accuracy" not in metrics  # no accuracy is published for these files
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
    """A published file and the user's own are different runs, even with equal bytes: one is verified."""
    own = seeded_weights(tmp_path / "mine.pth", "squeezenet1_1")
    head = hashlib.sha256(own.read_bytes()).hexdigest()[:8]
    published = models.SqueezeNet1_1_Weights.IMAGENET1K_V1
    monkeypatch.setattr(published.value, "url", f"http://127.0.0.1:9/squeezenet1_1-{head}.pth")
    hub.mkdir(parents=True)
    (hub / f"squeezenet1_1-{head}.pth").write_bytes(own.read_bytes())
    images = ("--dataset", "folder", "--data-dir", few_images)

    def evaluated(*words: str | Path) -> list[Run]:
        before = {run.info.run_id for run in all_runs()}
        assert invoke(evaluate_pretrained, *words, *images).exit_code == 0
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
def test_weights_that_are_not_finite_fail_their_run(sqlite_store: str, few_images: Path, tmp_path: Path) -> None:
    file = seeded_weights(tmp_path / "squeezenet1_1.pth", "squeezenet1_1")
    torch.save({name: value * math.nan for name, value in torch.load(file, weights_only=True).items()}, file)
    result = evaluate_squeezenets(few_images, [file])
    assert result.exit_code == 1 and "not all finite numbers; the weights are damaged" in result.stderr
    assert [run.info.status for run in all_runs()] == ["FAILED", "FAILED"]


def test_a_batch_too_large_for_the_memory_costs_only_its_latency(
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
def test_finished_evaluations_are_not_repeated(
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

    # The run that --fresh began is resumed, and reuses nothing from earlier ones.
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
    """Another comparison in between ends the runs that a killed one left open."""
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
    assert invoke(evaluate_pretrained, *words).exit_code == 0
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

    first = min(few_images.rglob("*.JPEG"))  # the example of a request, in an unusual mode
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
    result = invoke(evaluate_pretrained, "--models", "efficientnet_b0,squeezenet1_1", "--data-dir", real_data)
    assert result.exit_code == 0, result.output
    for run in all_runs()[1:]:
        metrics = run.data.metrics
        assert run.data.params["weights.verified"] == "True"
        assert metrics["unseen/top1_accuracy"] == pytest.approx(metrics["published/top1_accuracy"], abs=0.12)
    assert "efficientnet_b0 is better than squeezenet1_1" in result.output
