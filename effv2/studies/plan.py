"""What a study is to the engine: trials, how each is worked on, what is computed once at the end; and a fixed grid.

A grid is arms by seeds, each trained once, then compared: what `ablate` and `hparam-check` run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import optuna
from optuna.trial import FrozenTrial, TrialState

from effv2.config.layers import Layer
from effv2.config.options import LogModel
from effv2.config.schema import TrainConfig
from effv2.config.studies import Study
from effv2.core import provenance
from effv2.core.errors import InputError
from effv2.core.reporter import Reporter, StudyProgress
from effv2.data.dataset import LoadData
from effv2.run.records import WEIGHTS, log_network, restore, score_on_test
from effv2.run.run import Attempt, RunSpec, attempt, prepare
from effv2.studies.queue import ERROR, NAME, RUN, Params, Trials
from effv2.tracking.read import SELECTED_TEST, read_runs
from effv2.tracking.writer import TrackedRun, model_address

ABOUT = {"name", "description", "retries", "baseline"}  # what a plan takes from a study file


@dataclass(frozen=True, kw_only=True)
class Plan(ABC):
    """A fixed grid, a search, or published weights. Plans travel to worker processes, so they hold plain data alone.

    `kind` is the command that makes it. `trials` are those that are wanted now, by name, with their fixed parameters.
    `definition` holds, as plain values, what makes this study this study: another definition is another study.
    `epochs` are those of a trial at most. A plan that `searches` lets a sampler choose the parameters; its poor and its
    diverged runs are pruned, and its best one is tested.
    """

    kind: str
    name: str
    trials: Mapping[str, Params]
    definition: Mapping[str, Any]
    epochs: int = 1
    description: str = ""
    retries: int = 0
    baseline: str = ""
    searches: ClassVar[bool] = False

    def sampler(self, number: int) -> optuna.samplers.BaseSampler | None:
        """Return what chooses the parameters of a trial."""
        return None

    def pruner(self) -> optuna.pruners.BasePruner | None:
        """Return what ends poor trials."""
        return None

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
            dataset = load(config.data)
            network = restore(run.run_id, config, dataset)
            if test:
                score_on_test(run, config, dataset, network)
            if model:
                log_network(run, config, dataset, network)
        for record in records.values():
            if record.parent == parent.run_id:  # the study's own: they kept their weights until the best was known
                TrackedRun(record.run_id, parent.experiment_id).discard(WEIGHTS)
        return {best.user_attrs[NAME]: model_address(run.run_id)} if model else {}


@dataclass(frozen=True, kw_only=True)
class Grid(TrainingPlan):
    """The resolved arms of a study, whichever are wanted. Trials have an arm and a seed."""

    arms: Mapping[str, TrainConfig]

    def suggest(self, trial: optuna.Trial) -> Params:
        """Return the trial's arm and seed."""
        arm = trial.suggest_categorical("arm", sorted(self.arms))  # one order, whatever that of the study file
        return {"arm": arm, "seed": trial.suggest_int("seed", 0, 2**32 - 1)}

    def configuration(self, params: Params) -> TrainConfig:
        """Return the arm with the seed."""
        return self.arms[params["arm"]].with_seed(params["seed"])


def make_grid(
    kind: str,
    study: Study,
    chosen: Sequence[str],
    options: Layer,
    *,
    seeds: Sequence[int],
    load: LoadData,
    reporter: Reporter,
) -> Grid:
    """Load every data set and check it, so that nothing wrong is found half-way, then resolve `auto`.

    `chosen` are the names of the wanted arms; `seeds` go before those of the study, those before its arms' own.
    """
    asked = [study.arm(name, options) for name in study.arms]
    if len({config.evaluation.test_set for config in asked}) > 1:
        problem = "true in some arms and false in others"
        raise InputError("evaluation.test_set", "", problem, "give all arms the same")
    arms = dict(zip(study.arms, prepare(asked, load, reporter.hint), strict=True))
    identities = {arm: config.identity() for arm, config in arms.items()}
    for identity in identities.values():
        del identity["random.seed"]  # so that a study may grow by some
    data = {arm: load(config.data).digest() for arm, config in arms.items()}
    definition = {"arms": identities, "data": data, "code": provenance.code_version()}
    epochs = max(config.schedule.epochs for config in arms.values())
    every = seeds or study.seeds
    wanted = [(arm, seed) for seed in every for arm in chosen] or [(arm, arms[arm].random.seed) for arm in chosen]
    trials = {f"{arm}, seed {seed}": {"arm": arm, "seed": seed} for arm, seed in wanted}
    about = study.model_dump(include=ABOUT)
    return Grid(kind=kind, trials=trials, definition=definition, epochs=epochs, arms=arms, **about)


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
