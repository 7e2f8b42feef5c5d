"""A killed run is resumed in the same MLflow run, and its numbers equal those of an undisturbed one, bit for bit."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from click.testing import CliRunner, Result
from mlflow import MlflowClient
from mlflow.entities import Run

from effv2.cli.main import train
from effv2.tracking.writer import model_address
from tests.conftest import ROOT, TINY_TABLE, make_image_tree, running

EVERYTHING = f"""
name: everything
config:
  data: {{image_size: 16, per_class: 30}}
  augment: {{crop: 2, flip: true, trivial_augment: true, erasing: 0.3, mixup: 0.4, cutmix: 0.5}}
  model: {{variant: tiny, table: {TINY_TABLE}, dropout: 0.3, stochastic_depth: 0.5}}
  optimiser: {{batch_size: 20, ema_decay: 0.95, label_smoothing: 0.1}}
  schedule: {{name: plateau, plateau_patience: 2, epochs: EPOCHS}}
  evaluation: {{batch_norm_images: 40}}
  execution: {{device: cpu, precision: fp32}}
"""
TIMED = ("time/", "throughput/", "inference/")
long = [pytest.mark.slow, pytest.mark.timeout(1200)]


def all_runs(experiment: str) -> list[Run]:
    found = MlflowClient().get_experiment_by_name(experiment)
    return list(MlflowClient().search_runs([found.experiment_id])) if found else []


def histories(run: Run) -> dict[str, list[tuple[int, float]]]:
    """Return every value of every metric except times, in the order of their logging."""
    names = [name for name in run.data.metrics if not name.startswith(TIMED)]
    client = MlflowClient()
    return {name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)] for name in names}


def weights(run: Run) -> dict[str, torch.Tensor]:
    """Return the contents of the model that a run logged."""
    folder = mlflow.artifacts.download_artifacts(model_address(run.info.run_id))
    return dict(torch.export.load(Path(folder, "artifacts", "program.pt2")).state_dict)


def predictions(run: Run, folder: Path) -> str:
    return Path(MlflowClient().download_artifacts(run.info.run_id, "predictions.csv", str(folder))).read_text()


def check_equal(run: Run, expected: Run, folder: Path) -> None:
    assert run.info.status == "FINISHED"
    assert histories(run) == histories(expected)
    epochs = [step for step, _ in histories(expected)["train/loss"]]
    for name in ("time/epoch_seconds", "throughput/train_images_per_second"):
        assert [each.step for each in MlflowClient().get_metric_history(run.info.run_id, name)] == epochs
    ours, theirs = weights(run), weights(expected)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    assert predictions(run, folder / "a") == predictions(expected, folder / "b")


def kill(options: list[str], folder: Path, first: str, kills: int, longest: float) -> str:
    """Kill `kills` processes in turn, each a random time after its first file that matches; return their output.

    Without a pattern, the time begins when it resumes or has finished its first epoch.
    """
    said = ""
    moments = random.Random(0)  # noqa: S311
    for _ in range(kills):
        before = written(folder, first)
        with running(ROOT / "entry_points" / "train.py", *options) as process:
            while first and written(folder, first) in ({}, before):
                assert process.poll() is None, process.rest()
                time.sleep(0.01)
            if not first:
                said += process.until(r"resuming the run|epoch 1/")
            time.sleep(moments.uniform(0, longest))
            process.kill()
            said += process.rest() + "\0"
        assert process.returncode == -signal.SIGKILL, said
    return said


def written(folder: Path, pattern: str) -> dict[Path, int]:
    found = {}
    for path in folder.glob(pattern) if pattern else ():
        with suppress(FileNotFoundError):  # the file was just removed
            found[path] = path.stat().st_mtime_ns
    return found


@pytest.mark.parametrize(
    ("first", "kills", "epochs"),
    [
        pytest.param("checkpoints/*/step-*", 2, 20, id="twice, while it trains"),
        pytest.param("", 20, 300, id="twenty times", marks=long),
    ],
)
def test_kills_change_nothing(
    sqlite_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, kills: int, epochs: int
) -> None:
    study = tmp_path / "everything.yaml"
    study.write_text(EVERYTHING.replace("EPOCHS", str(epochs)))
    assert CliRunner().invoke(train, ["--study", str(study), "--experiment", "whole"]).exit_code == 0
    (expected,) = all_runs("whole")
    monkeypatch.setenv("EFFV2_CACHE", str(tmp_path / "cache"))
    options = ["--study", str(study), "--checkpoint-dir", str(tmp_path / "checkpoints"), "--checkpoint-minutes", "0"]
    longest = 0.6 * expected.data.metrics["time/total_train_seconds"] / kills  # the last kill comes before its end
    said = kill(options, tmp_path, first, kills, longest)
    result = CliRunner().invoke(train, options, catch_exceptions=False)
    assert result.exit_code == 0
    went_on = [int(epoch) for epoch in re.findall(r"resuming the run \w+ at epoch (\d+)", said + result.stderr)]
    assert len(went_on) == kills and went_on[-1] > 1 and went_on == sorted(went_on)  # finished epochs are not repeated
    (run,) = all_runs("Default")
    check_equal(run, expected, tmp_path)
    assert not list((tmp_path / "checkpoints").iterdir())


SHORT = EVERYTHING.replace("EPOCHS", "6").replace("per_class: 30", "per_class: 12")
DIES = """
import os, signal, sys
from mlflow import MlflowClient
from effv2.cli.main import train
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
MlflowClient.{where} = die
train(sys.argv[1:])
"""


INTERRUPTED = """
import os, signal, sys, time
from concurrent.futures import ThreadPoolExecutor
from mlflow import MlflowClient
from effv2.cli.main import train
def uploads_for_long(*_, **__):
    os.kill(os.getpid(), signal.SIGINT)
    ThreadPoolExecutor(1).submit(time.sleep, 100).result()
MlflowClient.log_model_artifacts = uploads_for_long
train(sys.argv[1:])
"""


def test_ctrl_c_while_the_model_is_logged_ends_within_seconds(
    sqlite_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EFFV2_CACHE", str(tmp_path / "cache"))
    study = tmp_path / "short.yaml"
    study.write_text(SHORT)
    with running("-c", INTERRUPTED, "--study", study) as process:
        process.until("epoch 6/6")
        began = time.monotonic()
        said = process.rest()
    assert process.returncode == 130 and "Interrupted" in said, said
    assert time.monotonic() - began < 60
    (run,) = all_runs("Default")
    assert run.info.status == "KILLED"


@pytest.mark.parametrize("where", ["log_model_artifacts", "set_terminated"])
def test_a_run_killed_at_its_end_is_completed(
    sqlite_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """The kill comes during the upload of the model, or when only the status is missing."""
    monkeypatch.setenv("EFFV2_CACHE", str(tmp_path / "cache"))
    study = tmp_path / "short.yaml"
    study.write_text(SHORT)
    with running("-c", DIES.format(where=where), "--study", study) as process:
        said = process.rest()
    assert process.returncode == -signal.SIGKILL, said
    result = CliRunner().invoke(train, ["--study", str(study)], catch_exceptions=False)
    assert result.exit_code == 0 and ("resuming the run" in result.stderr or "Finished before" in result.output)
    (run,) = all_runs("Default")
    assert run.info.status == "FINISHED"
    assert len(history := histories(run)["best/test_accuracy"]) == 1, history
    assert [step for step, _ in histories(run)["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert weights(run)


@pytest.mark.parametrize("folders", [("one", "one"), ("one", "other")], ids=["one folder", "two folders"])
def test_two_equal_commands_at_the_same_time_train_once(
    sqlite_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: tuple[str, str]
) -> None:
    monkeypatch.setenv("EFFV2_CACHE", str(tmp_path / "cache"))
    study = tmp_path / "everything.yaml"
    study.write_text(EVERYTHING.replace("EPOCHS", "20"))
    words: list[str | Path] = [ROOT / "entry_points" / "train.py", "--study", study]
    words += ["--log-model", "none", "--checkpoint-dir"]
    with running(*words, tmp_path / folders[0]) as first, running(*words, tmp_path / folders[1]) as second:
        said = [first.rest(), second.rest()]
    assert {first.returncode, second.returncode} == {0, 1}, said
    assert "trains this configuration" in said[1 if second.returncode else 0]
    assert [run.info.status for run in all_runs("Default")].count("FINISHED") == 1
    assert len([run for run in all_runs("Default") if run.data.tags["effv2.config_hash"]]) == 1


def test_another_machine_resumes_from_the_uploaded_checkpoint(
    sqlite_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from effv2.training import loop
    from effv2.training.evaluation import evaluate

    study = tmp_path / "short.yaml"
    study.write_text(SHORT)
    evaluations = iter(range(1, 99))

    def interrupted(*args: Any) -> Any:
        if next(evaluations) in (7, 10):  # two per epoch
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(*args)

    def invoke(where: str, *words: str) -> Result:
        words = ("--study", str(study), "--log-model", "none", "--checkpoint-dir", str(tmp_path / where), *words)
        return CliRunner().invoke(train, words, catch_exceptions=False)

    monkeypatch.setattr(loop, "evaluate", interrupted)
    upload = ("--checkpoint-upload-minutes", "60")
    assert invoke("here", *upload).exit_code == 130
    (run,) = all_runs("Default")
    (uploaded,) = MlflowClient().list_artifacts(run.info.run_id, "checkpoints")
    assert run.info.status == "KILLED" and re.fullmatch(r"checkpoints/step-\d+-\w{16}\.pt", uploaded.path)
    there = invoke("there", *upload)
    assert there.exit_code == 130 and "resuming the run" in there.stderr and "at epoch 4" in there.stderr
    # The first machine has an older checkpoint. It uploads nothing, and the uploaded one is no longer needed.
    result = invoke("here")
    assert result.exit_code == 0 and "resuming the run" in result.stderr and "at epoch 5" in result.stderr
    (run,) = all_runs("Default")
    assert run.info.status == "FINISHED" and not MlflowClient().list_artifacts(run.info.run_id, "checkpoints")


def test_a_run_that_ended_in_its_first_epoch_is_resumed_with_its_images_elsewhere(
    sqlite_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from effv2.training import loop

    root = make_image_tree(tmp_path / "here")
    study = tmp_path / "moved.yaml"
    study.write_text(
        "name: moved\nconfig:\n  data: {dataset: folder, image_size: 8, validation_fraction: 0}\n"
        f"  model: {{variant: tiny, table: {TINY_TABLE}}}\n  schedule: {{epochs: 1}}\n"
        "  execution: {device: cpu, precision: fp32}\n"
    )
    words = ["--study", str(study), "--log-model", "none", "--data-dir"]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        assert CliRunner().invoke(train, [*words, str(root)]).exit_code == 130
    result = CliRunner().invoke(train, [*words, str(root.rename(tmp_path / "there"))], catch_exceptions=False)
    assert result.exit_code == 0 and "resuming the run" in result.stderr, result.output
    (run,) = all_runs("Default")
    assert run.info.status == "FINISHED" and run.data.params["data.dir"] == str(root)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a small full file system. Skip the test where mounting is not allowed."""
    folder = tmp_path / "full"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        with suppress(OSError), (folder / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_costs_checkpoints_but_not_the_run(sqlite_store: str, tmp_path: Path, full_disk: Path) -> None:
    study = tmp_path / "short.yaml"
    study.write_text(SHORT)
    words = ["--study", str(study), "--checkpoint-dir", str(full_disk / "checkpoints"), "--checkpoint-minutes", "0"]
    result = CliRunner().invoke(train, words, catch_exceptions=False)
    assert result.exit_code == 0 and result.stderr.count("No space left on device") == 1
    (run,) = all_runs("Default")
    assert run.info.status == "FINISHED" and weights(run)
    assert [step for step, _ in histories(run)["train/loss"]] == [1, 2, 3, 4, 5, 6]
