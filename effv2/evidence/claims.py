"""Claims as data: what is said, on which runs it can be judged, and what would have to hold.

`claims.yaml` beside this module holds the published ones; a file of the user's own adds to them. What each key
means is told in docs/claims.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from effv2.config.layers import Document, Layer, Place, dotted, read_document, validate
from effv2.config.schema import Group
from effv2.core.errors import InputError, nearest
from effv2.evidence.quantities import quantity
from effv2.studies.files import Published, Settings, Study, open_study

PUBLISHED = Path(__file__).with_name("published")
EXPORTED_AS = "claims.yaml"  # name of a file of claims in an export
SHIPPED = PUBLISHED / EXPORTED_AS
# A shipped study's name, or that of a file beside the claims, which an export takes along beside its own.
StudyName = Annotated[str, Field(pattern=r"^([\w-]*|[\w.-]+\.ya?ml)$")]
ONLY_ARM = "default"  # of a study that has no arms
OF_ANSWERS = ("eval/top1_accuracy", "unseen/top1_accuracy")  # over images: what follows from right and wrong answers
SEED_SETTING, SPLIT_SEED = "random.seed", "data.split_seed"
# What may differ between runs that are compared: what pairs them, where the images lie and, but for times, how they
# are computed.
COMPUTED = {"execution.device", "execution.compile", "execution.channels_last", "evaluation.batch_size"}
FREE = {SEED_SETTING, SPLIT_SEED, "data.dir", "data.download", *COMPUTED}


class Protocol(Group):
    """Which runs a claim is about: those that have the settings of `runs` and of an arm.

    A setting that some arm names has TrainConfig's default, or that of `runs`, in an arm that doesn't name it. Instead
    of settings an arm may name a study that has one arm alone, or `study/arm`.
    """

    runs: Settings = {}
    arms: dict[str, Settings | str] = Field(min_length=1)
    over: Literal["seeds", "images"] = "seeds"  # what varies: training, or the test images of a fixed network
    command: str = ""
    others: Literal["same", "default"] = "same"  # settings that nobody names: alike in all runs, or TrainConfig's
    needs: str = ""  # what must be there first
    assumed: str = ""  # what the source doesn't state, said with every claim
    nearest: str = ""  # a protocol with the same arms that comes close, shown where this one has no runs
    published: Published = Published()
    study: str = ""  # of which it is the protocol, and under whose name the published curves stand

    def own(self, arm: str) -> Settings:
        """Return the settings that an arm names, once those of studies are resolved."""
        named = self.arms[arm]
        return named if isinstance(named, dict) else {}

    def studies(self) -> list[str]:
        """Return the studies that its arms name."""
        return [named.partition("/")[0] for named in self.arms.values() if isinstance(named, str)]

    def settings(self, arm: str) -> Settings:
        """Return all settings of an arm; of those that other arms alone name, the ones in `runs`."""
        return self.runs | self.own(arm)

    def varied(self) -> set[str]:
        """Return the settings in which arms differ."""
        return {name for arm in self.arms for name in self.own(arm)}


def study_protocols(name: str, free: Sequence[str], folder: Path) -> dict[str, Protocol]:
    """Return the protocol of a study, without the settings that are left `free`, and that of its nearest runs."""
    study = open_study(name, folder)
    arms = {arm: _settings_of(study, arm) for arm in study.arms or [ONLY_ARM]}
    first, published = next(iter(arms.values())), study.published
    if unknown := next((key for key in free if key not in first | published.runs), ""):
        raise InputError(f"free {unknown}: no setting of the study; {nearest(unknown, list(first))}.")
    kept = set.intersection(*map(set, arms.values())) - set(free)  # what is `auto` in an arm is free too
    shared = {key for key in kept if all(arm[key] == first[key] for arm in arms.values())}
    runs = {key: value for key, value in first.items() if key in shared}
    runs |= {key: value for key, value in published.runs.items() if key not in free}
    own = {arm: {key: each[key] for key in each if key in kept - shared} for arm, each in arms.items()}
    title = _title(name, free)
    near = f"{title}, nearest"
    nearest_runs = {key: value for key, value in published.nearest.items() if key not in free}
    differing = ", ".join(f"{key} {value}" for key, value in nearest_runs.items())
    protocol = Protocol(
        runs=runs,
        arms=own,
        command=_with_seeds(study.command),
        needs=published.needs,
        assumed=study.assumptions(),
        nearest=near if nearest_runs else "",
        published=published,
        study=name,
    )
    found = {title: protocol}
    if nearest_runs:
        found[near] = Protocol(runs=runs | nearest_runs, arms=own, assumed=f"{near}: {differing}.")
    return found


def _with_seeds(command: str) -> str:
    if " -e train " in command:
        return f"{command} -P seed=0; then seeds 1 and 2"
    return command and f"{command} -P seeds=0,1,2"


def _settings_of(study: Study, arm: str) -> Settings:
    """Return what decides the runs of a study's arm: each setting that has one value and isn't free by its nature."""
    if not study.arms and arm in ("", ONLY_ARM):
        config = study.config(Layer({}, dotted))
    elif arm in study.arms:
        config = study.arm(arm, Layer({}, dotted))
    else:
        wrong = f"has no arm {arm!r}" if arm else "has several arms, so name one, as study/arm"
        raise InputError(f"study {study.name}: {wrong}; {nearest(arm, list(study.arms) or [ONLY_ARM])}.")
    return {key: value for key, value in config.flat().items() if key not in FREE and value != "auto"}


def _resolved(protocol: Protocol, document: Document, place: Place) -> Protocol:
    """Return a protocol with the settings of the study arms that it names, and with what the first of them assumes."""
    arms: dict[str, Settings | str] = dict(protocol.arms)
    assumed = protocol.assumed
    for arm, named in protocol.arms.items():
        if isinstance(named, str):
            with _said_at(document.where((*place, "arms", arm))):
                name, _, of_study = named.partition("/")
                study = open_study(name, document.path.parent)
                arms[arm] = _settings_of(study, of_study)
                assumed = assumed or study.assumptions()
    return protocol.model_copy(update={"arms": arms, "assumed": assumed})


class Region(Group):
    """Where a quantity is claimed to be: above or below an edge, or about a value, within so much of it."""

    above: float | None = None
    below: float | None = None
    about: float | None = None
    within: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _one_region(self) -> Region:
        given = [name for name in ("above", "below", "about") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of above, below and about, not {' and '.join(given)}")
        if (self.about is None) != (self.within is None):
            raise ValueError("about and within go together: a value, and how far from it is still about it")
        return self

    def edges(self) -> tuple[float, float] | None:
        """Return the region's ends; None where no region was given."""
        if self.about is not None and self.within is not None:
            return self.about - self.within, self.about + self.within
        if self.above is not None:
            return self.above, math.inf
        return None if self.below is None else (-math.inf, self.below)


@dataclass(frozen=True)
class Contrast:
    """One thing that a claim says: a quantity of `arm`, less or over that of `against`, lies between two edges."""

    protocol: str
    metric: str
    arm: str
    low: float
    high: float
    against: str = ""
    ratio: bool = False


class Check(Region):
    """What all kinds share."""

    metric: str
    protocol: str = ""  # the claim's, where neither is given
    study: StudyName = ""

    def contrasts(self, protocol: str) -> Iterator[Contrast]:
        """Return what the check says, one thing at a time."""
        raise NotImplementedError


class Level(Check):
    """A quantity of one arm."""

    kind: Literal["level"]
    arm: str
    metric: str = "best/test_accuracy"

    @model_validator(mode="after")
    def _has_region(self) -> Level:
        if self.edges() is None:
            raise ValueError("say where the level is: above, below, or about a value and within how much")
        return self

    def contrasts(self, protocol: str) -> Iterator[Contrast]:
        """Return the one thing it says."""
        yield Contrast(protocol, self.metric, self.arm, *(self.edges() or (-math.inf, math.inf)))


class Pairwise(Check):
    """What kinds of two arms share; `otherwise` is the region where none is given."""

    otherwise: ClassVar[tuple[float, float]] = (0, math.inf)
    ratio: ClassVar[bool] = False
    arm: str
    against: str

    @model_validator(mode="after")
    def _two_arms(self) -> Pairwise:
        if self.arm == self.against:
            raise ValueError(f"{self.arm} is compared with itself; name another arm")
        return self

    def contrasts(self, protocol: str) -> Iterator[Contrast]:
        """Return the one thing it says."""
        low, high = self.edges() or self.otherwise
        yield Contrast(protocol, self.metric, self.arm, low, high, self.against, self.ratio)


class Difference(Pairwise):
    """A quantity of one arm less that of another; above 0 where nothing else is said."""

    kind: Literal["difference"]
    metric: str = "best/test_accuracy"


class Convergence(Pairwise):
    """Epochs that one arm needs less those of another; below 0, which is sooner, where nothing else is said."""

    otherwise = (-math.inf, 0)
    kind: Literal["convergence"]
    metric: str = "epochs/to_95_percent"


class Speed(Pairwise):
    """A rate or a time of one arm over that of another; above 1 where nothing else is said."""

    otherwise = (1, math.inf)
    ratio = True
    kind: Literal["speed"]
    metric: str = "rate/train"

    @model_validator(mode="after")
    def _positive(self) -> Speed:
        if any(edge <= 0 for edge in self.edges() or () if math.isfinite(edge)):
            raise ValueError("a ratio is above 0; give edges above 0")
        return self


class Ordering(Check):
    """Arms in falling order of a quantity, several that the claim doesn't tell apart in brackets."""

    kind: Literal["ordering"]
    order: list[str | list[str]] = Field(min_length=2)
    metric: str = "best/test_accuracy"

    @model_validator(mode="after")
    def _no_region(self) -> Ordering:
        arms = [arm for place in self.order for arm in ([place] if isinstance(place, str) else place)]
        if len(set(arms)) < len(arms):
            raise ValueError("an arm stands twice in the order; name each once")
        if self.edges() is not None:
            raise ValueError("an ordering says nothing but which is above which; leave the region out")
        return self

    def contrasts(self, protocol: str) -> Iterator[Contrast]:
        """Return that each arm of a place is above each of the next place."""
        places = [[place] if isinstance(place, str) else place for place in self.order]
        for upper, lower in pairwise(places):
            for first, second in product(upper, lower):
                yield Contrast(protocol, self.metric, first, 0, math.inf, second)


AnyCheck = Annotated[Level | Difference | Convergence | Speed | Ordering, Field(discriminator="kind")]


class Claim(Group):
    """A claim holds where all of its checks hold. It is about the arms of a study, or of a protocol of its own.

    Runs may differ from the study in the settings that are `free`.
    """

    words: str = Field(min_length=1)
    source: str = ""
    study: StudyName = ""
    free: list[str] = []
    protocol: str | Protocol = ""
    checks: list[AnyCheck] = Field(min_length=1)
    note: str = ""

    @model_validator(mode="after")
    def _one_protocol(self) -> Claim:
        if bool(self.study) == bool(self.protocol):
            raise ValueError("give a study or a protocol, one of the two: the runs that the claim is about")
        if self.free and not self.study:
            raise ValueError("free goes with a study: what a protocol doesn't name is free")
        return self


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
Id = Annotated[str, Field(pattern=r"^[A-Za-z]+[0-9]+$", description="Letters, its family, and a number.")]


class ClaimsFile(Group):
    """The keys of a file of claims."""

    protocols: dict[Name, Protocol] = {}
    claims: dict[Id, Claim] = Field(min_length=1)


@dataclass(frozen=True)
class Claims:
    """Claims by id, those of the user's own first, and the protocols that they name."""

    protocols: Mapping[str, Protocol]
    claims: Mapping[str, Claim]
    own: frozenset[str] = frozenset()
    files: Mapping[str, Path] = field(default_factory=dict)  # the user's own by name: claims, studies that they name

    def contrasts(self, id_: str) -> list[Contrast]:
        """Return all that a claim says."""
        claim = self.claims[id_]
        own = id_ if isinstance(claim.protocol, Protocol) else claim.protocol or _title(claim.study, claim.free)
        return [
            each
            for check in claim.checks
            for each in check.contrasts(check.protocol or _title(check.study, claim.free) or own)
        ]


def _title(study: str, free: Sequence[str]) -> str:
    """Return the name of a study's protocol."""
    return f"{study}, free: {', '.join(free)}" if study and free else study


def family(id_: str) -> str:
    """Return the letters that a claim's id begins with: its family, within which p-values are corrected."""
    found = re.match(r"[A-Za-z]+", id_)
    return found[0] if found else id_


def read_claims(own: Path | None = None) -> Claims:
    """Read the published claims and those of a file; InputError names the line of whatever is wrong."""
    shipped = _shipped()
    return shipped if own is None else _read(own, shipped)


@cache
def _shipped() -> Claims:
    return _read(SHIPPED, Claims({}, {}))


def _read(path: Path, before: Claims) -> Claims:
    document = read_document(path, "claims")
    file = validate(ClaimsFile, document.values, document.where)
    for kind, names in (("protocols", before.protocols), ("claims", before.claims)):
        for name in getattr(file, kind):
            if name in names:
                raise InputError(f"{document.where((kind, name))}: there is one of that name; choose another.")
    folder = path.parent
    studies: dict[str, Protocol] = {}
    for id_, claim in file.claims.items():
        places = {("study",): claim.study} | {("checks", i, "study"): each.study for i, each in enumerate(claim.checks)}
        for place, name in places.items():
            if name:
                with _said_at(document.where(("claims", id_, *place))):
                    studies |= study_protocols(name, claim.free, folder)
    for name, protocol in file.protocols.items():
        if protocol.nearest and protocol.nearest not in {**before.protocols, **file.protocols}:
            with _said_at(document.where(("protocols", name, "nearest"))):
                studies |= study_protocols(protocol.nearest, (), folder)
    inline = {id_: claim.protocol for id_, claim in file.claims.items() if isinstance(claim.protocol, Protocol)}
    own = frozenset(file.claims) if before.claims else frozenset()
    resolved = {
        name: _resolved(protocol, document, (kind, name, *within))
        for kind, within, protocols in (("protocols", (), file.protocols), ("claims", ("protocol",), inline))
        for name, protocol in protocols.items()
    }
    named = [protocol.study for protocol in studies.values()]
    named += [study for protocol in (*file.protocols.values(), *inline.values()) for study in protocol.studies()]
    beside = {name: folder / name for name in named if name and (folder / name).is_file()}
    if EXPORTED_AS in beside:
        raise InputError(
            f"--claims {path}: names a study in {EXPORTED_AS}, as exports call the claims; rename its file."
        )
    files = {EXPORTED_AS: path} | beside if own else {}
    claims = Claims({**before.protocols, **studies, **resolved}, {**file.claims, **before.claims}, own, files)
    for id_ in file.claims:
        _check(id_, claims, document)
    return claims


@contextmanager
def _said_at(where: str) -> Iterator[None]:
    """Let an error of a study say where in the claims it is named."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {str(error).removeprefix('--')}") from error


def _check(id_: str, claims: Claims, document: Document) -> None:
    """Refuse protocols and arms that there aren't, and what can't be judged over test images."""
    place = ("claims", id_)
    for contrast in claims.contrasts(id_):
        protocol = claims.protocols.get(contrast.protocol)
        if protocol is None:
            wrong = nearest(contrast.protocol, list(claims.protocols))
            raise InputError(f"{document.where((*place, 'protocol'))} {contrast.protocol}: no such protocol; {wrong}.")
        for arm in filter(None, (contrast.arm, contrast.against)):
            if arm not in protocol.arms:
                raise InputError(
                    f"{document.where((*place, 'checks'))}: the protocol {contrast.protocol} has no arm {arm}; "
                    f"{nearest(arm, list(protocol.arms))}."
                )
        edges = [edge for edge in (contrast.low, contrast.high) if math.isfinite(edge)]
        if quantity(contrast.metric).is_accuracy and not contrast.ratio and any(abs(edge) > 1 for edge in edges):
            raise InputError(
                f"{document.where((*place, 'checks'))}: {contrast.metric} is a fraction, a point is 0.01; give edges "
                "between -1 and 1."
            )
        if protocol.over == "images" and not quantity(contrast.metric).fixed:
            _check_over_images(contrast, document.where((*place, "checks")))


def _check_over_images(contrast: Contrast, where: str) -> None:
    if contrast.metric not in OF_ANSWERS:
        raise InputError(
            f"{where}: on test images only {' and '.join(OF_ANSWERS)} can be judged, not {contrast.metric}."
        )
    if contrast.against and (contrast.low, contrast.high) != (0, math.inf):
        raise InputError(
            f"{where}: on the same test images it can only be told which network is better; leave the region out, and "
            "name the better one as arm."
        )
