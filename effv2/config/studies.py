"""Study files: one configuration, with the arms that differ from it and their seeds, or with the ranges to search.

The files in `sweeps/` are part of the package and are found by name. The file of a published protocol also has the
source of each setting, and the published figures. The claims, the reports and docs/protocols.md use both.
"""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from glob import glob
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

import effv2
from effv2.architecture import VARIANTS
from effv2.config.layers import Layer, Written, build, read_document, validate
from effv2.config.options import Margin, MaxSeeds, Seeds
from effv2.config.schema import Group, TrainConfig
from effv2.core.errors import InputError, nearest

# Numbers that a search may choose; trials share everything else: data, length, machine.
SEARCHABLE = [
    name
    for name, value in TrainConfig().flat().items()
    if name.startswith(("augment.", "model.", "optimiser.")) and type(value) in (int, float)
]
PLATEAU = "_plateau"  # suffix of the name of an arm that is another arm with ReduceLROnPlateau
SWEEPS = Path(effv2.__file__).with_name("sweeps")
# Names of times in tables and claims: seconds of training until a run first reaches an accuracy.
TIME_TO = r"^seconds/to_(train|val|test)_accuracy_(0?\.\d+|1)$"
Value = bool | int | float | str
Settings = dict[str, Value]  # dotted parameters and their values
NOTHING: Layer = {}


def _searchable(name: str) -> str:
    if name not in SEARCHABLE:
        raise ValueError(f"can't be searched; {nearest(name, SEARCHABLE)}")
    return name


def _time_to(name: str) -> str:
    if not re.match(TIME_TO, name):
        raise ValueError("is not a time to an accuracy; write it as seconds/to_test_accuracy_0.9")
    return name


def _named(text: str) -> list[str]:
    """Return the names in a text, separated by commas or spaces."""
    return re.split(r"[,\s]+", text.strip(", "))


def _plain(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ValueError("the name of an arm may only have letters, digits and . _ -")
    return name


class Range(Group):
    """A range to search, including its bounds."""

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


class SearchFile(Group):
    """The key `search` of a study file: how many trials over which fields, and how poor ones are pruned."""

    trials: int = Field(12, ge=1, le=100_000)
    space: dict[Annotated[str, AfterValidator(_searchable)], Range] = Field(
        {
            "model.dropout": Range(low=0, high=0.6),
            "model.stochastic_depth": Range(low=0, high=0.5),
            "model.depth_multiplier": Range(low=0.1, high=1),
        },
        min_length=1,
    )
    prune: bool = True
    # Epochs before a trial may be pruned, by default a quarter of all: good trials must have left chance level by then.
    min_epochs: int | None = Field(None, ge=1)


class Sources(Group):
    """Sources of the settings of a published protocol. A key names one or more settings, separated by commas."""

    stated: dict[str, str] = {}  # in the text or the code that were published
    shown: dict[str, str] = {}  # it follows from a log or a figure
    inferred: dict[str, str] = {}  # it follows with less certainty
    assumed: dict[str, str] = {}  # nothing says so

    def settings(self, kind: str) -> list[str]:
        """Return the settings of one kind: stated, shown, inferred or assumed."""
        return [name for key in getattr(self, kind) for name in key.split(", ")]


class Published(Group):
    """The figures of published runs, one run per arm, in the units of the metrics."""

    figures: dict[str, dict[str, float]] = {}  # quantity: arm: value
    test_images: int = Field(0, ge=0)
    unchecked: str = ""  # why the figures may be wrong; shown with them

    @model_validator(mode="after")
    def _fractions(self) -> Published:
        for name, figures in self.figures.items():
            if "accuracy" in name and not all(0 <= value <= 1 for value in figures.values()):
                raise ValueError(f"{name} is a fraction: give 0.97, not 97")
        return self


class PublishedStudy(Published):
    """What was published of a study, and which runs are judged by it."""

    runs: Settings = {}  # settings that judged runs must have, besides those of the file
    needs: str = ""  # what the runs need
    nearest: Settings = {}  # settings of the nearest runs, which are shown and decide nothing


class Study(Group):
    """A study read from its file. `command` is that of the first line."""

    name: str = Field(pattern=r"^[\w.-]+$", max_length=80)
    description: str = ""
    base: Layer = Field({}, alias="config")
    arms: dict[Annotated[str, AfterValidator(_plain)], Layer] = {}
    baseline: str = ""
    seeds: Seeds = ()
    max_seeds: MaxSeeds = None
    margin: Margin = None
    splits: int = Field(1, ge=1, le=50)  # number of splits of the images, each with every seed, or with one of `auto`
    paired: bool = False  # whether runs of equal seed have more in common than others
    retries: int = Field(1, ge=0, le=100)
    show: list[Annotated[str, AfterValidator(_time_to)]] = []  # in tables, besides the usual columns
    search: SearchFile | None = None
    protocol: Sources = Sources()
    published: PublishedStudy = PublishedStudy()
    command: str = ""

    def assumptions(self) -> str:
        """Name the settings that are inferred or assumed, with their values; empty without a published protocol."""
        config = build(TrainConfig, self.base).flat()
        words = []
        for kind in ("inferred", "assumed"):
            names = [f"{name} {config[name]}" if name in config else name for name in self.protocol.settings(kind)]
            if names:
                words.append(f"{kind} are {', '.join(names)}")
        return f"In {self.name} {'; '.join(words)} (docs/protocols.md)." if words else ""

    def config(self, options: Layer) -> TrainConfig:
        """Return the one configuration of a study without arms."""
        for there, problem, remedy in (
            (self.search, "describes a search, which train can't run", "use the command search"),
            (self.seeds, "has seeds, but train makes one run", "give it `seed` instead"),
            (self.splits > 1, "has splits, but train makes one run", "give it `split_seed` instead"),
            (self.arms, f"has arms ({', '.join(self.arms)}), which train doesn't know", "use the command ablate"),
        ):
            if there:
                raise InputError("study", self.name, problem, remedy)
        return build(TrainConfig, self.base | options)

    def arm(self, name: str, options: Layer) -> TrainConfig:
        """Return the configuration of an arm. Options override shared settings; the arm's settings override both."""
        return build(TrainConfig, self.base | options | self.arms[name])

    def with_variants(self, text: str) -> Study:
        """Return the study with its baseline, the named arms, and the named variants that aren't arms yet."""
        names = _named(text)
        more = {each: {"model.variant": Written(each)} for each in names if each in VARIANTS and each not in self.arms}
        if not self.arms or not more:
            return self
        arms = {arm: layer for arm, layer in self.arms.items() if arm in (self.baseline, *names) or "all" in names}
        return self.model_copy(update={"arms": arms | more})

    def select(self, text: str) -> list[str]:
        """Return the names of all arms, or of the named ones and the baseline that they are compared with."""
        if not self.arms:
            other = "search" if self.search else "train"
            raise InputError("study", self.name, "has no arms to compare", f"use the command {other}")
        names, known = _named(text), dict.fromkeys([*self.arms, *VARIANTS, "all"])
        if unknown := [name for name in names if name != "all" and name not in self.arms]:
            raise InputError("variant", unknown[0], f"no variant, and no arm of study {self.name}", choices=known)
        return [arm for arm in self.arms if arm in (self.baseline, *names) or "all" in names]

    def select_checks(self, name: str, scheduler: str) -> list[str]:
        """Return the names of the baseline and the change called `name`, or of all, with each wanted schedule."""
        plain = {arm: arm.removesuffix(PLATEAU) for arm in self.select("all")}
        checks = [*dict.fromkeys(plain.values()), "all"]
        if name not in checks:
            raise InputError("check", name, f"no such change in study {self.name}", choices=checks)
        wanted = [arm for arm in plain if scheduler in ("both", self._schedule(arm))]
        if not wanted:
            raise InputError("scheduler", scheduler, f"no arm of the study {self.name} has it", "use both")
        return [arm for arm in wanted if name == "all" or plain[arm] in (name, self.baseline.removesuffix(PLATEAU))]

    def with_plateau(self) -> Study:
        """Return the study with each arm also with ReduceLROnPlateau, unless it has such arms itself."""
        if "plateau" in map(self._schedule, self.arms):
            return self
        for layer in (self.base, *self.arms.values()):
            if (named := layer.get("schedule.name", Written("none"))).value != "none":
                problem = "would be replaced: the check compares the schedules none and plateau"
                raise InputError(named.where or "study", named.value, problem, "remove it, or use the command ablate")
        plain, under = (
            {arm + end: layer | {"schedule.name": Written(name)} for arm, layer in self.arms.items()}
            for name, end in (("none", ""), ("plateau", PLATEAU))
        )
        if clash := plain.keys() & under.keys():
            problem = f"has an arm {min(clash)} without ReduceLROnPlateau"
            raise InputError("study", self.name, problem, "rename it")
        return self.model_copy(update={"arms": plain | under})

    def _schedule(self, arm: str) -> str:
        return "plateau" if self.arm(arm, NOTHING).schedule.name == "plateau" else "none"


def open_study(name: str, folder: Path = Path()) -> Study:
    """Read the study file at a path, relative to `folder`, or of a name in `sweeps/`; InputError as read_study."""
    path, own = folder / os.path.expanduser(name), {each.stem: each for each in sorted(SWEEPS.glob("*.yaml"))}
    if not os.path.exists(path) and name not in own:  # noqa: PTH110
        beside = get_close_matches(path.name, glob("*.y*ml", root_dir=path.parent), cutoff=0.7)  # noqa: PTH207
        files = [str(Path(name).with_name(each)) for each in beside]
        raise InputError("study", name, "no file and no study of that name", choices=[*files, *own])
    return read_study(path if path.is_file() else own.get(name, path))


def as_command(text: str) -> str:
    """Write `mlflow run . -e NAME -P option=value` as the console command, which needs no clone of the project."""
    named = re.sub(r"-P (\w+)=", lambda found: f"--{found[1].replace('_', '-')} ", text)
    return named.replace("mlflow run . -e", "effv2")


def read_study(path: Path) -> Study:
    """Read a study file and check every arm; InputError names the line of an error."""
    document = read_document(path, "study")
    values: dict[str, Any] = document.values | {"config": document.layer("config")}
    if document.first.startswith("# mlflow run"):
        values.setdefault("command", as_command(document.first.removeprefix("# ")))
    if isinstance(arms := values.get("arms"), dict):
        values["arms"] = {name: document.layer("arms", name) for name in arms}
        values["baseline"] = next(iter(arms), "") if values.get("baseline") in (None, "") else values["baseline"]
    study = validate(Study, values, document.where)
    if study.baseline and study.baseline not in study.arms:
        raise InputError(document.where(("baseline",)), study.baseline, "is not an arm", choices=study.arms)
    if study.search and study.arms:
        raise InputError(document.where(("search",)), "", "a file has arms or a search, not both", "remove one")
    for arm in study.arms.values() or [NOTHING]:
        build(TrainConfig, study.base | arm)
    for name, limits in study.search.space.items() if study.search else ():
        for bound in ("low", "high"):  # which the field must take
            written = Written(getattr(limits, bound), document.where(("search", "space", name, bound)))
            build(TrainConfig, study.base | {name: written})
    return study
