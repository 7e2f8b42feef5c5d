"""A fixed grid: arms by seeds, each trained once, then compared. What `ablate` and `hparam-check` run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna

from effv2.config.layers import Layer
from effv2.config.schema import TrainConfig
from effv2.config.studies import Study
from effv2.core import provenance
from effv2.core.errors import InputError
from effv2.core.reporter import Reporter
from effv2.execution.resolve import resolve_study, with_device
from effv2.run.run import check
from effv2.studies.plan import LoadData, StudyInfo, TrainingPlan
from effv2.studies.queue import Params


@dataclass(frozen=True)
class Grid(TrainingPlan):
    """The resolved arms of a study, all of them, and the digests of their data. Trials have an arm and a seed."""

    arms: Mapping[str, TrainConfig]
    data: Mapping[str, str]

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
    asked = [with_device(study.arm(name, options)) for name in study.arms]
    for config in asked:
        check(config, load(config.data))
    if len({config.evaluation.test_set for config in asked}) > 1:
        problem = "true in some arms and false in others"
        raise InputError("evaluation.test_set", "", problem, "give all arms the same")
    arms = dict(zip(study.arms, resolve_study(asked, reporter.hint), strict=True))
    data = {name: load(config.data).digest() for name, config in arms.items()}
    every = seeds or study.seeds
    wanted = [(arm, seed) for seed in every for arm in chosen] or [(arm, arms[arm].random.seed) for arm in chosen]
    trials = {f"{arm}, seed {seed}": {"arm": arm, "seed": seed} for arm, seed in wanted}
    info = StudyInfo(kind, study.name, study.description, study.retries, study.baseline)
    return Grid(info, trials, arms, data)
