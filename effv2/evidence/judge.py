"""Claims judged by the rules of docs/claims.md: agreement with published figures, and the decision of the runs."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial

import numpy as np
from scipy.stats import fisher_exact

from effv2.core.errors import close_names
from effv2.evidence import statistics
from effv2.evidence.answers import estimate, outlook
from effv2.evidence.claims import OF_ANSWERS, Claim, Claims, Contrast, published_value, read_claims
from effv2.evidence.protocols import Chosen, RightAnswers, choose
from effv2.evidence.quantities import LEVEL_EPOCHS, QUANTITIES, TEST, Quantity, quantity
from effv2.evidence.statistics import EVERY_LOOK, FEWEST, LEVEL, Estimate, p_text
from effv2.tracking.read import BEST_TEST, LAST_TEST, SELECTED_TEST, RunRecord

FEW_IMAGES = 1_000  # test images below which images matter as much as seeds
FEW_RUNS = 10  # runs below which a verdict on a level assumes normal values
FEW_LEARN = "if only three in ten runs learn, 30 % of verdicts on 3 runs are false, 18 % on 5, 3 % on 10"
Number = Callable[[float], float]
CONSISTENT, INCONSISTENT, NO_FIGURES = "consistent", "contradicted", "no figures"  # of published figures


class Verdict(str, Enum):
    """The verdict of the evidence on a claim."""

    SUPPORTED = "supported"
    CONTRADICTED = "contradicted"
    UNDECIDED = "undecided"
    NOT_TESTED = "not tested here"


@dataclass(frozen=True)
class Finding:
    """One statement of a claim, and the results of figures and runs for it, in words."""

    contrast: Contrast
    says: str
    published: str = ""
    agrees: bool | None = None  # whether the words agree; None without published figures
    evidence: str = ""  # empty without runs
    single: str = ""  # the range of a single further run
    inside: bool = False
    decided: bool = False  # without a test
    p: float | None = None  # of the side of the mean; None with too few runs
    corrected: float | None = None  # for the claims of the family (Holm), and outside the region for the checks
    tests: int = 1  # number of tests in the correction
    further: Callable[[float], str] | None = None  # estimates what would decide at a level
    warning: str = ""  # a remark on a verdict
    lacking: str = ""  # missing: any runs, or more of them

    @property
    def verdict(self) -> Verdict:
        """Return the verdict of the runs on this statement."""
        if not self.evidence:
            return Verdict.NOT_TESTED
        if not self.decided and (self.corrected is None or self.corrected >= LEVEL):
            return Verdict.UNDECIDED
        return Verdict.SUPPORTED if self.inside else Verdict.CONTRADICTED


@dataclass(frozen=True)
class Judgement:
    """A claim and all findings."""

    id: str
    claim: Claim
    findings: Sequence[Finding]
    nearest: Sequence[Finding] = ()  # on the nearest other runs, which decide nothing
    needs: str = ""
    assumed: str = ""
    commands: Sequence[str] = ()

    @property
    def words(self) -> str:
        """Return whether the words agree with the figures that were published with them."""
        known = [each.agrees for each in self.findings if each.agrees is not None]
        return (CONSISTENT if all(known) else INCONSISTENT) if known else NO_FIGURES

    @property
    def tested(self) -> bool:
        """Say whether there are runs of our own."""
        return any(each.evidence for each in self.findings)

    @property
    def verdict(self) -> Verdict:
        """Return the verdict of the evidence. Published figures without runs decide nothing."""
        found = {each.verdict for each in self.findings}
        if Verdict.CONTRADICTED in found:
            return Verdict.CONTRADICTED
        if found == {Verdict.SUPPORTED}:
            return Verdict.SUPPORTED
        return Verdict.UNDECIDED if self.tested or self.words != NO_FIGURES else Verdict.NOT_TESTED


def judge(claims: Claims, runs: Sequence[RunRecord], right: RightAnswers) -> list[Judgement]:
    """Judge all claims on the runs, which are in order of age, the oldest first.

    A claim is supported if all its statements are: the largest p-value counts. It is contradicted if one statement is:
    the smallest p-value counts, times their number. Claims of a family are corrected for their number (Holm).
    """
    find_one = partial(_find, claims, runs, right)
    uncorrected = {id_: [find_one(contrast) for contrast in claims.contrasts(id_)] for id_ in claims.claims}

    def texts(of: Sequence[Finding], name: str) -> list[str]:
        known = (getattr(claims.protocols[each.contrast.protocol], name) for each in of)
        return list(dict.fromkeys(filter(None, known)))

    judgements = []
    for id_, findings in _corrected(claims, uncorrected).items():
        untested = [each for each in findings if not each.evidence]
        undecided = [each for each in findings if each.verdict == Verdict.UNDECIDED]
        near = {each.contrast: claims.protocols[each.contrast.protocol].nearest for each in untested}
        others = [find_one(replace(contrast, protocol=name)) for contrast, name in near.items() if name]
        nearest = [each for each in others if each.evidence]
        needs, assumed = "; ".join(texts(untested, "needs")), " ".join(texts([*findings, *nearest], "assumed"))
        commands = texts([*untested, *undecided], "command")
        judgements.append(Judgement(id_, claims.claims[id_], findings, nearest, needs, assumed, commands))
    return judgements


def _corrected(claims: Claims, found: Mapping[str, Sequence[Finding]]) -> dict[str, list[Finding]]:
    """Return the findings by claim, with corrected p-values: those below LEVEL decide.

    A user's claims don't belong to a published family. Claims without a family are judged by themselves.
    """
    families: dict[object, dict[str, float]] = defaultdict(dict)  # p-values by claim
    for id_, findings in found.items():
        p = [(each.p, each.inside) for each in findings if each.p is not None]
        if p:
            whole = all(each.p is not None or each.decided for each in findings)  # otherwise it can't be supported
            supported = max(value if inside else 1.0 for value, inside in p) if whole else 1.0
            contradicted = len(p) * min(1.0 if inside else value for value, inside in p)
            name = claims.claims[id_].family
            family = (name, id_ in read_claims().claims) if name else id_
            families[family][id_] = min(supported, contradicted, 1.0)
    corrected = {id_: list(findings) for id_, findings in found.items()}
    for tests in families.values():
        weights = [claims.claims[id_].weight for id_ in tests]
        for id_, (_, level) in zip(tests, statistics.holm(list(tests.values()), weights), strict=True):
            checks = sum(each.p is not None for each in found[id_])
            corrected[id_] = [_at_level(each, level, len(tests), checks) for each in found[id_]]
    return corrected


def _at_level(finding: Finding, level: float, claims: int, checks: int) -> Finding:
    """Correct the p-value of a finding, if it has one, for the level of its claim and the number of its checks."""
    if finding.p is None:
        return finding
    times = 1 if finding.inside else checks
    corrected = min(finding.p * times * LEVEL / level, 1.0)
    finding = replace(finding, corrected=corrected, tests=claims * times)
    if corrected < LEVEL:
        return replace(finding, evidence="; ".join(filter(None, (finding.evidence, finding.warning))))
    return replace(finding, lacking=finding.further(level / times) if finding.further else finding.lacking)


def _find(claims: Claims, runs: Sequence[RunRecord], right: RightAnswers, contrast: Contrast) -> Finding:
    """Compare one statement of a claim with the published figures, one run per arm, and with the finished runs."""
    protocol, what = claims.protocols[contrast.protocol], quantity(contrast.metric)
    text, ends = _writing(contrast, what)[-1], (contrast.low, contrast.high)
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
        names = dict.fromkeys([*QUANTITIES, *OF_ANSWERS, *(name for run in runs for name in run.metrics)])
        misspelt = contrast.metric not in names and not what.metric
        near = close_names(contrast.metric, list(names), 1) if misspelt else ""
        return replace(finding, lacking=f"no run has {contrast.metric}; did you mean {near}?" if near else chosen.why)
    if what.fixed:
        return _on_fixed(finding, what, chosen)
    if protocol.over == "images":
        return _over_images(finding, what, chosen, right)
    return _over_seeds(finding, what, chosen, right)


def _writing(contrast: Contrast, what: Quantity) -> tuple[Number, Number, Callable[[float], str]]:
    """Return functions from a contrast's values to averaged ones (logarithms for ratios), back, and to words."""
    if contrast.ratio:
        return math.log, math.exp, "{:.2f}".format
    text = (lambda value: "0" if value == 0 else what.difference(value)) if contrast.against else what.text
    return float, float, text


def _is_inside(contrast: Contrast, first: float, second: float | None = None) -> bool:
    """Return whether the value of one arm, or of two, is in the claimed region, without its open edge."""
    value = first if second is None else first / second if contrast.ratio else first - second
    low, high = contrast.low, contrast.high
    return low < value < high if math.isinf(low) or math.isinf(high) else low <= value <= high


def _on_fixed(finding: Finding, what: Quantity, chosen: Chosen) -> Finding:
    """Judge a quantity that doesn't vary: one run per arm decides."""
    values = [value for of_arm in chosen.arms.values() for value in set(what.values(of_arm.values()))]
    if len(values) > len(chosen.arms):
        return replace(finding, evidence=f"its value differs between runs: {', '.join(map(what.text, sorted(values)))}")
    text = f"{' against '.join(map(what.text, values))}, the same in every run"
    return replace(finding, evidence=text, inside=_is_inside(finding.contrast, *values), decided=True)


def _over_images(finding: Finding, what: Quantity, chosen: Chosen, right: RightAnswers) -> Finding:
    """Judge fixed networks on their test images: Wilson's interval of one, McNemar's exact test of two."""
    contrast = finding.contrast
    correct = statistics.right_on_shared([right(list(of_arm.values())[-1]) for of_arm in chosen.arms.values()])
    if not correct.size:
        return replace(finding, evidence="the runs have no test images in common")
    shown, size = " against ".join(what.text(each.mean()) for each in correct), f"on {correct.shape[1]:,} images"
    if contrast.against:
        first, second, p = statistics.mcnemar(*correct)
        text = f"{shown} {size}; only one is right on {first} and {second} (McNemar)"
        return replace(finding, evidence=text, inside=first > second, p=p)
    interval = statistics.wilson(int(correct.sum()), correct.size)
    inside = contrast.low <= interval.low and interval.high <= contrast.high
    outside = interval.high < contrast.low or interval.low > contrast.high
    text = f"{shown} [{interval.text(what.text)}] {size} (Wilson)"
    return replace(finding, evidence=text, inside=inside, decided=inside or outside)


def _over_seeds(finding: Finding, what: Quantity, chosen: Chosen, right: RightAnswers) -> Finding:
    """Judge trained networks: the interval of a mean, or of a mean difference, over runs."""
    contrast, unit = finding.contrast, "splits" if chosen.splits > 1 else "seeds"
    scale, back, written = _writing(contrast, what)
    missed = {arm: what.values(of_arm.values()).count(math.inf) for arm, of_arm in chosen.arms.items()}
    if any(missed.values()):
        counts = " and ".join(f"{n} of {len(chosen.arms[arm])} runs of {arm}" for arm, n in missed.items() if n)
        why = "such a time decides nothing: name a lower accuracy, or train longer"
        return replace(finding, evidence="; ".join((f"not reached by {counts}", *chosen.aside)), lacking=why)
    found, evidence = _estimate(contrast, what, chosen)
    if not math.isfinite(found.mean):
        return replace(finding, lacking="the arms have no common seed, but the protocol is paired")
    finding = replace(
        finding,
        evidence="; ".join(filter(None, [evidence, *_beside(contrast, what, chosen, right), *chosen.aside])),
        inside=_is_inside(contrast, back(found.mean)),
        single="" if contrast.against or found.n < 2 or chosen.splits > 1 else _single(contrast, what, found),
        warning="" if contrast.against or found.n >= FEW_RUNS else f"fewer than {FEW_RUNS} runs: {FEW_LEARN}",
    )
    if chosen.why or found.n < FEWEST:
        few = f"fewer than {FEWEST} {unit} decide nothing; at least {FEWEST - found.n} more are needed"
        return replace(finding, lacking=chosen.why or few)
    edges = [scale(each) for each in (contrast.low, contrast.high) if math.isfinite(each)]
    # The edge that is harder to distinguish from the mean decides.
    edge = max(edges, key=found.p) if finding.inside else min(edges, key=lambda each: abs(each - found.mean))
    sides = len(edges) if finding.inside else 1  # between two edges, each is tested from one side
    p = found.p_within(*edges) if sides == 2 else found.p(edge)
    nothing = f"the truth is {written(back(edge))}" if edge else "there is no difference"
    return replace(finding, p=p, further=lambda level: outlook(found, sides * level, edge, unit, nothing))


def _estimate(contrast: Contrast, what: Quantity, chosen: Chosen) -> tuple[Estimate, str]:
    """Return the mean of a quantity over runs, or a mean difference, and its text with the interval."""
    (scale, back, written), looks = _writing(contrast, what), chosen.looks
    values = [{pair: scale(what.value(run) or 0.0) for pair, run in runs.items()} for runs in chosen.arms.values()]
    found = estimate(values, looks, chosen.paired, chosen.overlap)
    counts = " and ".join(str(len(each)) for each in values)
    on = f"{counts} run{'' if counts == '1' else 's'}"
    if chosen.splits > 1:
        on += f" on {chosen.splits} splits"
    elif chosen.paired and contrast.against:
        on += f", {found.n} pairs"
    interval = found.interval() if contrast.against else found.interval().within(what.possible)
    shown = found.n > 1 and all(map(math.isfinite, interval))
    between = f" [{interval.text(lambda value: written(back(value)))}]" if shown else ""
    return found, f"{written(back(found.mean))}{between}, {on}{f', {looks.text()}' if looks != EVERY_LOOK else ''}"


def _beside(contrast: Contrast, what: Quantity, chosen: Chosen, right: RightAnswers) -> Iterator[str]:
    """Return remarks on a test accuracy: that of the last epoch next to the best one, and the effect of few images."""
    runs = [run for of_arm in chosen.arms.values() for run in of_arm.values()]
    if what.name == BEST_TEST:
        long = all(len(run.history.get(TEST, ())) >= LEVEL_EPOCHS for run in runs)
        last = quantity("level/test_accuracy" if long else LAST_TEST)
        if len(last.values(runs)) == len(runs) and (not contrast.ratio or min(last.values(runs)) > 0):
            yield f"{last.words}: {_estimate(contrast, last, chosen)[1]}"
    images = [run.images["test"].images if "test" in run.images else 0 for run in runs]
    few = chosen.splits == 1 and all(0 < count < FEW_IMAGES for count in images)
    counts = [len(of_arm) for of_arm in chosen.arms.values()]
    if few and not contrast.ratio and min(counts) >= FEWEST and what.name in (BEST_TEST, SELECTED_TEST, LAST_TEST):
        correct, text = statistics.right_on_shared(list(map(right, runs))), _writing(contrast, what)[-1]
        if correct.shape[1] > 1:
            mean, interval = statistics.over_images(np.split(correct, np.cumsum(counts)[:-1]), chosen.looks)
            interval = interval if contrast.against else interval.within(what.possible)
            yield (
                f"if the {correct.shape[1]} test images also count as a sample, {text(mean)} "
                f"[{interval.text(text)}] (selected epoch); the verdict is over seeds, on these images"
            )


def _single(contrast: Contrast, what: Quantity, found: Estimate) -> str:
    """Return the range of a single further run, and whether the claimed value is in it."""
    interval, claimed = found.prediction().within(what.possible), (contrast.low + contrast.high) / 2
    lies = "inside" if interval.low <= claimed <= interval.high else "outside"
    known = f"; the claimed {what.text(claimed)} is {lies}" if math.isfinite(claimed) else ""
    return f"a single run is expected from {interval.text(what.text)}{known}"
