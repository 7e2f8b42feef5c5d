"""One thing that a claim says, held against published figures and against runs."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache

import numpy as np

from effv2.evidence.claims import PUBLISHED, Claims, Contrast
from effv2.evidence.quantities import TEST, TRAIN, Quantity, points, quantity
from effv2.evidence.selection import Chosen, RightAnswers, SplitAndSeed, choose, counted, over_splits
from effv2.evidence.statistics import FEWEST, LEVEL, Estimate, Interval, fisher, mcnemar, p_text, wilson
from effv2.tracking.read import RunRecord


class Verdict(str, Enum):
    """What evidence says of a claim."""

    SUPPORTED = "supported"
    CONTRADICTED = "contradicted"
    UNDECIDED = "undecided"
    NOT_TESTED = "not tested here"


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


def find(claims: Claims, runs: Sequence[RunRecord], right: RightAnswers, contrast: Contrast) -> Finding:
    """Return what the published figures and the finished runs say of one thing that a claim says."""
    protocol, what = claims.protocols[contrast.protocol], quantity(contrast.metric)
    finding = _with_published(Finding(contrast, _says(contrast, what)), claims, what)
    chosen = choose(runs, protocol, contrast.arms, what, positive=contrast.ratio)
    if not all(chosen.arms.values()):
        return replace(finding, lacking=chosen.why)
    finding = replace(finding, tested=True)
    if what.fixed:
        return _on_fixed(finding, what, chosen)
    if protocol.over == "images":
        return _over_images(finding, what, chosen, right)
    finding = _over_seeds(finding, what, chosen)
    return replace(finding, evidence="; ".join([finding.evidence, *chosen.aside]))


def _says(contrast: Contrast, what: Quantity) -> str:
    """Say in words what a contrast says."""
    text = _text(contrast, what)
    head = f"{what.words}: {(' / ' if contrast.ratio else ' − ').join(contrast.arms)}"
    if math.isinf(contrast.high):
        return f"{head} above {text(contrast.low)}"
    if math.isinf(contrast.low):
        return f"{head} below {text(contrast.high)}"
    return f"{head} from {text(contrast.low)} to {text(contrast.high)}"


def _text(contrast: Contrast, what: Quantity) -> Callable[[float], str]:
    """Return how values of a contrast are written."""
    if contrast.ratio:
        return "{:.2f}".format
    if not contrast.against:
        return what.text
    text = points if what.is_accuracy else "{:+.3g}".format
    return lambda value: "0" if value == 0 else text(value)


def _combined(contrast: Contrast, first: float, second: float = 0) -> float:
    """Return the value of a contrast from those of its arms."""
    return first / second if contrast.ratio else first - second


def _is_inside(contrast: Contrast, value: float) -> bool:
    """Say whether a value lies in the claimed region; an open edge isn't part of it, those about a value are."""
    low, high = contrast.low, contrast.high
    return low < value < high if math.isinf(low) or math.isinf(high) else low <= value <= high


@cache
def published_runs() -> Mapping[str, Mapping[str, RunRecord]]:
    """Return the post's training runs, as far as it published their curves, by study and arm; one run an arm."""
    histories: dict[str, dict[str, dict[str, dict[int, float]]]] = {}
    with (PUBLISHED / "curves.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            of_arm = histories.setdefault(row["study"], {}).setdefault(row["arm"], {TRAIN: {}, TEST: {}})
            for name, column in ((TRAIN, "train_accuracy_percent"), (TEST, "test_accuracy_percent")):
                of_arm[name][int(row["epoch"])] = round(float(row[column]) / 100, 6)

    def as_run(arm: str, history: dict[str, dict[int, float]]) -> RunRecord:
        test = history[TEST]
        metrics = {"best/test_accuracy": max(test.values()), "final/test_accuracy": test[max(test)]}
        return RunRecord("", arm, "FINISHED", {}, metrics, {}, history)

    return {study: {arm: as_run(arm, history) for arm, history in arms.items()} for study, arms in histories.items()}


def _published_value(claims: Claims, contrast: Contrast, arm: str) -> float | None:
    """Return the published figure of an arm: as it was printed, else from the published curve; None without one."""
    protocol = claims.protocols[contrast.protocol]
    printed = protocol.published.figures.get(contrast.metric, {})
    if arm in printed:
        return printed[arm]
    run = published_runs().get(protocol.study, {}).get(arm)
    return None if run is None else quantity(contrast.metric).value(run)


def _with_published(finding: Finding, claims: Claims, what: Quantity) -> Finding:
    """Hold the words against the published figures, one run an arm."""
    contrast, published = finding.contrast, claims.protocols[finding.contrast.protocol].published
    values = [_published_value(claims, contrast, arm) for arm in contrast.arms]
    known = [value for value in values if value is not None]
    if len(known) < len(values) or (contrast.ratio and not all(known)):
        return finding
    shown, count = " against ".join(map(what.text, known)), published.test_images
    if count and contrast.against and what.is_accuracy and "train" not in contrast.metric:
        first, second = (round(count * each) for each in known)
        p = fisher((first, second), (count, count))
        shown += f" ({first:,} and {second:,} of {count:,} images right; Fisher's exact {p_text(p)})"
    if published.unchecked:
        shown += f" ({published.unchecked})"
    return replace(finding, published=shown, agrees=_is_inside(contrast, _combined(contrast, *known)))


def _on_fixed(finding: Finding, what: Quantity, chosen: Chosen) -> Finding:
    """Judge a quantity that doesn't vary: one run of each arm decides."""
    seen = [{what.value(run) for run in of_arm.values()} for of_arm in chosen.arms.values()]
    values = [value for each in seen for value in each if value is not None]
    if len(values) > len(seen):
        return replace(finding, evidence=f"runs differ in it: {', '.join(map(what.text, sorted(values)))}")
    inside = _is_inside(finding.contrast, _combined(finding.contrast, *values))
    text = f"{' against '.join(map(what.text, values))}, the same in every run"
    return replace(finding, evidence=text, inside=inside, decided=True)


def _over_images(finding: Finding, what: Quantity, chosen: Chosen, right: RightAnswers) -> Finding:
    """Judge fixed networks on their test images: Wilson's interval of one, McNemar's exact test of two."""
    contrast = finding.contrast
    answers = [right(list(of_arm.values())[-1]) for of_arm in chosen.arms.values()]
    shared = sorted(set.intersection(*(set(each) for each in answers)))
    if not shared:
        return replace(finding, evidence="the runs have no test images in common")
    correct = [np.array([each[image] for image in shared]) for each in answers]
    shown = " against ".join(what.text(each.mean()) for each in correct)
    if contrast.against:
        test = mcnemar(correct[0], correct[1])
        text = f"{shown} on {len(shared):,} images; {test.only_first} and {test.only_second} right alone (McNemar)"
        return replace(finding, evidence=text, inside=test.only_first > test.only_second, p=test.p)
    interval = wilson(int(correct[0].sum()), len(shared))
    inside = contrast.low <= interval.low and interval.high <= contrast.high
    outside = interval.high < contrast.low or interval.low > contrast.high
    text = f"{shown} [{_ends(what.text, interval)}] on {len(shared):,} images (Wilson)"
    return replace(finding, evidence=text, inside=inside, decided=inside or outside)


def _ends(text: Callable[[float], str], interval: Interval) -> str:
    return f"{text(interval.low)} to {text(interval.high)}"


def _over_seeds(finding: Finding, what: Quantity, chosen: Chosen) -> Finding:
    """Judge trained networks: the interval of a mean, or of a mean difference, over runs."""
    contrast = finding.contrast
    scale, back = (math.log, math.exp) if contrast.ratio else (float, float)
    values = {
        arm: {pair: scale(value) for pair, run in runs.items() if (value := what.value(run)) is not None}
        for arm, runs in chosen.arms.items()
    }
    estimate, rests_on = _estimate([values[arm] for arm in contrast.arms], chosen)
    written = _text(contrast, what)

    def text(value: float) -> str:
        return written(back(value))

    interval = estimate.interval()
    if interval is not None and not contrast.against:
        interval = interval.within(what.possible)
    between = "" if interval is None else f" [{_ends(text, interval)}]"
    finding = replace(
        finding,
        evidence=f"{text(estimate.mean)}{between}, {rests_on}",
        inside=_is_inside(contrast, back(estimate.mean)),
        single="" if contrast.against else _single(contrast, what, estimate, list(values[contrast.arm].values())),
    )
    unit = "split" if chosen.splits > 1 else "seed"
    if estimate.n < FEWEST:
        lacking = counted(FEWEST - estimate.n, f"more {unit}")
        return replace(finding, more=f"fewer than {FEWEST} runs decide nothing; {lacking} at least")
    edge = _binding_edge(
        [scale(each) for each in (contrast.low, contrast.high) if math.isfinite(each)], finding, estimate
    )
    return replace(finding, p=estimate.p(edge), estimate=estimate, edge=edge, unit=unit)


def _estimate(values: Sequence[Mapping[SplitAndSeed, float]], chosen: Chosen) -> tuple[Estimate, str]:
    """Return the mean that is judged, or the mean difference, and on what it rests, in words."""
    on = f" on {chosen.splits} splits" if chosen.splits > 1 else ""
    first, second = values[0], values[-1]
    if len(values) == 1:
        return Estimate(over_splits(first), overlap=chosen.overlap), f"{counted(len(first), 'run')}{on}"
    pairs = chosen.pairs()
    if len(pairs) >= min(FEWEST, len(first), len(second)):
        differences = {pair: first[pair] - second[pair] for pair in pairs}
        return Estimate(over_splits(differences), overlap=chosen.overlap), f"{counted(len(pairs), 'pair')}{on}"
    both = Estimate(over_splits(first), over_splits(second), chosen.overlap)
    return both, f"{len(first)} and {counted(len(second), 'run')}, not paired{on}"


def _single(contrast: Contrast, what: Quantity, estimate: Estimate, values: Sequence[float]) -> str:
    """Say where a single run is expected, and whether the value that is claimed lies there."""
    interval = estimate.prediction(Estimate(tuple(values)).deviation)
    if interval is None:
        return ""
    interval, claimed = interval.within(what.possible), (contrast.low + contrast.high) / 2
    text = f"a single run is expected from {_ends(what.text, interval)}"
    if math.isinf(claimed):
        return text
    lies = "inside" if interval.low <= claimed <= interval.high else "outside"
    return f"{text}; the claimed {what.text(claimed)} lies {lies}"


def _binding_edge(edges: Sequence[float], finding: Finding, estimate: Estimate) -> float:
    """Return the edge that decides: the one that is harder to tell from the mean, on the scale of the estimate."""
    if finding.inside:
        return max(edges, key=estimate.p)
    return min(edges, key=lambda edge: abs(edge - estimate.mean))
