"""What a study is to the engine that runs it: slots, the configuration of each, and what its end says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import optuna
from optuna.trial import FrozenTrial, TrialState

from effv2.config.options import LogModel
from effv2.config.schema import DataConfig, TrainConfig
from effv2.data.cache import OnDecoded
from effv2.data.dataset import Dataset, load_dataset
from effv2.run.outcome import WEIGHTS
from effv2.studies.queue import RUN
from effv2.tracking.read import read_runs
from effv2.tracking.writer import TrackedRun

Trials = Mapping[str, FrozenTrial]  # by slot
LoadData = Callable[[DataConfig], Dataset]


@dataclass(frozen=True)
class PlannedRun:
    """A training run of a study: its name, its arm where it has one, its configuration."""

    name: str
    arm: str
    config: TrainConfig


@dataclass(frozen=True)
class Purpose:
    """How a study is named and described, how often failed runs are tried again, what arms are held against."""

    kind: str
    name: str
    description: str
    retries: int
    baseline: str = ""


class Plan(Protocol):
    """A fixed grid or a search. Plans travel to worker processes, so they hold plain data alone."""

    @property
    def purpose(self) -> Purpose:
        """Return name and description."""

    @property
    def slots(self) -> Mapping[str, Mapping[str, Any]]:
        """Return the wanted slots with their fixed parameters, none where a sampler chooses them."""

    @property
    def epochs(self) -> int:
        """Return the epochs of a run at most."""

    @property
    def samples(self) -> bool:
        """Say whether a sampler chooses the parameters, and a pruner stops runs."""

    def definition(self) -> dict[str, Any]:
        """Return, as plain values, what makes this study this study: another definition is another study."""

    def sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """Return the sampler of a trial."""

    def pruner(self) -> optuna.pruners.BasePruner:
        """Return the pruner of all trials."""

    def run_of(self, slot: str, trial: optuna.Trial) -> PlannedRun:
        """Return the run of a claimed trial, its parameters suggested."""

    def publish(self, trials: Trials, parent: TrackedRun, log_model: LogModel, load: LoadData) -> None:
        """Log the best model and what else tracked runs don't hold. May be repeated."""


def digest(definition: Mapping[str, Any]) -> str:
    """Hash a definition to 12 hexadecimal digits."""
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()[:12]


def best_of(trials: Trials) -> FrozenTrial | None:
    """Return the complete trial with the highest value, the first of equals."""
    complete = [trial for trial in trials.values() if trial.state == TrialState.COMPLETE]
    return max(complete, key=lambda trial: (trial.value or 0.0, -trial.number), default=None)


def run_ids(trials: Trials) -> dict[str, str]:
    """Return the runs of the complete trials by slot."""
    return {slot: trial.user_attrs[RUN] for slot, trial in trials.items() if trial.state == TrialState.COMPLETE}


def discard_weights(trials: Trials, parent: TrackedRun) -> None:
    """Delete the weights that the study's own runs kept until its best was known."""
    for record in read_runs(run_ids(trials).values(), []):
        if record.parent == parent.run_id:
            TrackedRun(record.run_id, parent.experiment_id).discard(WEIGHTS)


class LoadedData:
    """Data sets, each loaded once a process."""

    def __init__(self, decoding: OnDecoded) -> None:
        self._decoding = decoding
        self._loaded: dict[DataConfig, Dataset] = {}

    def __call__(self, config: DataConfig) -> Dataset:
        """Load a data set, or return the loaded one."""
        if config not in self._loaded:
            self._loaded[config] = load_dataset(config, self._decoding)
        return self._loaded[config]
