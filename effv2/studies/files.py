"""Study files: one configuration, the arms that differ from it, the seeds of each arm."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from effv2.architecture import PUBLISHED_VARIANTS
from effv2.config import TrainConfig
from effv2.errors import InputError, nearest
from effv2.studies.settings import Layer, build_config, dotted, read_document, validate

Seed = Annotated[int, Field(ge=0, lt=2**32)]


class StudyFile(BaseModel):
    """The keys of a study file. `config` and each arm hold groups of TrainConfig."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[\w.-]+$", max_length=80)
    description: str = ""
    config: dict[str, Any] | None = None
    arms: dict[str, dict[str, Any] | None] = {}
    baseline: str = ""
    seeds: tuple[Seed, ...] = ()

    @field_validator("seeds")
    @classmethod
    def _different_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("the same seed stands twice; remove one")
        return seeds

    @field_validator("arms")
    @classmethod
    def _plain_names(cls, arms: dict[str, Any]) -> dict[str, Any]:
        for name in arms:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
                raise ValueError(f"the arm {name!r} must be named by letters, digits and . _ - alone")
        return arms


@dataclass(frozen=True)
class Arm:
    """A named configuration of a study, for one seed."""

    name: str
    config: TrainConfig


@dataclass(frozen=True)
class Study:
    """A study read from its file, or the built-in ablation; layers keep where each value was written."""

    name: str
    description: str
    base: Layer
    arms: dict[str, Layer]
    baseline: str
    seeds: tuple[int, ...]

    def config(self, options: Layer) -> TrainConfig:
        """Return the one configuration of a study without arms."""
        if self.seeds:
            raise InputError(f"--study {self.name}: has seeds, but `train` makes one run; give it --seed instead.")
        if self.arms:
            raise InputError(
                f"--study {self.name}: has arms ({', '.join(self.arms)}), which `train` doesn't know; use `ablate`."
            )
        return build_config([self.base, options])

    def select(self, variant: str, options: Layer, seeds: tuple[int, ...]) -> list[Arm]:
        """Return the runs of an ablation, seed by seed: all arms, or one and the baseline it is compared with.

        Without seeds here or in the file, each arm has its configuration's own.

        Options change what all arms share; an arm's own differences stand above them.
        """
        if not self.arms:
            raise InputError(f"--study {self.name}: has no arms to compare; use `train`.")
        if variant != "all" and variant not in self.arms:
            raise InputError(f"--variant {variant}: no such arm; {nearest(variant, [*self.arms, 'all'])}.")
        chosen = [name for name in self.arms if variant in ("all", name) or name == self.baseline]
        configs = {name: build_config([self.base, options, self.arms[name]]) for name in chosen}
        if not (seeds or self.seeds):
            return [Arm(name, configs[name]) for name in chosen]
        return [Arm(name, configs[name].with_seed(seed)) for seed in seeds or self.seeds for name in chosen]


def built_in_ablation() -> Study:
    """Return the ablation of the five published variants under the default configuration (digits, quick)."""
    arms = {name: Layer({"model": {"variant": name}}, dotted) for name in PUBLISHED_VARIANTS}
    base = Layer({}, dotted)
    return Study(
        "ablate", "Published variants of EfficientNetV2-S under one short protocol.", base, arms, "default", ()
    )


def read_study(path: Path) -> Study:
    """Read a study file; InputError names the line of whatever is wrong, in every arm."""
    document = read_document(path)
    file = validate(StudyFile, document.values, document.where)
    baseline = file.baseline or next(iter(file.arms), "")
    if baseline and baseline not in file.arms:
        raise InputError(
            f"{document.where(('baseline',))} {baseline}: is no arm; {nearest(baseline, list(file.arms))}."
        )
    base = document.layer("config")
    arms = {name: document.layer("arms", name) for name in file.arms}
    study = Study(file.name, file.description, base, arms, baseline, file.seeds)
    for arm in arms.values() or [Layer({}, base.where)]:
        build_config([base, arm])
    return study
