"""Claims judged: do their words agree with the published figures, and what do the runs decide?

A claim says that quantities lie in regions. The words agree where each published figure does. The runs support it
where the 95 % interval of each mean (paired by seeds where arms have them in common) lies in its region, contradict it
where one lies outside, and leave it undecided otherwise; what counts is the p-value after Holm's correction within
the family of the claim. Fewer than three runs decide nothing about training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial

import numpy as np

from effv2.evidence.claims import Claim, Claims, Contrast, Protocol, family
from effv2.evidence.quantities import Quantity, points, quantity
from effv2.evidence.reference import published_value
from effv2.evidence.selection import Chosen, choose, complete, over_splits
from effv2.evidence.statistics import (
    FEWEST,
    LEVEL,
    MOST_RUNS,
    Estimate,
    Interval,
    Sample,
    Unpaired,
    fisher,
    holm,
    mcnemar,
    more_to_decide,
    p_text,
    wilson,
)
from effv2.tracking.read import RunRecord

RightAnswers = Callable[[RunRecord], Mapping[str, bool]]  # by image, of a run's predictions of its test images


class Verdict(str, Enum):
    """What evidence says of a claim."""

    SUPPORTED = "supported"
    CONTRADICTED = "contradicted"
    UNDECIDED = "undecided"
    NOT_TESTED = "not tested here"


class Words(str, Enum):
    """Whether a claim's words agree with the figures that were published with them."""

    CONSISTENT = "consistent"
    CONTRADICTED = "contradicted"
    NO_FIGURES = "no figures"


@dataclass(frozen=True)
class Finding:
    """One thing that a claim says, and what figures and runs say of it, in words.

    `agrees` is None without published figures; `p` is that of the side on which the mean lies, None where runs are
    too few; `corrected` is Holm's.
    """

    contrast: Contrast
    says: str
    published: str = ""
    agrees: bool | None = None
    evidence: str = ""
    inside: bool | None = None
    p: float | None = None
    corrected: float | None = None
    tests: int = 1  # in its family
    decided: bool = False  # without a test: a quantity that doesn't vary
    estimate: Estimate | None = None
    edge: float = 0.0  # from which the mean is told
    unit: str = "seed"  # what there would have to be more of
    more: str = ""
    single: str = ""
    lacking: str = ""
    tested: bool = False  # on runs of our own

    @property
    def verdict(self) -> Verdict:
        """Return what the runs say of this one thing."""
        if not self.tested:
            return Verdict.NOT_TESTED
        if not self.decided and (self.corrected is None or self.corrected >= LEVEL):
            return Verdict.UNDECIDED
        return Verdict.SUPPORTED if self.inside else Verdict.CONTRADICTED


@dataclass(frozen=True)
class Judgement:
    """A claim and all that was found; `nearest` on other runs that come close, which decide nothing."""

    id: str
    claim: Claim
    findings: Sequence[Finding]
    nearest: Sequence[Finding] = ()
    needs: str = ""
    assumed: str = ""
    commands: Sequence[str] = ()

    @property
    def words(self) -> Words:
        """Say whether the words agree with the published figures."""
        known = [each.agrees for each in self.findings if each.agrees is not None]
        if not known:
            return Words.NO_FIGURES
        return Words.CONSISTENT if all(known) else Words.CONTRADICTED

    @property
    def tested(self) -> bool:
        """Say whether there are runs of our own."""
        return any(each.tested for each in self.findings)

    @property
    def on_published_alone(self) -> bool:
        """Say whether it is undecided for want of runs of our own: published single runs are all there is."""
        return not self.tested and self.words != Words.NO_FIGURES

    @property
    def verdict(self) -> Verdict:
        """Return what the evidence decides; where there are published figures alone, that is nothing."""
        found = {each.verdict for each in self.findings}
        if Verdict.CONTRADICTED in found:
            return Verdict.CONTRADICTED
        if found == {Verdict.SUPPORTED}:
            return Verdict.SUPPORTED
        return Verdict.UNDECIDED if self.tested or self.on_published_alone else Verdict.NOT_TESTED


def judge(claims: Claims, runs: Sequence[RunRecord], right: RightAnswers) -> list[Judgement]:
    """Judge all claims on the runs there are, the oldest first."""
    finished = complete(runs)
    answers: dict[str, Mapping[str, bool]] = {}  # by run: each is read once, however many claims ask

    def known(run: RunRecord) -> Mapping[str, bool]:
        if run.run_id not in answers:
            answers[run.run_id] = right(run)
        return answers[run.run_id]

    judge_one = partial(_finding, claims, finished, known)
    found = {id_: [judge_one(contrast) for contrast in claims.contrasts(id_)] for id_ in claims.claims}
    corrected = _corrected(found)
    return [_judgement(id_, claims, corrected[id_], judge_one) for id_ in claims.claims]


def _corrected(found: Mapping[str, Sequence[Finding]]) -> dict[str, list[Finding]]:
    """Correct the p-values of each family of claims for their number. What several claims say is tested once."""
    result: dict[str, list[Finding]] = {}
    for letters in dict.fromkeys(map(family, found)):
        members = {id_: each for id_, each in found.items() if family(id_) == letters}
        tests = {each.contrast: each.p for findings in members.values() for each in findings if each.p is not None}
        corrected = dict(zip(tests, holm(list(tests.values())), strict=True))
        for id_, findings in members.items():
            result[id_] = [_decided(each, corrected.get(each.contrast), len(tests)) for each in findings]
    return result


def _decided(finding: Finding, corrected: float | None, tests: int) -> Finding:
    """Return the finding with its corrected p-value and, where that doesn't decide, how many more runs are likely to.

    Those must do with the level that the smallest of `tests` p-values has to reach.
    """
    finding = replace(finding, corrected=corrected, tests=tests)
    if corrected is None or corrected < LEVEL or finding.estimate is None:
        return finding
    found = more_to_decide(finding.estimate, finding.edge, LEVEL / tests)
    if found is None:
        more = f"more than {MOST_RUNS:,} further {finding.unit}s would be needed, if there is a difference"
    else:
        few, many = found
        up_to = f"{many:,}" if many else f"more than {MOST_RUNS:,}"
        number = f"about {few:,}" if few == many else f"about {few:,} to {up_to}"
        more = f"{number} more {finding.unit}s would decide"
    return replace(finding, more=more)


def _judgement(
    id_: str, claims: Claims, findings: Sequence[Finding], judge_one: Callable[[Contrast], Finding]
) -> Judgement:
    lacking = [each for each in findings if not each.tested]
    protocols = {each.contrast.protocol: claims.protocols[each.contrast.protocol] for each in lacking}
    nearest = [
        judge_one(replace(each.contrast, protocol=near))
        for each in lacking
        if (near := claims.protocols[each.contrast.protocol].nearest)
    ]
    close = list({each.contrast: each for each in nearest if each.tested}.values())
    shown = [claims.protocols[each.contrast.protocol].assumed for each in (*findings, *close)]
    undecided = [each for each in findings if each.tested and each.verdict == Verdict.UNDECIDED]
    wanted = protocols | {each.contrast.protocol: claims.protocols[each.contrast.protocol] for each in undecided}
    return Judgement(
        id_,
        claims.claims[id_],
        findings,
        close,
        "; ".join(dict.fromkeys(filter(None, (each.needs for each in protocols.values())))),
        " ".join(filter(None, dict.fromkeys(shown))),
        list(dict.fromkeys(filter(None, (each.command for each in wanted.values())))),
    )


def _finding(claims: Claims, runs: Sequence[RunRecord], right: RightAnswers, contrast: Contrast) -> Finding:
    protocol, what = claims.protocols[contrast.protocol], quantity(contrast.metric)
    finding = _with_published(Finding(contrast, says(contrast, what)), claims, protocol, what)
    arms = [arm for arm in (contrast.arm, contrast.against) if arm]
    chosen = choose(runs, protocol, arms, what, positive=contrast.ratio)
    if not all(chosen.arms.values()):
        return replace(finding, lacking=chosen.why)
    finding = replace(finding, tested=True)
    if what.fixed:
        return _on_fixed(finding, what, chosen)
    if protocol.over == "images":
        return _over_images(finding, what, chosen, right)
    finding = _over_seeds(finding, what, chosen)
    return replace(finding, evidence="; ".join([finding.evidence, *chosen.aside]))


def says(contrast: Contrast, what: Quantity) -> str:
    """Say in words what a contrast says."""
    text = _text(contrast, what)
    if contrast.ratio:
        head = f"{what.words}: {contrast.arm} / {contrast.against}"
    elif contrast.against:
        head = f"{what.words}: {contrast.arm} − {contrast.against}"
    else:
        head = f"{what.words}: {contrast.arm}"
    if math.isinf(contrast.high):
        return f"{head} above {text(contrast.low)}"
    if math.isinf(contrast.low):
        return f"{head} below {text(contrast.high)}"
    return f"{head} from {text(contrast.low)} to {text(contrast.high)}"


def _text(contrast: Contrast, what: Quantity) -> Callable[[float], str]:
    """Return how values of a contrast are written."""
    if contrast.ratio:
        return lambda value: f"{value:.2f}"
    if contrast.against and what.is_accuracy:
        return lambda value: "0" if value == 0 else points(value)
    if contrast.against:
        return lambda value: "0" if value == 0 else f"{value:+.3g}"
    return what.text


def _combined(contrast: Contrast, first: float, second: float | None) -> float:
    """Return the value of a contrast from those of its arms."""
    if second is None:
        return first
    return first / second if contrast.ratio else first - second


def _is_inside(contrast: Contrast, value: float) -> bool:
    """Say whether a value lies in the claimed region; an open edge isn't part of it, those about a value are."""
    low, high = contrast.low, contrast.high
    return low < value < high if math.isinf(low) or math.isinf(high) else low <= value <= high


def _with_published(finding: Finding, claims: Claims, protocol: Protocol, what: Quantity) -> Finding:
    """Hold the words against the published figures, one run an arm."""
    contrast = finding.contrast
    arms = [arm for arm in (contrast.arm, contrast.against) if arm]
    values = [published_value(claims, contrast, arm) for arm in arms]
    known = [value for value in values if value is not None]
    if len(known) < len(arms) or (contrast.ratio and not all(known)):
        return finding
    value = _combined(contrast, known[0], known[1] if contrast.against else None)
    shown = " against ".join(map(what.text, known))
    count = protocol.published.test_images
    if count and contrast.against and what.is_accuracy and "train" not in contrast.metric:
        right = [round(count * each) for each in known]
        p = fisher((right[0], right[1]), (count, count))
        shown += f" ({right[0]:,} and {right[1]:,} of {count:,} images right; Fisher's exact {p_text(p)})"
    if protocol.published.unchecked:
        shown += f" ({protocol.published.unchecked})"
    return replace(finding, published=shown, agrees=_is_inside(contrast, value))


def _on_fixed(finding: Finding, what: Quantity, chosen: Chosen) -> Finding:
    """Judge a quantity that doesn't vary: one run of each arm decides."""
    contrast = finding.contrast
    seen = [{what.value(run) for run in of_arm.values()} for of_arm in chosen.arms.values()]
    values = [value for each in seen for value in each if value is not None]
    if len(values) > len(seen):
        return replace(finding, evidence=f"runs differ in it: {', '.join(map(what.text, sorted(values)))}")
    value = _combined(contrast, values[0], values[1] if contrast.against else None)
    text = " against ".join(map(what.text, values))
    return replace(finding, evidence=f"{text}, the same in every run", inside=_is_inside(contrast, value), decided=True)


def _over_images(finding: Finding, what: Quantity, chosen: Chosen, right: RightAnswers) -> Finding:
    """Judge fixed networks on their test images: Wilson's interval of one, McNemar's exact test of two."""
    contrast = finding.contrast
    runs = [list(of_arm.values())[-1] for of_arm in chosen.arms.values()]
    answers = [right(run) for run in runs]
    shared = sorted(set.intersection(*(set(each) for each in answers)))
    if not shared:
        return replace(finding, evidence="the runs have no test images in common")
    correct = [np.array([each[image] for image in shared]) for each in answers]
    if contrast.against:
        test = mcnemar(correct[0], correct[1])
        shown = " against ".join(what.text(each.mean()) for each in correct)
        text = f"{shown} on {len(shared):,} images; {test.only_first} and {test.only_second} right alone (McNemar)"
        return replace(finding, evidence=text, inside=test.only_first > test.only_second, p=test.p)
    value, interval = float(correct[0].mean()), wilson(int(correct[0].sum()), len(shared))
    inside = contrast.low <= interval.low and interval.high <= contrast.high
    outside = interval.high < contrast.low or interval.low > contrast.high
    text = f"{what.text(value)} [{what.text(interval.low)} to {what.text(interval.high)}] on {len(shared):,} images"
    return replace(finding, evidence=f"{text} (Wilson)", inside=inside, decided=inside or outside)


def _over_seeds(finding: Finding, what: Quantity, chosen: Chosen) -> Finding:
    """Judge trained networks: the interval of a mean, or of a mean difference, over runs."""
    contrast = finding.contrast
    estimate, kind = _estimate(contrast, what, chosen)
    back = math.exp if contrast.ratio else float
    text = partial(_apply, _text(contrast, what), back)
    words = f"{text(estimate.mean)}, {kind}"
    if (interval := estimate.interval()) is not None:
        interval = interval if contrast.against else interval.within(what.possible)
        words = f"{text(estimate.mean)} [{text(interval.low)} to {text(interval.high)}], {kind}"
    finding = replace(finding, evidence=words, inside=_is_inside(contrast, back(estimate.mean)))
    if not contrast.against and isinstance(estimate, Sample):
        values = [value for run in chosen.arms[contrast.arm].values() if (value := what.value(run)) is not None]
        if (interval := estimate.prediction(Sample(tuple(values)).deviation)) is not None:
            finding = replace(finding, single=_single(contrast, what, interval))
    unit = "split" if chosen.splits > 1 else "seed"
    if estimate.n < FEWEST:
        lacking = _count(FEWEST - estimate.n, f"more {unit}")
        return replace(finding, more=f"fewer than {FEWEST} runs decide nothing; {lacking} at least")
    edge = _binding_edge(contrast, back(estimate.mean), estimate)
    return replace(finding, p=estimate.p(edge), estimate=estimate, edge=edge, unit=unit)


def _apply(text: Callable[[float], str], back: Callable[[float], float], value: float) -> str:
    return text(back(value))


def _single(contrast: Contrast, what: Quantity, interval: Interval) -> str:
    claimed = (contrast.low + contrast.high) / 2
    interval = interval.within(what.possible)
    text = f"a single run is expected from {what.text(interval.low)} to {what.text(interval.high)}"
    if math.isinf(claimed):
        return text
    lies = "inside" if interval.low <= claimed <= interval.high else "outside"
    return f"{text}; the claimed {what.text(claimed)} lies {lies}"


def _estimate(contrast: Contrast, what: Quantity, chosen: Chosen) -> tuple[Estimate, str]:
    """Return the mean that is judged, of logarithms for a ratio, and on what it rests, in words."""
    scale = math.log if contrast.ratio else float
    values = {
        arm: {pair: scale(value) for pair, run in runs.items() if (value := what.value(run)) is not None}
        for arm, runs in chosen.arms.items()
    }
    first, ratio = values[contrast.arm], chosen.overlap
    on = f" on {chosen.splits} splits" if chosen.splits > 1 else ""
    if not contrast.against:
        return Sample(tuple(over_splits(first)), ratio), f"{_count(len(first), 'run')}{on}"
    second = values[contrast.against]
    pairs = chosen.pairs()
    if len(pairs) >= min(FEWEST, len(first), len(second)):
        differences = {pair: first[pair] - second[pair] for pair in pairs}
        return Sample(tuple(over_splits(differences)), ratio), f"{_count(len(pairs), 'pair')}{on}"
    both = [Sample(tuple(over_splits(each)), ratio) for each in (first, second)]
    return Unpaired(*both), f"{len(first)} and {_count(len(second), 'run')}, not paired{on}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def _binding_edge(contrast: Contrast, value: float, estimate: Estimate) -> float:
    """Return the edge that decides: the one that is harder to tell from the mean, on the scale of the estimate."""
    edges = [edge for edge in (contrast.low, contrast.high) if math.isfinite(edge)]
    scaled = [math.log(edge) if contrast.ratio else edge for edge in edges]
    if _is_inside(contrast, value):
        return max(scaled, key=estimate.p)
    return min(scaled, key=lambda edge: abs(edge - estimate.mean))
