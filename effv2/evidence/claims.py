"""Claims as data: the published ones, and those in a file of the user's. docs/claims.md describes their keys."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain, pairwise, product
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
from pydantic import BeforeValidator, Field, model_validator

from effv2.config.layers import Document, Place, read_document, validate
from effv2.config.schema import Group
from effv2.core.errors import InputError, nearest
from effv2.evidence.protocols import Protocol, protocol_title, study_protocols
from effv2.evidence.quantities import TEST, TRAIN, quantity
from effv2.tracking.read import BEST_TEST, LAST_TEST, RunRecord

PUBLISHED = Path(__file__).with_name("published")
EXPORTED_AS = "claims.yaml"  # name of a file of claims in an export
# The name of an included study, or of a file next to the claims, which an export also includes.
StudyName = Annotated[str, Field(pattern=r"^([\w-]*|[\w.-]+\.ya?ml)$")]
Tied = Annotated[list[str], BeforeValidator(lambda arms: [arms] if isinstance(arms, str) else arms)]
OF_ANSWERS = ("eval/top1_accuracy", "unseen/top1_accuracy")  # over images: quantities of right and wrong answers


@dataclass(frozen=True)
class Contrast:
    """One statement of a claim: a quantity of `arm`, minus or divided by that of `against`, is between two edges."""

    protocol: str
    metric: str
    arm: str
    low: float
    high: float
    against: str = ""
    ratio: bool = False

    @property
    def arms(self) -> list[str]:
        """Return the arm, or the two arms."""
        return [self.arm, self.against] if self.against else [self.arm]


# The keys of each kind of check, and its metric and region unless the check has its own.
KINDS: dict[str, tuple[tuple[str, ...], str, tuple[float, float]]] = {
    "level": (("arm",), BEST_TEST, (0, math.inf)),  # a quantity of one arm
    "difference": (("arm", "against"), BEST_TEST, (0, math.inf)),  # that of one arm minus that of another
    "convergence": (("arm", "against"), "epochs/to_95_percent", (-math.inf, 0)),  # fewer epochs
    "speed": (("arm", "against"), "rate/train", (1, math.inf)),  # a rate or a time divided by another
    "ordering": (("order",), BEST_TEST, (0, math.inf)),  # arms in falling order; those in brackets have no order
}


class Check(Group):
    """A condition. A region is above or below an edge, or within a distance about a value."""

    kind: Literal["level", "difference", "convergence", "speed", "ordering"]
    arm: str = ""
    against: str = ""
    order: list[Tied] = Field(default_factory=list)
    metric: str = ""
    above: float | None = None
    below: float | None = None
    about: float | None = None
    within: float | None = Field(None, gt=0)
    protocol: str = ""  # by default the claim's
    study: StudyName = ""

    @model_validator(mode="after")
    def _says_one_thing(self) -> "Check":
        needed, _, _ = KINDS[self.kind]
        names = tuple(name for name in ("arm", "against", "order") if getattr(self, name))
        regions = [name for name in ("above", "below", "about") if getattr(self, name) is not None]
        arms = [*filter(None, (self.arm, self.against)), *chain.from_iterable(self.order)]
        twice = [arm for arm in arms if arms.count(arm) > 1]
        low = [edge for edge in self.edges() if -math.inf < edge <= 0]
        for is_so, problem in (
            (names != needed, f"a {self.kind} needs {' and '.join(needed)}, and no other key of arms"),
            (len(regions) > 1, f"give one of above, below and about, not {' and '.join(regions)}"),
            ((self.about is None) != (self.within is None), "about and within go together; give both"),
            (self.kind == "level" and not regions, "a level needs a region; give above, below, or about"),
            (self.order and (regions or len(self.order) < 2), "an ordering needs two arms or more, and no region"),
            (self.kind == "speed" and low, "a ratio is above 0; move the edges"),
            (twice, f"{''.join(twice[:1])} is compared with itself; name another arm"),
        ):
            if is_so:
                raise ValueError(problem)
        return self

    def edges(self) -> tuple[float, float]:
        """Return the ends of the region, by default those of its kind."""
        if self.about is not None and self.within is not None:
            return self.about - self.within, self.about + self.within
        if self.above is not None:
            return self.above, math.inf
        _, _, region = KINDS[self.kind]
        return region if self.below is None else (-math.inf, self.below)

    def contrasts(self, protocol: str) -> Iterator[Contrast]:
        """Return the statements of the check. In an ordering, each arm is above each arm of the next place."""
        _, metric, _ = KINDS[self.kind]
        pairs = chain.from_iterable(product(*both) for both in pairwise(self.order))
        for arm, against in pairs if self.order else [(self.arm, self.against)]:
            yield Contrast(protocol, self.metric or metric, arm, *self.edges(), against, self.kind == "speed")


class Claim(Group):
    """A claim holds if all of its checks hold. It is about the arms of a study, or of its own protocol."""

    words: str = Field(min_length=1)
    source: str = ""
    study: StudyName = ""
    ignore: list[str] = []  # settings of the study in which runs may differ, and other parameters
    family: str = ""  # p-values are corrected for the number of claims in the family; empty: judged by itself
    weight: float = Field(1, gt=0)  # in its family
    protocol: str | Protocol = ""
    checks: list[Check] = Field(min_length=1)
    note: str = ""

    @model_validator(mode="after")
    def _one_protocol(self) -> "Claim":
        if bool(self.study) == bool(self.protocol):
            raise ValueError("give either a study or a protocol: the runs that the claim is about")
        if self.ignore and not self.study:
            raise ValueError("ignore only applies to a study; a protocol has its own ignore")
        return self


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
Id = Annotated[str, Field(pattern=r"^[A-Za-z]+[0-9]+$", description="Letters and a number.")]


class ClaimsFile(Group):
    """The keys of a file of claims."""

    protocols: dict[Name, Protocol] = Field(default_factory=dict)
    claims: dict[Id, Claim] = Field(min_length=1)


@dataclass(frozen=True)
class Claims:
    """Claims by id, the user's own first, and the protocols that they name."""

    protocols: Mapping[str, Protocol]
    claims: Mapping[str, Claim]
    files: Mapping[str, Path] = field(default_factory=dict)  # the user's: claims and their studies

    def contrasts(self, id_: str) -> list[Contrast]:
        """Return all statements of a claim."""
        claim = self.claims[id_]
        written = id_ if isinstance(claim.protocol, Protocol) else claim.protocol
        own = written or protocol_title(claim.study, claim.ignore)
        named = ((check, check.protocol or protocol_title(check.study, claim.ignore) or own) for check in claim.checks)
        return [each for check, protocol in named for each in check.contrasts(protocol)]


def read_claims(own: Path | None = None) -> Claims:
    """Read the published claims and those of a file; InputError names the line of an error."""
    return _shipped() if own is None else _read(own, _shipped())


@cache
def _shipped() -> Claims:
    return replace(_read(PUBLISHED / EXPORTED_AS, Claims({}, {})), files={})


def _read(path: Path, before: Claims) -> Claims:
    document, folder = read_document(path, "claims"), path.parent
    file = validate(ClaimsFile, document.values, document.where)
    twice: list[Place] = [("protocols", name) for name in file.protocols if name in before.protocols]
    twice += [("claims", id_) for id_ in file.claims if id_ in before.claims]
    own = (id_ for id_, claim in file.claims.items() if isinstance(claim.protocol, Protocol))  # it has the claim's name
    twice += [("claims", id_, "protocol") for id_ in own if id_ in before.protocols.keys() | file.protocols]
    if twice:
        raise InputError(document.where(twice[0]), "", "there is one of that name", "choose another")
    protocols, files = dict(before.protocols), {EXPORTED_AS: path}

    def add_study(name: str, place: Place, ignore: Sequence[str] = ()) -> None:
        try:
            protocols.update(study_protocols(name, ignore, folder) if name else {})
        except InputError as error:
            raise InputError(document.where(place), "", str(error).removesuffix(".")) from error
        if (folder / name).is_file():
            files.setdefault(name, folder / name)

    written: dict[Place, Protocol] = {("protocols", name): protocol for name, protocol in file.protocols.items()}
    for id_, claim in file.claims.items():
        if isinstance(claim.protocol, Protocol):
            written["claims", id_, "protocol"] = claim.protocol
        add_study(claim.study, ("claims", id_, "study"), claim.ignore)
        for index, check in enumerate(claim.checks):
            add_study(check.study, ("claims", id_, "checks", index, "study"), claim.ignore)
    for at, protocol in written.items():
        if protocol.nearest not in before.protocols.keys() | file.protocols:
            add_study(protocol.nearest, (*at, "nearest"))
        arms, assumed = dict(protocol.arms), protocol.assumed
        for arm, named in ((arm, each) for arm, each in protocol.arms.items() if isinstance(each, str)):
            (study, _, name), place = named.partition("/"), (*at, "arms", arm)
            add_study(study, place)
            theirs = protocols[study]
            if name not in theirs.arms:
                choices = [f"{study}/{each}" for each in theirs.arms]
                raise InputError(document.where(place), named, "no such arm", choices=choices)
            arms[arm], assumed = theirs.runs | theirs.own(name), assumed or theirs.assumed
        protocols[str(at[1])] = protocol.model_copy(update={"arms": arms, "assumed": assumed})
    claims = Claims(protocols, {**file.claims, **before.claims}, files)
    for id_ in file.claims:
        for contrast in claims.contrasts(id_):
            _check(contrast, protocols, document, ("claims", id_))
    return claims


def _check(contrast: Contrast, protocols: Mapping[str, Protocol], document: Document, claim: Place) -> None:
    """Refuse unknown protocols and arms, percentages, and quantities that test images can't judge."""
    name, metric, region = contrast.protocol, contrast.metric, (contrast.low, contrast.high)
    if name not in protocols:
        raise InputError(document.where((*claim, "protocol")), name, "no such protocol", choices=protocols)
    protocol, what = protocols[name], quantity(metric)
    largest = max(abs(edge) for edge in region if math.isfinite(edge))
    of_difference = bool(contrast.against) or not what.is_accuracy or contrast.low == 1  # which no fraction exceeds
    over_images = protocol.over == "images" and not what.fixed
    problem = remedy = ""
    if unknown := next((arm for arm in contrast.arms if arm not in protocol.arms), ""):
        problem, remedy = f"{name} has no arm {unknown}", nearest(unknown, list(protocol.arms))
    elif metric.startswith("seconds/to_") and not what.metric:
        problem, remedy = f"{metric} is not a time to an accuracy", "write it as seconds/to_test_accuracy_0.9"
    elif what.is_fraction and not contrast.ratio and (largest > 1 or (largest == 1 and of_difference)):
        problem, remedy = f"{metric} is a fraction: a point is 0.01", "give edges between -1 and 1"
    elif over_images and metric not in OF_ANSWERS:
        problem, remedy = f"{metric} can't be judged on test images", f"name {' or '.join(OF_ANSWERS)}"
    elif over_images and contrast.against and region != (0, math.inf):
        problem = "the same test images can only show which network is better"
        remedy = "leave the region out, and name the better one as arm"
    if problem:
        raise InputError(document.where((*claim, "checks")), "", problem, remedy)


@cache
def published_runs() -> Mapping[str, Mapping[str, RunRecord]]:
    """Return the post's training runs with published curves, by study and arm; one run per arm."""
    found: dict[str, dict[str, RunRecord]] = {}
    table = pd.read_csv(PUBLISHED / "curves.csv", index_col="epoch")
    for (study, arm), rows in table.groupby(["study", "arm"], sort=False):
        curves = (rows[["train_accuracy_percent", "test_accuracy_percent"]] / 100).round(6)
        curves.columns = [TRAIN, TEST]
        metrics = {BEST_TEST: curves[TEST].max(), LAST_TEST: curves[TEST].iloc[-1]}
        found.setdefault(study, {})[arm] = RunRecord("", arm, "FINISHED", {}, metrics, {}, curves.to_dict())
    return found


def published_value(protocol: Protocol, metric: str, arm: str) -> float | None:
    """Return the published figure of an arm: as printed, or from the published curve; None without one."""
    printed = protocol.published.figures.get(metric, {})
    run = published_runs().get(protocol.study, {}).get(arm)
    return printed.get(arm, None if run is None else quantity(metric).value(run))
