"""Run the arms of a study under one parent run, then compare them there."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from effv2 import provenance
from effv2.config import DataConfig
from effv2.data.cache import Progress
from effv2.data.dataset import Dataset, load_dataset
from effv2.errors import RunError
from effv2.evidence.comparison import HISTORIES, Comparison
from effv2.execution.device import resolve_study
from effv2.experiment import Display, Labels, LogModel, Outcome, check, run_experiment
from effv2.studies.files import Arm, Study
from effv2.tracking.read import read_runs
from effv2.tracking.run import TrackedRun, start_run


@dataclass(frozen=True)
class PreparedRun:
    """A resolved arm and its loaded data."""

    arm: Arm
    dataset: Dataset


def prepare(arms: Sequence[Arm], decoding: Progress) -> list[PreparedRun]:
    """Resolve `auto` and load every data set once, so that nothing wrong with them is found half-way."""
    datasets: dict[DataConfig, Dataset] = {}
    prepared = []
    for arm, config in zip(arms, resolve_study([arm.config for arm in arms]), strict=True):
        if config.data not in datasets:
            datasets[config.data] = load_dataset(config.data, decoding)
        check(config, datasets[config.data])
        prepared.append(PreparedRun(Arm(arm.name, config), datasets[config.data]))
    return prepared


def run_ablation(
    study: Study, runs: Sequence[PreparedRun], experiment_id: str, log_model: LogModel, display: Display
) -> tuple[TrackedRun, Comparison]:
    """Train every arm, one after the other; return the parent run and the comparison logged on it.

    A run that fails (RunError) doesn't end the study: the rest goes on and is compared, then RunError names it.
    """
    tags = {"effv2.study": study.name, "effv2.code_version": provenance.code_version()}
    with start_run(study.name, experiment_id, tags) as parent:
        parent.log_params(
            {
                "study.name": study.name,
                "study.arms": ",".join(dict.fromkeys(run.arm.name for run in runs)),
                "study.seeds": ",".join(dict.fromkeys(str(run.arm.config.random.seed) for run in runs)),
            }
        )
        parent.log_git(provenance.git_state())
        best: Outcome | None = None
        finished: list[str] = []
        failed: list[str] = []
        for arm, dataset in ((run.arm, run.dataset) for run in runs):
            labels = Labels(
                f"{arm.name}, seed {arm.config.random.seed}", experiment_id, study.name, arm.name, nested=True
            )
            try:
                outcome = run_experiment(arm.config, dataset, labels, display, log_model == "all")
            except RunError as error:
                failed.append(f"{labels.name}: {error}")
                continue
            finished.append(outcome.run.run_id)
            if best is None or outcome.watched_accuracy > best.watched_accuracy:
                best = outcome
        if best is not None and log_model == "best":
            best.log_model()
        comparison = _compare(parent, study, finished)
        if failed:
            raise RunError(f"{len(failed)} of {len(runs)} runs failed. {' '.join(failed)}")
    return parent, comparison


def _compare(parent: TrackedRun, study: Study, finished: Sequence[str]) -> Comparison:
    """Compare the finished runs on the parent: table, figures, description, metrics."""
    comparison = Comparison.of(read_runs(finished, HISTORIES))
    if finished:
        with tempfile.TemporaryDirectory() as folder:
            comparison.write(Path(folder), study.name)
            parent.log_folder(Path(folder))
        parent.log_metrics(comparison.metrics())
        parent.describe(f"{study.description}\n\n{comparison.markdown()}")
    return comparison
