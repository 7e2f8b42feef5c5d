"""A planned run: how it is named and grouped in MLflow, how it is kept, who follows it, how it is known again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from effv2.config.options import CheckpointOptions
from effv2.config.schema import TrainConfig
from effv2.core import provenance
from effv2.core.reporter import Reporter
from effv2.data.dataset import Dataset
from effv2.execution.resolve import remembered
from effv2.tracking.read import Identity
from effv2.tracking.run import PATIENCE
from effv2.tracking.tags import ARM, CALIBRATION, COMMAND, MACHINE, SEED, STUDY, VARIANT


class Callback:
    """What a study wants to know of a run, and to decide: nothing, for a run of its own."""

    def run_opened(self, run_id: str) -> None:
        """Hear that the run is open."""

    def run_resumed(self, accuracy: float) -> None:
        """Hear that the run resumes from its checkpoint, with the best watched accuracy so far (below 0: none)."""

    def epoch_ended(self, epoch: int, metrics: Mapping[str, float]) -> bool:
        """Hear of an epoch, counted from 1; say whether to prune the run now."""
        return False

    def keeps_weights(self, accuracy: float) -> bool:
        """Say whether the weights of a run that reached this accuracy must outlive its process."""
        return False


@dataclass(frozen=True)
class RunSpec:
    """How a run is named, grouped and kept.

    `parent` is the id of the run that it becomes a child of, `previous` that of the run which an earlier attempt at the
    same trial left; None for a run of its own, which no queue knows. With `fresh`, nothing counts that was there before
    the run's study, or before the run itself. `resumes` is the id of a run that ended early and is resumed.
    """

    name: str
    experiment_id: str
    study: str = ""
    arm: str = ""
    parent: str = ""
    log_model: bool = True
    checkpoints: CheckpointOptions = field(default_factory=CheckpointOptions)
    fresh: bool = False
    previous: str | None = None
    resumes: str = ""
    reporter: Reporter = field(default_factory=Reporter)
    callback: Callback = field(default_factory=Callback)
    patience: float = PATIENCE  # seconds that the end of the run waits for a tracking store that is away


def identity(config: TrainConfig, dataset: Dataset) -> Identity:
    """Return what decides the numbers of a run: equal identities on one machine mean equal runs."""
    return Identity(config.hash(), dataset.digest(), provenance.code_version())


def machine_tags() -> dict[str, str]:
    """Return what a run is computed on, as tags."""
    return {f"{MACHINE}{name}": value for name, value in provenance.machine().items()}


def run_tags(config: TrainConfig, dataset: Dataset, spec: RunSpec) -> dict[str, str]:
    """Return the tags of a run: what it is known by, its study, arm, variant and seed, machine and command."""
    own = {STUDY: spec.study, ARM: spec.arm, VARIANT: config.model.variant, SEED: str(config.random.seed)}
    timed = remembered(config) if config.execution.device == "cpu" else None
    calibration = {CALIBRATION: str(timed)} if timed else {}
    command = {} if spec.parent else {COMMAND: provenance.COMMAND.get()}
    return identity(config, dataset).tags() | own | machine_tags() | calibration | command
