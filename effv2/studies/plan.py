"""What a study is to the engine that runs it: trials, how each is worked on, and what is computed once at the end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import optuna
from optuna.trial import FrozenTrial, TrialState

from effv2.config.options import LogModel
from effv2.config.schema import DataConfig, TrainConfig
from effv2.core.reporter import StudyProgress
from effv2.data.cache import OnDecoded
from effv2.data.dataset import Dataset, load_dataset
from effv2.run.outcome import WEIGHTS, restore, score_on_test
from effv2.run.resume import Attempt, attempt
from effv2.run.spec import RunSpec
from effv2.studies.queue import ERROR, NAME, RUN, Params, Trials
from effv2.tracking.accuracies import SELECTED_TEST
from effv2.tracking.read import read_runs
from effv2.tracking.writer import TrackedRun, model_address

LoadData = Callable[[DataConfig], Dataset]


@dataclass(frozen=True)
class StudyInfo:
    """How a study is named and described, how often failed runs are retried, which arm the others are compared with."""

    kind: str
    name: str
    description: str = ""
    retries: int = 0
    baseline: str = ""


@dataclass(frozen=True)
class Plan(ABC):
    """A fixed grid, a search, or published weights. Plans travel to worker processes, so they hold plain data alone.

    `trials` are those that are wanted now, by name, with their fixed parameters. A plan that `searches` lets a sampler
    choose the others; its poor and its diverged runs are pruned, and its best one is tested.
    """

    info: StudyInfo
    trials: Mapping[str, Params]
    searches: ClassVar[bool] = False

    @property
    def epochs(self) -> int:
        """Return the epochs of a trial at most."""
        return 1

    @abstractmethod
    def definition(self) -> dict[str, Any]:
        """Return, as plain values, what makes this study this study: another definition is another study."""

    def sampler(self, number: int) -> optuna.samplers.BaseSampler | None:
        """Return what chooses the parameters of a trial."""
        return None

    def pruner(self) -> optuna.pruners.BasePruner:
        """Return what ends poor trials."""
        return optuna.pruners.NopPruner()

    def suggest(self, trial: optuna.Trial) -> Params:
        """Return the parameters of a leased trial."""
        return {}

    @abstractmethod
    def execute(self, spec: RunSpec, params: Params, load: LoadData) -> Attempt:
        """Work on a trial, in a run named as it. It may be finished before, or interrupted."""

    @abstractmethod
    def conclude(self, trials: Trials, parent: TrackedRun, log_model: LogModel, load: LoadData) -> Mapping[str, str]:
        """Compute what needs all trials, once; return addresses of models logged now, by trial. May be repeated."""


class TrainingPlan(Plan):
    """A plan whose trials are trainings."""

    @abstractmethod
    def configuration(self, params: Params) -> TrainConfig:
        """Return the configuration of a trial with these parameters."""

    def execute(self, spec: RunSpec, params: Params, load: LoadData) -> Attempt:
        """Train the configuration."""
        config = self.configuration(params)
        return attempt(config, load(config.data), spec)

    def conclude(self, trials: Trials, parent: TrackedRun, log_model: LogModel, load: LoadData) -> Mapping[str, str]:
        """Log the model of the best run where it alone is wanted, and test the best run of a search."""
        best = best_of(trials)
        if best is None or not (log_model == "best" or self.searches):
            return {}
        run, config = TrackedRun(best.user_attrs[RUN], parent.experiment_id), self.configuration(best.params)
        records = {record.run_id: record for record in read_runs(run_ids(trials).values(), [])}
        model = log_model == "best" and not model_address(run.run_id)
        test = self.searches and SELECTED_TEST not in records[run.run_id].metrics
        if model or test:
            outcome = restore(run, config, load(config.data))
            if test:
                score_on_test(outcome)
            if model:
                outcome.log_model()
        for record in records.values():
            if record.parent == parent.run_id:  # the study's own: they kept their weights until the best was known
                TrackedRun(record.run_id, parent.experiment_id).discard(WEIGHTS)
        return {best.user_attrs[NAME]: model_address(run.run_id)} if model else {}


def best_of(trials: Trials) -> FrozenTrial | None:
    """Return the complete trial with the highest value, the first of equals."""
    complete = [trial for trial in trials.values() if trial.state == TrialState.COMPLETE]
    return max(complete, key=lambda trial: (trial.value or 0.0, -trial.number), default=None)


def run_ids(trials: Trials) -> dict[str, str]:
    """Return the runs of the complete trials by name."""
    return {name: trial.user_attrs[RUN] for name, trial in trials.items() if trial.state == TrialState.COMPLETE}


def progress_of(plan: Plan, trials: Trials) -> StudyProgress:
    """Sum up the wanted trials."""
    wanted = {name: trial for name, trial in trials.items() if name in plan.trials}
    count = {state: sum(trial.state == state for trial in wanted.values()) for state in TrialState}
    epochs = (max(t.intermediate_values, default=0) for t in wanted.values() if t.state == TrialState.RUNNING)
    finished = {name: trial for name, trial in wanted.items() if trial.state.is_finished()}
    best = best_of(wanted)
    order = sorted(finished, key=lambda name: str(finished[name].datetime_complete))
    return StudyProgress(
        total=len(plan.trials),
        pruned=count[TrialState.PRUNED],
        failed=count[TrialState.FAIL],
        running=count[TrialState.RUNNING],
        done=len(finished) + sum(min(1.0, each / plan.epochs) for each in epochs),
        best=(next(name for name in wanted if wanted[name] is best), best.value or 0.0) if best else None,
        ended={name: _ending(finished[name]) for name in order},
    )


def _ending(trial: FrozenTrial) -> str:
    if trial.state == TrialState.FAIL:
        return f"failed: {trial.user_attrs.get(ERROR, 'no reason known')}"
    word = "pruned at" if trial.state == TrialState.PRUNED else "reached"
    return f"{word} {trial.value or 0.0:.2%}"


def load_once(decoding: OnDecoded) -> LoadData:
    """Return what loads data sets, each once a process."""
    return cache(lambda config: load_dataset(config, decoding))
