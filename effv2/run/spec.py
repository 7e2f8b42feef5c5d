"""How a run is named, grouped, known again and tagged in MLflow."""

from __future__ import annotations

from dataclasses import dataclass

from effv2.config.schema import TrainConfig
from effv2.core import provenance
from effv2.data.dataset import Dataset
from effv2.execution.resolve import remembered
from effv2.tracking.read import Identity
from effv2.tracking.tags import ARM, CALIBRATION, COMMAND, MACHINE, SEED, STUDY, VARIANT


@dataclass(frozen=True)
class RunSpec:
    """How a run is named and grouped in MLflow.

    `parent` is the id of the run that it becomes a child of, `resumes` that of a run that ended early and is resumed.
    """

    name: str
    experiment_id: str
    study: str = ""
    arm: str = ""
    parent: str = ""
    resumes: str = ""


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
    command = {} if spec.parent else {COMMAND: provenance.command()}
    return identity(config, dataset).tags() | own | machine_tags() | calibration | command
