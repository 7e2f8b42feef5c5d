"""Searches and hyper-parameter checks as users run them, and repeated commands."""

from __future__ import annotations

import csv
import math
import os
import signal
from pathlib import Path

import optuna
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from effv2.cli.main import ablate, hparam_check, search, train
from effv2.config.layers import Written
from effv2.config.schema import TrainConfig
from effv2.config.studies import open_study
from effv2.core.reporter import Reporter
from effv2.data.dataset import load_once
from effv2.studies.plan import make_search
from effv2.training import loop
from tests.conftest import TINY_TABLE, all_runs, invoke, running

TINY_SEARCH = f"""
name: tiny-search
config:
  data: {{image_size: 8, per_class: 60}}
  model: {{variant: tiny, table: {TINY_TABLE}}}
  schedule: {{epochs: 4}}
  execution: {{device: cpu, precision: fp32}}
search:
  trials: 6
  min_epochs: 2
  space:
    model.dropout: {{low: 0, high: 0.6}}
    optimiser.lr: {{low: 1e-4, high: 1e-1, log: true}}
    optimiser.batch_size: {{low: 16, high: 64, log: true}}
"""


@pytest.fixture
def tiny_search(tmp_path: Path) -> Path:
    path = tmp_path / "search.yaml"
    path.write_text(TINY_SEARCH)
    return path


def artifacts(run: Run) -> set[str]:
    return {file.path for file in MlflowClient().list_artifacts(run.info.run_id)}


def touching_the_test_set(children: list[Run]) -> list[Run]:
    return [run for run in children if any("test" in name for name in run.data.metrics)]


def test_search_touches_the_test_set_once_and_can_grow(sqlite_store: str, tiny_search: Path, tmp_path: Path) -> None:
    result = invoke(search, "--study", tiny_search)
    assert result.exit_code == 0, result.output
    parent, *children = all_runs()
    outcomes = [run.data.tags["effv2.outcome"] for run in children]
    assert len(children) == 6 and set(outcomes) == {"complete", "pruned"}
    assert min(len(MlflowClient().get_metric_history(run.info.run_id, "val/accuracy")) for run in children) == 2
    assert {run.info.status for run in (parent, *children)} == {"FINISHED"}
    complete = [run for run in children if run.data.tags["effv2.outcome"] == "complete"]
    best = max(complete, key=lambda run: run.data.metrics["selected/val_accuracy"])
    assert [run.info.run_id for run in touching_the_test_set(children)] == [best.info.run_id]
    assert parent.data.tags["effv2.best_run"] == best.info.run_id
    report = Path(MlflowClient().download_artifacts(parent.info.run_id, "report.md", str(tmp_path)))
    assert f"Trials: {len(complete)} complete, {6 - len(complete)} pruned" in report.read_text()
    for name in ("selected/val_accuracy", "selected/test_accuracy"):
        assert parent.data.metrics[name] == best.data.metrics[name]
    assert artifacts(parent) >= {
        "best.yaml", "trials.csv", "importance.png", "history.png", "slice.png", "parallel_coordinate.png",
    }  # fmt: skip
    assert [run for run in children if run.outputs and run.outputs.model_outputs] == [best]
    assert not any("selected.pt" in artifacts(run) for run in children)

    assert invoke(search, "--study", tiny_search).exit_code == 0 and len(all_runs()) == 7
    assert invoke(search, "--study", tiny_search, "--trials", "8").exit_code == 0
    grown, *children = all_runs()
    assert len(children) == 8 and grown.info.run_id == parent.info.run_id
    looks = grown.data.tags["effv2.tested_runs"].split(",")  # one, or two if the grown search found a better one
    assert {run.info.run_id for run in touching_the_test_set(children)} == set(looks) and len(looks) <= 2

    best_yaml = MlflowClient().download_artifacts(parent.info.run_id, "best.yaml", str(tmp_path))
    assert invoke(train, "--study", best_yaml, "--log-model", "none").exit_code == 0
    again, chosen = all_runs()[-1], MlflowClient().get_run(grown.data.tags["effv2.best_run"])
    for name in ("selected/val_accuracy", "selected/test_accuracy"):
        assert again.data.metrics[name] == chosen.data.metrics[name]


def test_hparam_check_ends_with_a_comparison(sqlite_store: str, tiny_study: Path) -> None:
    unused = f"  unused: {{model: {{variant: tiny, table: {TINY_TABLE}}}, optimiser: {{lr: 0.01}}}}"
    text = tiny_study.read_text().replace("  other:", f"{unused}\n  dropout:")
    tiny_study.write_text(text)
    assert invoke(hparam_check, "--study", tiny_study, "--check", "dropout", "--log-model", "none").exit_code == 0
    parent, *children = all_runs()
    assert [run.data.tags["effv2.arm"] for run in children] == [
        "default", "dropout", "default_plateau", "dropout_plateau",
    ]  # fmt: skip
    assert [run.data.params["schedule.name"] for run in children] == ["none", "none", "plateau", "plateau"]
    assert artifacts(parent) >= {"report.html", "report.md", "figures", "comparison.csv"}
    # The other arms of the study join the same run.
    words = ["--check", "all", "--scheduler", "plateau", "--log-model", "none"]
    assert invoke(hparam_check, "--study", tiny_study, *words).exit_code == 0
    same, *children = all_runs()
    assert same.info.run_id == parent.info.run_id and children[-1].data.tags["effv2.arm"] == "unused_plateau"
    assert len(children) == 5


def test_a_changed_study_says_what_differs_and_repeats_only_that(sqlite_store: str, tiny_study: Path) -> None:
    assert invoke(ablate, "--study", tiny_study, "--log-model", "none").exit_code == 0
    text = tiny_study.read_text()
    tiny_study.write_text(text.replace("other: {model", "other: {optimiser: {lr: 0.01}, model"))
    result = invoke(ablate, "--study", tiny_study, "--log-model", "none")
    assert "other: optimiser.lr was 0.001, is 0.01." in result.stderr
    first, _, _, second, *added = all_runs()
    assert first.info.run_id != second.info.run_id
    assert [run.data.tags["effv2.arm"] for run in added] == ["other"]
    assert {"default/final/test_accuracy", "other/final/test_accuracy"} <= second.data.metrics.keys()


def test_train_again_repeats_only_when_fresh(
    sqlite_store: str, tiny_search: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_search.write_text(TINY_SEARCH.partition("search:")[0])
    for _ in range(2):
        result = invoke(train, "--study", tiny_search, "--log-model", "none")
    assert "Finished before" in result.output and len(all_runs()) == 1
    assert all_runs()[0].info.run_id in result.output and "without a model" not in result.output
    assert "but without a model; --fresh repeats it" in invoke(train, "--study", tiny_search).output
    # The interrupted fresh run is resumed, not the older one.
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        assert invoke(train, "--study", tiny_search, "--fresh").exit_code == 130
    result = invoke(train, "--study", tiny_search, "--log-model", "none")
    assert "resuming the run" in result.stderr and len(all_runs()) == 2
    assert {run.info.status for run in all_runs()} == {"FINISHED"}


def test_a_study_whose_run_was_deleted_begins_again(sqlite_store: str, tiny_study: Path) -> None:
    assert invoke(ablate, "--study", tiny_study, "--log-model", "none").exit_code == 0
    deleted = all_runs()[0].info.run_id
    MlflowClient().delete_run(deleted)
    result = invoke(ablate, "--study", tiny_study, "--log-model", "none")
    assert result.exit_code == 0 and "has no run of this study, so a new one is started there." in result.stderr
    parents = [run for run in all_runs() if "mlflow.parentRunId" not in run.data.tags]
    assert [run.info.run_id != deleted and run.info.status for run in parents] == ["FINISHED"]


def test_a_trial_whose_run_was_deleted_begins_again(
    sqlite_store: str, tiny_study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words: tuple[str | Path, ...] = ("--study", tiny_study, "--variant", "default", "--log-model", "none")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        assert invoke(ablate, *words).exit_code == 130
    (deleted,) = (run.info.run_id for run in all_runs() if "mlflow.parentRunId" in run.data.tags)
    MlflowClient().delete_run(deleted)
    gc = ["gc", "--backend-store-uri", sqlite_store, "--run-ids", deleted]
    with running("-m", "mlflow", *gc) as process:
        said = process.rest()
    assert process.returncode == 0, said
    with pytest.raises(MlflowException, match="not found"):
        MlflowClient().get_run(deleted)
    assert invoke(ablate, *words).exit_code == 0
    assert [run.info.status for run in all_runs()] == ["FINISHED", "FINISHED"]
    MlflowClient().delete_run(all_runs()[1].info.run_id)
    repeated = invoke(ablate, *words)
    assert repeated.exit_code == 0 and "1 finished runs were deleted from the tracking store" in repeated.stderr
    parent, again = all_runs()
    assert {run.info.status for run in (parent, again)} == {"FINISHED"}
    table = Path(MlflowClient().download_artifacts(parent.info.run_id, "comparison.csv", str(tmp_path))).read_text()
    assert again.info.run_id in table and len(table.splitlines()) == 2


def test_a_trial_of_an_earlier_search_brings_its_epochs_along(
    sqlite_store: str, tiny_search: Path, tmp_path: Path
) -> None:
    for high in ("0.6", "0.7"):
        tiny_search.write_text(TINY_SEARCH.replace("high: 0.6", f"high: {high}"))
        assert invoke(search, "--study", tiny_search, "--trials", "1", "--log-model", "none").exit_code == 0
    first, trained, second = all_runs()
    for parent in (first, second):
        table = Path(MlflowClient().download_artifacts(parent.info.run_id, "trials.csv", str(tmp_path))).read_text()
        (row,) = csv.DictReader(table.splitlines())
        assert (row["epochs"], row["run_id"]) == ("4", trained.info.run_id)


def test_workers_share_a_search(sqlite_store: str, tiny_search: Path) -> None:
    result = invoke(search, "--study", tiny_search, "--workers", "2", "--log-model", "all")
    assert result.exit_code == 0, result.output
    parent, *children = all_runs()
    assert len(children) == 6 and {run.info.status for run in (parent, *children)} == {"FINISHED"}
    (best,) = touching_the_test_set(children)
    assert parent.data.metrics["selected/test_accuracy"] == best.data.metrics["selected/test_accuracy"]
    for run in children:
        assert bool(run.outputs and run.outputs.model_outputs) == (run.data.tags["effv2.outcome"] == "complete")
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id


def test_a_best_run_without_weights_is_trained_again_for_its_model(sqlite_store: str, tiny_study: Path) -> None:
    assert invoke(ablate, "--study", tiny_study, "--log-model", "none").exit_code == 0
    assert invoke(ablate, "--study", tiny_study, "--log-model", "best").exit_code == 0
    _, *children = all_runs()
    assert len(children) == 2 and {run.info.status for run in children} == {"FINISHED"}
    assert len([run for run in children if run.outputs and run.outputs.model_outputs]) == 1


def test_the_order_of_arms_changes_nothing(sqlite_store: str, tiny_study: Path) -> None:
    assert invoke(ablate, "--study", tiny_study, "--log-model", "none").exit_code == 0
    *head, default, other = tiny_study.read_text().strip().splitlines()
    tiny_study.write_text("\n".join([*head, other, default, "baseline: default"]))
    assert invoke(ablate, "--study", tiny_study, "--log-model", "none", "--seeds", "0,1").exit_code == 0
    assert len(all_runs()) == 5


def test_a_trial_is_pruned_after_a_quarter_of_its_epochs_at_the_earliest() -> None:
    settings = {"data.image_size": 8, "schedule.epochs": 30, "execution.precision": "fp32"}
    options = {name: Written(value) for name, value in settings.items()}
    load = load_once(Reporter())
    pruner = make_search(open_study("search"), options, 0, load, Reporter()).pruner()
    study = optuna.create_study(direction="maximize", pruner=pruner)
    pruned_at = []
    for accuracy in (0.9, 0.8, 0.1, 0.1):
        trial = study.ask()
        for epoch in range(1, 31):
            trial.report(accuracy, epoch)
            if trial.should_prune():
                pruned_at.append(epoch)
                break
    assert pruned_at == [7, 7, 7]


@pytest.mark.parametrize(("sound", "code", "status"), [(1, 0, "FINISHED"), (0, 1, "FAILED")])
def test_a_search_counts_diverging_trials_unless_all_diverge(
    sqlite_store: str, tiny_search: Path, monkeypatch: pytest.MonkeyPatch, sound: int, code: int, status: str
) -> None:
    """Trials diverge in their second epoch. If `sound`, the first one doesn't."""
    tiny_search.write_text(TINY_SEARCH.replace("trials: 6", "trials: 3"))
    check = loop.Training._must_be_finite

    def must_be_finite(training: loop.Training, loss: float, name: str) -> None:
        first = training.config.optimiser.lr == TrainConfig().optimiser.lr
        check(training, math.nan if training.state.progress.epoch and not (first and sound) else loss, name)

    monkeypatch.setattr(loop.Training, "_must_be_finite", must_be_finite)
    for _ in range(2):  # the repeated command says it too
        result = invoke(search, "--study", tiny_search, "--log-model", "none")
        parent, *children = all_runs()
        assert (result.exit_code, parent.info.status, len(children)) == (code, status, 3), result.output
    assert [run.data.tags["effv2.outcome"] for run in children].count("failed") == 3 - sound
    assert sound or "No trial of the search was completed: 3 of 3 runs failed. trial 0: The train" in result.stderr
    assert sound or "Traceback" not in result.output
