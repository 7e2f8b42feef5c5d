"""Claims judged, by the rules of docs/claims.md: do words agree with published figures, what do the runs decide?"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from string import digits

import numpy as np
from scipy.stats import fisher_exact

from effv2.core.errors import close_names
from effv2.evidence import statistics
from effv2.evidence.claims import OF_ANSWERS, Claim, Claims, Contrast
from effv2.evidence.protocols import Chosen, RightAnswers, choose, counted, over_splits, published_value
from effv2.evidence.quantities import QUANTITIES, Quantity, points, quantity
from effv2.evidence.statistics import FEWEST, LEVEL, MOST_RUNS, Estimate, p_text
from effv2.tracking.read import RunRecord

CONSISTENT, INCONSISTENT, NO_FIGURES = "consistent", "contradicted", "no figures"  # words beside published figures


class Verdict(str, Enum):
    """What evidence says of a claim."""

    SUPPORTED = "supported"
    CONTRADICTED = "contradicted"
    UNDECIDED = "undecided"
    NOT_TESTED = "not tested here"


@dataclass(frozen=True)
class Finding:
    """One thing that a claim says, and what figures and runs say of it, in words."""

    contrast: Contrast
    says: str
    published: str = ""
    agrees: bool | None = None  # with the words; None without published figures
    evidence: str = ""  # empty without runs
    single: str = ""  # where a single run is expected
    inside: bool = False
    decided: bool = False  # without a test
    p: float | None = None  # of the side on which the mean lies; None where runs are too few
    corrected: float | None = None  # Holm's
    tests: int = 1  # in its family
    further: Callable[[float], str] | None = None  # says what would decide at a level
    lacking: str = ""  # runs at all, or more of them

    @property
    def verdict(self) -> Verdict:
        """Return what the runs say of this one thing."""
        if not self.evidence:
            return Verdict.NOT_TESTED
        if not self.decided and (self.corrected is None or self.corrected >= LEVEL):
            return Verdict.UNDECIDED
        return Verdict.SUPPORTED if self.inside else Verdict.CONTRADICTED


@dataclass(frozen=True)
class Judgement:
    """A claim and all that was found."""

    id: str
    claim: Claim
    findings: Sequence[Finding]
    nearest: Sequence[Finding] = ()  # on other runs that come close, which decide nothing
    needs: str = ""
    assumed: str = ""
    commands: Sequence[str] = ()

    @property
    def words(self) -> str:
        """Say whether the words agree with the figures that were published with them."""
        known = [each.agrees for each in self.findings if each.agrees is not None]
        return (CONSISTENT if all(known) else INCONSISTENT) if known else NO_FIGURES

    @property
    def tested(self) -> bool:
        """Say whether there are runs of our own."""
        return any(each.evidence for each in self.findings)

    @property
    def on_published_alone(self) -> bool:
        """Say whether it is undecided since published single runs are all there is."""
        return not self.tested and self.words != NO_FIGURES

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
    """Judge all claims on the runs there are, the oldest first.

    p-values are corrected for their number in a family of claims, in which what several claims say is tested once.
    """
    find_one = partial(_find, claims, runs, right)
    found = {id_: [find_one(contrast) for contrast in claims.contrasts(id_)] for id_ in claims.claims}
    families: dict[str, dict[Contrast, float]] = defaultdict(dict)
    for id_, findings in found.items():
        families[id_.rstrip(digits)] |= {each.contrast: each.p for each in findings if each.p is not None}

    def texts(of: Sequence[Finding], name: str) -> list[str]:
        known = (getattr(claims.protocols[each.contrast.protocol], name) for each in of)
        return list(dict.fromkeys(filter(None, known)))

    judgements = []
    for id_, uncorrected in found.items():
        tests = families[id_.rstrip(digits)]
        corrected = dict(zip(tests, statistics.holm(list(tests.values())), strict=True))
        findings = []
        for each in uncorrected:
            p, lacking = corrected.get(each.contrast), each.lacking
            if p is not None and p >= LEVEL and each.further:
                lacking = each.further(LEVEL / len(corrected))  # which the smallest p-value of the family has to reach
            findings.append(replace(each, corrected=p, tests=len(corrected), lacking=lacking))
        untested = [each for each in findings if not each.evidence]
        undecided = [each for each in findings if each.verdict == Verdict.UNDECIDED]
        near = {each.contrast: claims.protocols[each.contrast.protocol].nearest for each in untested}
        others = [find_one(replace(contrast, protocol=name)) for contrast, name in near.items() if name]
        nearest = [each for each in others if each.evidence]
        needs, assumed = "; ".join(texts(untested, "needs")), " ".join(texts([*findings, *nearest], "assumed"))
        commands = texts([*untested, *undecided], "command")
        judgements.append(Judgement(id_, claims.claims[id_], findings, nearest, needs, assumed, commands))
    return judgements


def _find(claims: Claims, runs: Sequence[RunRecord], right: RightAnswers, contrast: Contrast) -> Finding:
    """Return what the published figures, one run an arm, and the finished runs say of one thing that a claim says."""
    protocol, what = claims.protocols[contrast.protocol], quantity(contrast.metric)
    text, ends = _text(contrast, what), (contrast.low, contrast.high)
    where = [f"{word} {text(end)}" for word, end in zip(("above", "below"), ends, strict=True) if math.isfinite(end)]
    region = where[0] if len(where) == 1 else f"from {text(contrast.low)} to {text(contrast.high)}"
    finding = Finding(contrast, f"{what.words}: {(' / ' if contrast.ratio else ' − ').join(contrast.arms)} {region}")
    values = [published_value(protocol, contrast.metric, arm) for arm in contrast.arms]
    known = [value for value in values if value is not None]
    if len(known) == len(values) and (all(known) or not contrast.ratio):
        shown, count = " against ".join(map(what.text, known)), protocol.published.test_images
        if count and contrast.against and what.is_accuracy and "train" not in contrast.metric:
            first, second = (round(count * each) for each in known)
            p = p_text(fisher_exact([[first, count - first], [second, count - second]]).pvalue)
            shown += f" ({first:,} and {second:,} of {count:,} images right; Fisher's exact {p})"
        if protocol.published.unchecked:
            shown += f" ({protocol.published.unchecked})"
        finding = replace(finding, published=shown, agrees=_is_inside(contrast, *known))
    chosen = choose(runs, protocol, contrast.arms, what, positive=contrast.ratio)
    if not chosen.arms:
        return replace(finding, lacking=_misspelt(contrast.metric, runs) or chosen.why)
    if what.fixed:
        return _on_fixed(finding, what, chosen)
    if protocol.over == "images":
        return _over_images(finding, what, chosen, right)
    return _over_seeds(finding, what, chosen)


def _misspelt(metric: str, runs: Sequence[RunRecord]) -> str:
    """Say which name may be meant by that of a metric that no run has; empty where none is near."""
    names = dict.fromkeys([*QUANTITIES, *OF_ANSWERS, *(name for run in runs for name in run.metrics)])
    near = "" if metric in names else close_names(metric, list(names), 1)
    return f"no run has {metric}; did you mean {near}?" if near else ""


def _text(contrast: Contrast, what: Quantity) -> Callable[[float], str]:
    """Return how values of a contrast are written."""
    if contrast.ratio:
        return "{:.2f}".format
    if not contrast.against:
        return what.text
    text = points if what.is_accuracy else "{:+.3g}".format
    return lambda value: "0" if value == 0 else text(value)


def _is_inside(contrast: Contrast, first: float, second: float | None = None) -> bool:
    """Say whether the value of one arm, or of two, is in the claimed region, of which an open edge isn't part."""
    value = first if second is None else first / second if contrast.ratio else first - second
    low, high = contrast.low, contrast.high
    return low < value < high if math.isinf(low) or math.isinf(high) else low <= value <= high


def _on_fixed(finding: Finding, what: Quantity, chosen: Chosen) -> Finding:
    """Judge a quantity that doesn't vary: one run of each arm decides."""
    values = [value for of_arm in chosen.arms.values() for value in set(what.values(of_arm.values()))]
    if len(values) > len(chosen.arms):
        return replace(finding, evidence=f"runs differ in it: {', '.join(map(what.text, sorted(values)))}")
    text = f"{' against '.join(map(what.text, values))}, the same in every run"
    return replace(finding, evidence=text, inside=_is_inside(finding.contrast, *values), decided=True)


def _over_images(finding: Finding, what: Quantity, chosen: Chosen, right: RightAnswers) -> Finding:
    """Judge fixed networks on their test images: Wilson's interval of one, McNemar's exact test of two."""
    contrast = finding.contrast
    answers = [right(list(of_arm.values())[-1]) for of_arm in chosen.arms.values()]
    shared = sorted(set.intersection(*map(set, answers)))
    if not shared:
        return replace(finding, evidence="the runs have no test images in common")
    correct = [np.array([each[image] for image in shared]) for each in answers]
    shown, size = " against ".join(what.text(each.mean()) for each in correct), f"on {len(shared):,} images"
    if contrast.against:
        first, second, p = statistics.mcnemar(*correct)
        text = f"{shown} {size}; {first} and {second} right alone (McNemar)"
        return replace(finding, evidence=text, inside=first > second, p=p)
    interval = statistics.wilson(int(correct[0].sum()), len(shared))
    inside = contrast.low <= interval.low and interval.high <= contrast.high
    outside = interval.high < contrast.low or interval.low > contrast.high
    text = f"{shown} [{interval.text(what.text)}] {size} (Wilson)"
    return replace(finding, evidence=text, inside=inside, decided=inside or outside)


def _over_seeds(finding: Finding, what: Quantity, chosen: Chosen) -> Finding:
    """Judge trained networks: the interval of a mean, or of a mean difference, over runs."""
    contrast, unit = finding.contrast, "split" if chosen.splits > 1 else "seed"
    scale, back = (math.log, math.exp) if contrast.ratio else (float, float)
    values = [dict(zip(runs, map(scale, what.values(runs.values())), strict=True)) for runs in chosen.arms.values()]
    first, second, pairs = values[0], values[-1], chosen.pairs()
    if not contrast.against:
        samples, on = [first], counted(len(first), "run")
    elif len(pairs) >= min(FEWEST, len(first), len(second)):
        samples, on = [{pair: first[pair] - second[pair] for pair in pairs}], counted(len(pairs), "pair")
    else:
        samples, on = [first, second], f"{len(first)} and {counted(len(second), 'run')}, not paired"
    on += f" on {chosen.splits} splits" if chosen.splits > 1 else ""
    estimate, written = Estimate(*map(over_splits, samples), overlap=chosen.overlap), _text(contrast, what)
    mean, interval = back(estimate.mean), estimate.interval()
    interval = interval if contrast.against else interval.within(what.possible)
    between = f" [{interval.text(lambda value: written(back(value)))}]" if estimate.n > 1 else ""
    finding = replace(
        finding,
        evidence="; ".join([f"{written(mean)}{between}, {on}", *chosen.aside]),
        inside=_is_inside(contrast, mean),
        single="" if contrast.against or estimate.n < 2 else _single(contrast, what, estimate, list(first.values())),
    )
    if estimate.n < FEWEST:
        more = counted(FEWEST - estimate.n, f"more {unit}")
        return replace(finding, lacking=f"fewer than {FEWEST} runs decide nothing; {more} at least")
    edges = [scale(each) for each in (contrast.low, contrast.high) if math.isfinite(each)]
    # The edge that decides is the one that is harder to tell from the mean.
    edge = max(edges, key=estimate.p) if finding.inside else min(edges, key=lambda each: abs(each - estimate.mean))
    return replace(finding, p=estimate.p(edge), further=partial(_further, estimate, edge, unit))


def _single(contrast: Contrast, what: Quantity, estimate: Estimate, values: Sequence[float]) -> str:
    """Say where a single run is expected, and whether the value that is claimed lies there."""
    interval = estimate.prediction(Estimate(values).deviation).within(what.possible)
    claimed = (contrast.low + contrast.high) / 2
    lies = "inside" if interval.low <= claimed <= interval.high else "outside"
    known = f"; the claimed {what.text(claimed)} lies {lies}" if math.isfinite(claimed) else ""
    return f"a single run is expected from {interval.text(what.text)}{known}"


def _further(estimate: Estimate, edge: float, unit: str, level: float) -> str:
    """Say how many more seeds or splits are likely to tell a mean from an edge."""
    further = statistics.more_to_decide(estimate, edge, level)
    if further is None:
        return f"more than {MOST_RUNS:,} further {unit}s would be needed, if there is a difference"
    few, many = further
    up_to = "" if few == many else f" to {many:,}" if many else f" to more than {MOST_RUNS:,}"
    return f"about {few:,}{up_to} more {unit}s would decide"
