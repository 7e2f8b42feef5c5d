"""How a run is named, grouped and known again in MLflow."""

from __future__ import annotations

from dataclasses import dataclass

from effv2.config.schema import TrainConfig
from effv2.core import provenance
from effv2.data.dataset import Dataset
from effv2.execution.resolve import remembered
from effv2.tracking.read import Identity
from effv2.tracking.tags import ARM, CALIBRATION, COMMAND, SEED, STUDY, VARIANT


@dataclass(frozen=True)
class Labels:
    """How a run is named and grouped in MLflow.

    `parent` is the id of the run that it becomes a child of, `continues` that of a run that ended early and goes on.
    """

    name: str
    experiment_id: str
    study: str = ""
    arm: str = ""
    parent: str = ""
    continues: str = ""


def identity(config: TrainConfig, dataset: Dataset) -> Identity:
    """Return what decides the numbers of a run: equal identities on one machine mean equal runs."""
    return Identity(config.hash(), dataset.digest(), provenance.code_version())


def run_tags(config: TrainConfig, dataset: Dataset, labels: Labels) -> dict[str, str]:
    """Return the tags of a run: what it is known by, its study, arm, variant and seed, machine and command."""
    own = {
        STUDY: labels.study,
        ARM: labels.arm,
        VARIANT: config.model.variant,
        SEED: str(config.random.seed),
    }
    machine = {f"effv2.machine.{name}": value for name, value in provenance.machine().items()}
    timed = remembered(config) if config.execution.device == "cpu" else None
    calibration = {CALIBRATION: str(timed)} if timed else {}
    command = {} if labels.parent else {COMMAND: provenance.command()}
    return identity(config, dataset).tags() | own | machine | calibration | command
