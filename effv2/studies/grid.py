"""A fixed grid: arms by seeds, each trained once, then compared. What `ablate` and `hparam-check` run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import optuna

from effv2.config.layers import Layer
from effv2.config.options import LogModel
from effv2.config.schema import TrainConfig
from effv2.core import provenance
from effv2.core.errors import InputError
from effv2.core.reporter import Message
from effv2.execution.resolve import place, resolve_study
from effv2.run.outcome import restore
from effv2.run.run import check
from effv2.studies.files import Study
from effv2.studies.plan import LoadData, PlannedRun, Purpose, Trials, best_of, discard_weights
from effv2.studies.queue import RUN
from effv2.tracking.run import TrackedRun


@dataclass(frozen=True)
class Grid:
    """The resolved arms of a study, all of them, and the (arm, seed) pairs that are wanted now."""

    purpose: Purpose
    arms: Mapping[str, TrainConfig]
    data: Mapping[str, str]
    wanted: Sequence[tuple[str, int]]
    samples: bool = False

    @cached_property
    def slots(self) -> dict[str, dict[str, Any]]:
        """Return a slot for each wanted pair."""
        return {f"{arm}, seed {seed}": {"arm": arm, "seed": seed} for arm, seed in self.wanted}

    @property
    def epochs(self) -> int:
        """Return the epochs of the longest arm."""
        return max(config.schedule.epochs for config in self.arms.values())

    def definition(self) -> dict[str, Any]:
        """Return every arm, whichever are wanted; seeds are left out, so that a study may grow by some."""
        arms = {arm: config.identity() for arm, config in self.arms.items()}
        for flat in arms.values():
            del flat["random.seed"]
        return {"arms": arms, "data": dict(self.data), "code": provenance.code_version()}

    def sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """Return one that never has to choose: all parameters are fixed."""
        return optuna.samplers.RandomSampler(seed=number)

    def pruner(self) -> optuna.pruners.BasePruner:
        """Return one that never prunes."""
        return optuna.pruners.NopPruner()

    def run_of(self, slot: str, trial: optuna.Trial) -> PlannedRun:
        """Return the run of the trial's arm and seed."""
        arm = trial.suggest_categorical("arm", sorted(self.arms))  # one order, whatever that of the study file
        seed = trial.suggest_int("seed", 0, 2**32 - 1)
        return PlannedRun(slot, arm, self.arms[arm].with_seed(seed))

    def publish(self, trials: Trials, parent: TrackedRun, log_model: LogModel, load: LoadData) -> None:
        """Log the best run's model where it is wanted."""
        if log_model == "best":
            self._log_best_model(trials, parent, load)

    def _log_best_model(self, trials: Trials, parent: TrackedRun, load: LoadData) -> None:
        best = best_of(trials)
        if best is not None:
            config = self.arms[best.params["arm"]].with_seed(best.params["seed"])
            run = TrackedRun(best.user_attrs[RUN], parent.experiment_id)
            if not run.model_address():
                restore(run, config, load(config.data)).log_model()
        discard_weights(trials, parent)


def make_grid(
    kind: str,
    study: Study,
    chosen: Sequence[str],
    options: Layer,
    *,
    seeds: Sequence[int],
    load: LoadData,
    message: Message,
) -> Grid:
    """Load every data set and check it, so that nothing wrong is found half-way, then resolve `auto`.

    `chosen` are the names of the wanted arms; `seeds` go before those of the study, those before its arms' own.
    """
    asked = [with_device(study.arm(name, options)) for name in study.arms]
    for config in asked:
        check(config, load(config.data))
    if len({config.evaluation.test_set for config in asked}) > 1:
        raise InputError("evaluation.test_set: true in some arms and false in others; give all arms the same.")
    arms = dict(zip(study.arms, resolve_study(asked, message), strict=True))
    data = {name: load(config.data).digest() for name, config in arms.items()}
    every = seeds or study.seeds
    wanted = [(arm, seed) for seed in every for arm in chosen] or [(arm, arms[arm].random.seed) for arm in chosen]
    return Grid(Purpose(kind, study.name, study.description, study.retries, study.baseline), arms, data, wanted)
