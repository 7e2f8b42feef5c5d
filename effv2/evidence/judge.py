"""Claims judged: do their words agree with the published figures, and what do the runs decide?

A claim says that quantities lie in regions. The words agree where each published figure does. The runs support it
where the 95 % interval of each mean (paired by seeds where arms have them in common) lies in its region, contradict it
where one lies outside, and leave it undecided otherwise; what counts is the p-value after Holm's correction within
the family of the claim. Fewer than three runs decide nothing about training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from effv2.evidence.claims import Claim, Claims, Contrast, family
from effv2.evidence.findings import Finding, Verdict, find
from effv2.evidence.selection import RightAnswers, complete
from effv2.evidence.statistics import LEVEL, MOST_RUNS, holm, more_to_decide
from effv2.tracking.read import RunRecord

CONSISTENT, INCONSISTENT, NO_FIGURES = "consistent", "contradicted", "no figures"  # words beside published figures


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
    def words(self) -> str:
        """Say whether the words agree with the figures that were published with them."""
        known = [each.agrees for each in self.findings if each.agrees is not None]
        return (CONSISTENT if all(known) else INCONSISTENT) if known else NO_FIGURES

    @property
    def tested(self) -> bool:
        """Say whether there are runs of our own."""
        return any(each.tested for each in self.findings)

    @property
    def on_published_alone(self) -> bool:
        """Say whether it is undecided for want of runs of our own: published single runs are all there is."""
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
    """Judge all claims on the runs there are, the oldest first."""
    answers: dict[str, Mapping[str, bool]] = {}  # by run: each is read once, however many claims ask

    def known(run: RunRecord) -> Mapping[str, bool]:
        if run.run_id not in answers:
            answers[run.run_id] = right(run)
        return answers[run.run_id]

    find_one = partial(find, claims, complete(runs), known)
    found = {id_: [find_one(contrast) for contrast in claims.contrasts(id_)] for id_ in claims.claims}
    return [_judgement(id_, claims, findings, find_one) for id_, findings in _corrected(found).items()]


def _corrected(found: Mapping[str, Sequence[Finding]]) -> dict[str, list[Finding]]:
    """Correct the p-values of each family of claims for their number. What several claims say is tested once."""
    families: dict[str, dict[Contrast, float]] = {}
    for id_, findings in found.items():
        tests = families.setdefault(family(id_), {})
        tests.update({each.contrast: each.p for each in findings if each.p is not None})
    corrected = {name: dict(zip(tests, holm(list(tests.values())), strict=True)) for name, tests in families.items()}
    return {id_: [_decided(each, corrected[family(id_)]) for each in findings] for id_, findings in found.items()}


def _decided(finding: Finding, corrected: Mapping[Contrast, float]) -> Finding:
    """Return the finding with its corrected p-value and, where that doesn't decide, how many more runs are likely to.

    Those must do with the level that the smallest p-value of the family has to reach.
    """
    tests, p = len(corrected), corrected.get(finding.contrast)
    finding = replace(finding, corrected=p, tests=tests)
    if p is None or p < LEVEL or finding.estimate is None:
        return finding
    further = more_to_decide(finding.estimate, finding.edge, LEVEL / tests)
    if further is None:
        more = f"more than {MOST_RUNS:,} further {finding.unit}s would be needed, if there is a difference"
        return replace(finding, more=more)
    few, many = further
    up_to = f"{many:,}" if many else f"more than {MOST_RUNS:,}"
    number = f"about {few:,}" if few == many else f"about {few:,} to {up_to}"
    return replace(finding, more=f"{number} more {finding.unit}s would decide")


def _judgement(
    id_: str, claims: Claims, findings: Sequence[Finding], find_one: Callable[[Contrast], Finding]
) -> Judgement:
    lacking = [each for each in findings if not each.tested]
    undecided = [each for each in findings if each.verdict == Verdict.UNDECIDED]
    contrasts = [
        replace(each.contrast, protocol=near)
        for each in lacking
        if (near := claims.protocols[each.contrast.protocol].nearest)
    ]
    nearest = [found for contrast in dict.fromkeys(contrasts) if (found := find_one(contrast)).tested]

    def told(of: Sequence[Finding], name: str) -> list[str]:
        texts = (getattr(claims.protocols[each.contrast.protocol], name) for each in of)
        return list(dict.fromkeys(filter(None, texts)))

    needs, assumed = "; ".join(told(lacking, "needs")), " ".join(told([*findings, *nearest], "assumed"))
    commands = told([*lacking, *undecided], "command")
    return Judgement(id_, claims.claims[id_], findings, nearest, needs, assumed, commands)
