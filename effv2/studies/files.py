"""Study files: one configuration, and the arms that differ from it with their seeds, or the ranges to search."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from effv2.architecture import PUBLISHED_VARIANTS
from effv2.config import TrainConfig
from effv2.documents import Document, Place, dotted, read_document, validate
from effv2.errors import InputError, nearest
from effv2.studies.options import SHORT_EPOCHS
from effv2.studies.settings import Layer, build_config, document_layer

DEFAULT_TRIALS = 12
SEARCHABLE = ("augment", "model", "optimiser")  # trials share everything else: data, length, machine
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Range(BaseModel):
    """A range to search, bounds included."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    low: float
    high: float
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.low < self.high:
            raise ValueError("low must be below high")
        if self.log and self.low <= 0:
            raise ValueError("a log scale needs a low above 0")
        return self


DEFAULT_SPACE = {
    "model.dropout": Range(low=0, high=0.6),
    "model.stochastic_depth": Range(low=0, high=0.5),
    "model.depth_multiplier": Range(low=0.1, high=1),
}


class SearchFile(BaseModel):
    """The key `search` of a study file: how many trials over which fields, and how poor ones are pruned.

    `min_epochs` is how many epochs each trial is given before it may be pruned; a quarter of all unless it is named.
    It has to be long enough for a good trial to leave chance level, or the pruner chooses by noise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    trials: int = Field(DEFAULT_TRIALS, ge=1, le=100_000)
    space: dict[str, Range] = Field(DEFAULT_SPACE, min_length=1)
    prune: bool = True
    min_epochs: int | None = Field(None, ge=1)


class StudyFile(BaseModel):
    """The keys of a study file. `config` and each arm hold groups of TrainConfig."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[\w.-]+$", max_length=80)
    description: str = ""
    config: dict[str, Any] | None = None
    arms: dict[str, dict[str, Any] | None] = {}
    baseline: str = ""
    seeds: tuple[Seed, ...] = ()
    retries: int = Field(1, ge=0, le=100)
    search: SearchFile | None = None

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


HPARAM_ARMS: dict[str, dict[str, Any]] = {
    "default": {},
    "depth": {"model": {"depth_multiplier": 0.1}},
    "half_layers": {"model": {"variant": "half_layers"}},
    "dropout": {"model": {"dropout": 0.6}},
    "stochastic_depth": {"model": {"stochastic_depth": 0.5}},
}


@dataclass(frozen=True)
class Study:
    """A study read from its file, or the built-in ablation; layers keep where each value was written."""

    name: str
    description: str
    base: Layer
    arms: dict[str, Layer]
    baseline: str
    seeds: tuple[int, ...]
    retries: int = 1
    search: SearchFile | None = None

    def config(self, options: Layer) -> TrainConfig:
        """Return the one configuration of a study without arms."""
        if self.search:
            raise InputError(f"--study {self.name}: describes a search, which `train` can't make; use `search`.")
        if self.seeds:
            raise InputError(f"--study {self.name}: has seeds, but `train` makes one run; give it --seed instead.")
        if self.arms:
            raise InputError(
                f"--study {self.name}: has arms ({', '.join(self.arms)}), which `train` doesn't know; use `ablate`."
            )
        return build_config([self.base, options])

    def arm(self, name: str, options: Layer) -> TrainConfig:
        """Return the configuration of an arm.

        Options change what all arms share; an arm's own differences stand above them.
        """
        return build_config([self.base, options, self.arms[name]])

    def select(self, name: str, option: str) -> list[str]:
        """Return the names of all arms, or of one and the baseline it is compared with."""
        if not self.arms:
            other = "search" if self.search else "train"
            raise InputError(f"--study {self.name}: has no arms to compare; use `{other}`.")
        if name != "all" and name not in self.arms:
            raise InputError(f"--{option} {name}: no such arm; {nearest(name, [*self.arms, 'all'])}.")
        return [arm for arm in self.arms if name in ("all", arm) or arm == self.baseline]

    def crossed(self, schedulers: Sequence[str]) -> Study:
        """Return the study with each arm under each learning rate schedule; `none` goes without saying."""
        clash = {under(arm, scheduler) for scheduler in schedulers for arm in self.arms if scheduler != "none"}
        if clash & self.arms.keys():
            raise InputError(f"--study {self.name}: has an arm {min(clash & self.arms.keys())}; name it otherwise.")
        arms = {
            under(arm, scheduler): layer.with_value(("schedule", "name"), scheduler)
            for scheduler in schedulers
            for arm, layer in self.arms.items()
        }
        return replace(self, arms=arms)


def _built_in(name: str, description: str, config: dict[str, Any], arms: dict[str, dict[str, Any]]) -> Study:
    layers = {arm: Layer(values, dotted) for arm, values in arms.items()}
    return Study(name, description, Layer(config, dotted), layers, "default" if arms else "", ())


def built_in_ablation() -> Study:
    """Return the ablation of the five published variants under the default configuration (digits, quick)."""
    arms = {name: {"model": {"variant": name}} for name in PUBLISHED_VARIANTS}
    return _built_in("ablate", "Published variants of EfficientNetV2-S under one short protocol.", {}, arms)


def built_in_hparam_check() -> Study:
    """Return the published hyper-parameter check, shortened to three epochs of digits.

    ReduceLROnPlateau waits for no epoch there, since it would otherwise never act.
    """
    short = {"schedule": {"epochs": SHORT_EPOCHS, "plateau_patience": 0}}
    return _built_in("hparam-check", "Hyper-parameters of EfficientNetV2-S, one changed at a time.", short, HPARAM_ARMS)


def built_in_search() -> Study:
    """Return a short search over dropout, stochastic depth and depth multiplier on digits."""
    short = {"schedule": {"epochs": SHORT_EPOCHS}}
    return _built_in("search", "Dropout, stochastic depth and depth multiplier of EfficientNetV2-S.", short, {})


def read_study(path: Path) -> Study:
    """Read a study file; InputError names the line of whatever is wrong, in every arm."""
    document = read_document(path, "study")
    file = validate(StudyFile, document.values, document.where)
    baseline = file.baseline or next(iter(file.arms), "")
    if baseline and baseline not in file.arms:
        raise InputError(
            f"{document.where(('baseline',))} {baseline}: is no arm; {nearest(baseline, list(file.arms))}."
        )
    if file.search and file.arms:
        raise InputError(f"{document.where(('search',))}: a file has arms or a search, not both; remove one.")
    base = document_layer(document, "config")
    arms = {name: document_layer(document, "arms", name) for name in file.arms}
    study = Study(file.name, file.description, base, arms, baseline, file.seeds, file.retries, file.search)
    for arm in arms.values() or [Layer({}, base.where)]:
        build_config([base, arm])
    for name, limits in file.search.space.items() if file.search else ():
        _check_searchable(name, limits, base, document)
    return study


def _check_searchable(name: str, limits: Range, base: Layer, document: Document) -> None:
    """Refuse what can't be searched: an unknown field, a bound that the field doesn't take."""
    numbers = [
        field
        for field, value in TrainConfig().flat().items()
        if field.split(".")[0] in SEARCHABLE and type(value) in (int, float)
    ]
    place: Place = ("search", "space", name)
    if name not in numbers:
        raise InputError(f"{document.where(place)}: can't be searched; {nearest(name, numbers)}.")
    for bound in ("low", "high"):
        value = getattr(limits, bound)
        written = document.where((*place, bound))
        layer = Layer({}, lambda _, written=written: written)  # type: ignore[misc]
        build_config([base, layer.with_value(tuple(name.split(".")), value)])


def under(arm: str, scheduler: str) -> str:
    """Name an arm under a learning rate schedule."""
    return arm if scheduler == "none" else f"{arm}_{scheduler}"
