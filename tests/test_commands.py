"""The commands as users run them: what they log, print and repeat, and how they end."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import click
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from effv2.api.console import ConsoleReporter
from effv2.architecture import parse_table
from effv2.cli.main import ablate, evaluate_pretrained, search, train
from effv2.cli.options import in_options
from effv2.config.schema import DataConfig, TrainConfig
from effv2.core.reporter import Reporter, StudyProgress
from effv2.data.dataset import load_dataset, load_once
from effv2.run.few_images import in_words
from effv2.run.run import RunSpec, prepare
from tests.conftest import ROOT, TINY_MODEL, TINY_TABLE, all_runs, invoke, make_image_tree

EPOCH_METRICS = {
    "train/loss", "train/accuracy", "test/loss", "test/accuracy", "val/loss", "val/accuracy", "learning_rate",
    "time/epoch_seconds", "time/train_seconds", "time/evaluate_seconds",
    "throughput/train_images_per_second", "throughput/evaluate_images_per_second",
}  # fmt: skip
FINAL_METRICS = {
    "best/test_accuracy", "best/epoch", "selected/test_accuracy", "selected/epoch", "final/test_accuracy",
    "selected/test_ece", "model/parameters", "model/gflops",
}  # fmt: skip


TINY_TRAINING = f"""
name: tiny
config:
  data: {{{{image_size: 8}}}}
  model: {{{{variant: tiny, table: {TINY_TABLE}}}}}
  optimiser: {{{{lr: {{lr}}}}}}
  schedule: {{{{epochs: {{epochs}}}}}}
  execution: {{{{device: cpu, precision: fp32}}}}
"""


def test_ablation_holds_everything(store: str, tiny_study: Path, tmp_path: Path) -> None:
    seeds = [0, 1] if store.startswith("sqlite:") else [0]
    words = ["--seeds", ",".join(map(str, seeds)), "--experiment", "tiny"]
    result = invoke(ablate, "--study", tiny_study, "--variant", "other", *words)
    assert result.exit_code == 0, result.output
    parent, *children = all_runs()
    client = MlflowClient()
    assert [run.data.tags["mlflow.runName"] for run in children] == [
        f"{arm}, seed {seed}" for seed in seeds for arm in ("default", "other")
    ]
    for run in (parent, *children):
        assert run.info.status == "FINISHED"
        assert client.get_experiment(run.info.experiment_id).name == "tiny"
    for run in children:
        tags, params, metrics = run.data.tags, run.data.params, run.data.metrics
        assert tags["mlflow.parentRunId"] == parent.info.run_id
        assert {f"effv2.{name}" for name in ("config_hash", "data_digest", "code_version", "pid")} <= tags.keys()
        assert tags["effv2.study"] == "tiny" and tags["effv2.seed"] == params["random.seed"]
        assert params["model.variant"] == tags["effv2.variant"] and params["data.image_size"] == "8"
        assert all("." in name for name in params)
        assert metrics.keys() >= EPOCH_METRICS | FINAL_METRICS
        for name in EPOCH_METRICS:
            assert [m.step for m in client.get_metric_history(run.info.run_id, name)] == [1, 2]
        assert run.inputs and run.outputs
        inputs = {item.tags[0].value: item.dataset for item in run.inputs.dataset_inputs}
        assert inputs.keys() == {"train", "validation", "test"}
        assert json.loads(inputs["train"].profile or "")["classes"]["3"] == 12
        artifacts = {file.path for file in client.list_artifacts(run.info.run_id)}
        assert artifacts >= {"study.yaml", "predictions.csv", "per_class.csv", "confusion_matrix.csv", "curves.png"}
        assert artifacts >= {"wrong.jpg", "reliability.png"}
        assert len(run.outputs.model_outputs) == 1
    assert len({run.data.tags["effv2.config_hash"] for run in children}) == 2 * len(seeds)
    assert "| test accuracy, best epoch |" in parent.data.tags["mlflow.note.content"]
    mean = statistics.fmean(run.data.metrics["final/test_accuracy"] for run in children[::2])
    assert parent.data.metrics["default/final/test_accuracy"] == pytest.approx(mean)
    table = Path(client.download_artifacts(parent.info.run_id, "comparison.csv", str(tmp_path))).read_text()
    best = {run.info.run_id: run.data.metrics["best/test_accuracy"] for run in children}
    for line in table.splitlines()[1:]:
        _, _, run_id, value, *_ = line.split(",")
        assert float(value) == best[run_id]
    images = Path(client.download_artifacts(parent.info.run_id, "images.csv", str(tmp_path))).read_text()
    assert {"differing.jpg", "report.html"} <= {file.path for file in client.list_artifacts(parent.info.run_id)}
    page = Path(client.download_artifacts(parent.info.run_id, "report.html", str(tmp_path))).read_text()
    assert page.count("data:image/jpeg;base64,") == 3 and "Test images on which the arms differ most" in page
    shares = [[float(share) for share in line.split(",")[1:]] for line in images.splitlines()[1:]]
    apart = [abs(one - other) for one, other in shares]  # the images on which the arms differ most come first
    assert apart[0] > 0 and apart == sorted(apart, reverse=True)
    assert statistics.fmean(one for one, _ in shares) == pytest.approx(
        statistics.fmean(run.data.metrics["selected/test_accuracy"] for run in children[::2]), abs=1e-3
    )


def test_a_repeated_command_trains_nothing_unless_fresh(sqlite_store: str, tiny_study: Path) -> None:
    words = ["--study", str(tiny_study), "--variant", "default", "--log-model", "none"]
    for _ in range(2):
        assert invoke(ablate, *words).exit_code == 0
    assert len(all_runs()) == 2
    assert invoke(ablate, *words, "--fresh").exit_code == 0
    names = [run.info.run_name for run in all_runs() if "effv2.seed" not in run.data.tags]
    assert names[1] == f"{names[0]} 2"
    first, second = (run for run in all_runs() if "effv2.seed" in run.data.tags)
    timed = ("time/", "throughput/", "inference/")
    kept = [
        {name: value for name, value in run.data.metrics.items() if not name.startswith(timed)}
        for run in (first, second)
    ]
    assert kept[0] == kept[1] and len(kept[0]) > 10


def test_only_the_best_model_is_kept_when_asked(sqlite_store: str, tiny_study: Path) -> None:
    assert invoke(ablate, "--study", tiny_study, "--log-model", "best").exit_code == 0
    _, *children = all_runs()
    with_model = [run for run in children if run.outputs and run.outputs.model_outputs]
    assert len(with_model) == 1
    assert all(run.info.status == "FINISHED" for run in children)


@pytest.mark.parametrize("fault", ["diverges", "interrupted"])
def test_runs_that_end_badly_say_so(
    sqlite_store: str, tiny_study: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "diverges":
        optimiser = "optimiser: {name: sgd, momentum: 0.99, lr: 100, clip_norm: 0}"
        text = tiny_study.read_text().replace("config:", f"config:\n  {optimiser}")
        tiny_study.write_text(text.replace("epochs: 2", "epochs: 50"))
        code, status, words = 1, "FAILED", "no longer a finite number"
    else:
        from effv2.training import loop

        monkeypatch.setattr(loop, "evaluate", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        code, status, words = 130, "KILLED", "the same command without --fresh resumes them"
    result = invoke(ablate, "--study", tiny_study, "--fresh", "True")
    assert result.exit_code == code and words in result.output
    assert {run.info.status for run in all_runs()} == {status}


def test_a_study_is_shown_in_eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TTY_COMPATIBLE": "1", "COLUMNS": "80", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    clock = iter(range(10, 1000, 10))
    reporter = ConsoleReporter()
    monkeypatch.setattr(reporter._progress, "get_time", lambda: float(next(clock)))

    def shown() -> list[str]:
        with reporter.console.capture() as printed:
            reporter.console.print(reporter._progress)
        lines = re.sub(r"\x1b\[[0-9;]*m", "", printed.get()).splitlines()
        assert all(len(line) <= 80 for line in lines)
        return [" ".join(line.split()) for line in lines]

    reporter.progress("loading PyTorch")
    assert shown() == ["loading PyTorch " + 10 * "━"]
    reporter.study_progress(
        StudyProgress(6, 1, {"running": 1}, "m, seed 0, validation accuracy 90.00 %", {"a": "accuracy 90.00 %"})
    )
    reporter.run_started("efficientnet_v2_m_of_a_long_name, seed 1", 20)
    metrics = {"train/accuracy": 0.9, "val/accuracy": 0.8, "throughput/train_images_per_second": 1234.5}
    reporter.epoch(4, metrics, 0.85)
    for step in (1, 2, 3):
        reporter.step(5, step, 12, 1234.5)
    study, run, now = shown()
    assert re.match(r"study ━\S+ 1/6 \d.* left best: m, seed 0, va.*…$", study)
    assert re.match(r"efficientnet_v2_m_of_a_lo… ━\S+ 4/20 \d:\d\d:\d\d left train 90.0%, va.*$", run)
    assert re.match(r"training epoch 5 ━\S+ 3/12 \d.* left 1,23[45]\.\d images/s$", now)
    reporter.step(5, 12, 12, 1234.5)
    assert shown()[-1] == "evaluating " + 10 * "━"


@pytest.mark.parametrize("damage", ["removed", "overwritten"])
def test_a_queue_lost_during_a_study_is_named(
    sqlite_store: str, tiny_study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    from effv2.training import loop
    from effv2.training.evaluation import evaluate

    def lost(*args: Any) -> Any:
        (tmp_path / "optuna.db").unlink()
        if damage == "overwritten":
            (tmp_path / "optuna.db").write_bytes(b"something else" * 100)
        return evaluate(*args)

    words = (ablate, "--study", tiny_study, "--log-model", "none")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", lost)
        result = invoke(*words)
    assert result.exit_code == 1 and "optuna.db was removed, replaced or damaged" in result.stderr, result.stderr
    assert {run.info.status for run in all_runs()} == {"FAILED"}
    if damage == "removed":
        assert invoke(*words).exit_code == 0


def test_one_failing_arm_does_not_cost_the_others(sqlite_store: str, tiny_study: Path) -> None:
    text = tiny_study.read_text().replace(
        "default: {model", "default: {optimiser: {name: sgd, lr: 100, momentum: 0.99, clip_norm: 0}, model"
    )
    tiny_study.write_text(text.replace("epochs: 2", "epochs: 30"))
    result = invoke(ablate, "--study", tiny_study, "--log-model", "none")
    assert result.exit_code == 1 and "1 of 2 runs failed. default, seed 0" in result.output
    parent, *children = all_runs()
    assert [run.info.status for run in (parent, *children)] == ["FAILED", "FAILED", "FINISHED"]
    assert "comparison.csv" in {file.path for file in MlflowClient().list_artifacts(parent.info.run_id)}


def test_a_study_that_fails_while_it_begins_is_not_left_running(
    sqlite_store: str, tiny_study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("effv2.studies.engine._note_planned", Mock(side_effect=RuntimeError("a fault")))
    with pytest.raises(RuntimeError, match="a fault"):
        invoke(ablate, "--study", tiny_study)
    assert [run.info.status for run in all_runs()] == ["FAILED"]


def test_a_store_that_fails_for_a_moment_costs_no_run(
    sqlite_store: str, tiny_study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from effv2.tracking import store

    tiny_study.write_text(f"{tiny_study.read_text()}retries: 0\n")
    failures = iter([MlflowException("database is locked")])

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        for failure in failures:
            raise failure
        return open_run(*args, **kwargs)

    open_run = RunSpec.open_run
    monkeypatch.setattr(RunSpec, "open_run", interrupted)
    monkeypatch.setattr(store, "WAIT_SECONDS", 0.1)
    assert invoke(ablate, "--study", tiny_study, "--log-model", "none").exit_code == 0


def test_a_run_brings_the_study_file_that_repeats_it(sqlite_store: str, tiny_study: Path, tmp_path: Path) -> None:
    words: list[str | Path] = ["--log-model", "none", "--study"]
    assert invoke(ablate, *words, tiny_study, "--variant", "default", "--seeds", "7").exit_code == 0
    (_, first) = all_runs()
    again = MlflowClient().download_artifacts(first.info.run_id, "study.yaml", str(tmp_path))
    assert invoke(train, *words, again).exit_code == 0
    second = all_runs()[-1]
    for name in ("effv2.config_hash", "effv2.data_digest", "effv2.seed"):
        assert second.data.tags[name] == first.data.tags[name]
    assert second.data.metrics["test/loss"] == first.data.metrics["test/loss"]


def test_what_auto_chose_is_logged_with_its_reason(
    sqlite_store: str, tiny_study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("effv2.execution.resolve.cpu_has_bf16", lambda: True)
    study = tmp_path / "auto.yaml"
    study.write_text(tiny_study.read_text().replace("fp32", "auto").partition("arms:")[0] + TINY_MODEL)
    words = ["--study", str(study), "--log-model", "none"]
    assert invoke(train, *words).exit_code == 0
    (run,) = all_runs()
    assert run.data.params["execution.precision"] in ("fp32", "bf16")
    assert re.fullmatch(r"a step in bf16 is [\d.]+ times as fast as in fp32", run.data.tags["effv2.calibration"])


@pytest.mark.parametrize(
    ("command", "count", "runs"), [(ablate, "--seeds=0 --seeds=0,1", 4), (search, "--trials=1 --trials=2", 2)]
)
def test_auto_means_the_same_in_all_runs_of_a_study(
    sqlite_store: str, tiny_study: Path, monkeypatch: pytest.MonkeyPatch, command: click.Command, count: str, runs: int
) -> None:
    text = tiny_study.read_text().replace("fp32", "auto")
    tiny_study.write_text(text if command is ablate else text.partition("arms:")[0] + TINY_MODEL)
    words, (first, second) = ["--study", str(tiny_study), "--log-model", "none"], count.split()
    for prefers_bf16, option in ((True, first), (False, second)):  # as on two machines, or on a busy one
        monkeypatch.setattr("effv2.execution.resolve._prefers_bf16", lambda *_, found=prefers_bf16: found)
        done = invoke(command, *words, option)
        assert done.exit_code == 0
    assert "This study began with another precision than" in done.output
    _, *trained = all_runs()
    assert [run.data.params["execution.precision"] for run in trained] == ["bf16"] * runs
    if command is ablate:
        assert "The study is complete: nothing is left to train" in invoke(ablate, *words, second, "--plan").output
        planned = invoke(ablate, *words, "--seeds=0-2", "--plan").output
        assert "4 of 6 runs are finished" in planned and "estimated from finished runs" in planned
    monkeypatch.setattr("effv2.execution.resolve._prefers_bf16", lambda *_: True)
    done = invoke(command, *words, second, "--storage", f"sqlite:///{tiny_study.parent}/other.db")
    assert "Another storage has this study already" in done.output


@pytest.mark.parametrize(
    ("groups", "images", "expected"),
    [
        pytest.param({}, 60, (100, 1024), id="few images"),
        pytest.param({"optimiser": {"batch_size": 2}}, 60, (48, 0), id="some"),
        pytest.param({"schedule": {"epochs": 6}}, 60, (6, 1024), id="given epochs"),
        pytest.param({"evaluation": {"batch_norm_images": 0}}, 60, (100, 0), id="given images"),
        pytest.param({"optimiser": {"freeze_batch_norm": True}}, 60, (100, 1024), id="frozen"),
        pytest.param({"data": {"sampling": "published", "validation_fraction": 0}}, 60, (6, 0), id="published"),
        pytest.param({"data": {"dataset": "digits", "dir": ""}}, 0, (6, 0), id="digits"),
    ],
)
def test_few_images_get_more_epochs_and_estimates_of_batch_norm(
    tmp_path: Path, groups: dict[str, Any], images: int, expected: tuple[int, int]
) -> None:
    """Three classes of 20 images leave 42 training images next to the test and the validation images."""
    root, said = make_image_tree(tmp_path / "set", images=images // 3), list[str]()
    data = {"dataset": "folder", "dir": str(root), "image_size": 8} | groups.get("data", {})
    config = TrainConfig.model_validate(groups | {"data": data, "execution": {"precision": "fp32"}})
    configs = [config, config.with_seed(1)]
    found = prepare(configs, load_once(Reporter()), said.append)
    assert {(each.schedule.epochs, each.evaluation.batch_norm_images) for each in found} == {expected}
    assert bool(said) == (expected != (6, 0)) and all(f"Epochs: {expected[0]}, of " in each for each in said)
    estimated = expected[1] > 0 and not config.optimiser.freeze_batch_norm
    assert all(("batch norm estimated" in each) == estimated for each in said)


def test_a_training_near_chance_level_says_so(sqlite_store: str, tmp_path: Path) -> None:
    for epochs, said in ((2, True), (3, False)):
        study = tmp_path / f"{epochs}.yaml"
        study.write_text(TINY_TRAINING.format(epochs=epochs, lr=1e-6 if said else 0.02))
        result = invoke(train, "--study", study, "--log-model", "none")
        assert result.exit_code == 0 and ("The network is near chance level: " in result.stderr) == said, result.output


def test_what_an_accuracy_is_worth_depends_on_the_number_of_images(tmp_path: Path) -> None:
    def worth(images: int, accuracy: float) -> str:
        root = make_image_tree(tmp_path / f"{images}", images=images)
        data = load_dataset(DataConfig(dataset="folder", dir=str(root), image_size=8))
        return " ".join(in_words({"selected/test_accuracy": accuracy, "selected/epoch": 1.0}, data))

    few, many = worth(10, 0.4), worth(300, 0.35)
    assert few.startswith("40.00 % of the 6 test images are right [9.68 % to 70.00 %, 95 % interval over images].")
    assert "3 validation images selected epoch 1: too few to tell epochs apart." in few
    assert few.endswith("These images are too few to tell the two apart.")
    assert "validation images" not in many and many.endswith("It has learned next to nothing. Train for more epochs.")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("entry_points/train.py --help", "Usage:"),
        ("entry_points/evaluate_pretrained.py --help", "Usage:"),
        ("-m effv2 --help", "compare them in MLflow."),  # the end of a description that click would cut
        ("-m effv2 ablate --help", "Usage:"),
        ("-m effv2 train --weights nowhere.pth", "no such file"),
        ("-m effv2 evaluate-pretrained --models alexnet,resnet50=nowhere.pth --data-dir .", "is not a readable file"),
    ],
)
def test_help_and_missing_files_need_nothing_slow(words: str, said: str) -> None:
    """Without these imports, the answer appears at once. A clock would be unreliable on a busy machine."""
    command = [sys.executable, "-X", "importtime", *words.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert said in done.stdout + done.stderr and {"click", "effv2"} <= imported
    assert not imported & {"matplotlib", "mlflow", "numpy", "optuna", "PIL", "scipy", "sklearn", "sqlalchemy", "torch"}


def test_set_reaches_every_setting_and_the_command_that_resumes_is_logged(
    sqlite_store: str, tiny_study: Path, tmp_path: Path
) -> None:
    study = tmp_path / "one.yaml"
    study.write_text(tiny_study.read_text().partition("arms:")[0] + TINY_MODEL)
    words: list[str | Path] = ["--study", study, "--lr", "0.01", "--log-model", "none", "--fresh", "--set", ""]
    words += ["--set", "optimiser.name=sgd, optimiser.momentum=0.5", "--set", f"model.table={TINY_TABLE}"]
    result = invoke(train, *words)
    assert result.exit_code == 0 and re.search(r"^epoch 2/2: train [\d.]+%", result.stderr, re.MULTILINE)
    (run,) = all_runs()
    params = run.data.params
    assert (params["optimiser.name"], params["optimiser.momentum"], params["optimiser.lr"]) == ("sgd", "0.5", "0.01")
    assert parse_table(params["model.table"]) == parse_table(TINY_TABLE)
    command = shlex.split(run.data.tags["effv2.command"])
    assert command[:4] == ["effv2", "train", "--study", str(study)]
    assert command.count("--set") == 2 and "--fresh" not in command


def test_texts_name_the_options_of_their_command() -> None:
    text = "lower optimiser.batch_size or config.data.dir in a/data.dir.png, see `fresh` and `ablate`; model.dropout."
    assert in_options(text, ablate) == (
        "lower --batch-size or config.data.dir in a/data.dir.png, see --fresh and `ablate`; model.dropout."
    )
    assert in_options("lower execution.batch_size, data.dir", evaluate_pretrained) == "lower --batch-size, --data-dir"
    assert in_options("`fresh`: optimiser.lr was 1", train, settings=False) == "--fresh: optimiser.lr was 1"
