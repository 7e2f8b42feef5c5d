"""The arms of a study held against its baseline: the answer to "does this change help?", in words and cells."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from effv2.config.options import RACE
from effv2.core.errors import joined
from effv2.evidence.protocols import SplitAndSeed, counted, first_seeds, looks_of, overlap_of, pair_of
from effv2.evidence.quantities import EPOCH_SECONDS, TRAIN_SECONDS, Quantity, duration, number, points, quantity
from effv2.evidence.statistics import (
    EVERY_LOOK,
    FEWEST,
    Comparison,
    Estimate,
    Interval,
    Looks,
    Outcome,
    compare,
    seeds_for,
    seeds_to_decide,
)
from effv2.tracking.read import RunRecord, decisive_accuracy

NOTHING_YET, NONE = "No accuracies yet.", "none"  # in a cell: the runs lack the figure
FEW_SEEDS, LARGE = 6, 2.0  # what is guessed where there are no verdicts yet: seeds, and a difference in deviations
Arms = Mapping[str, Sequence[RunRecord]]
Values = Mapping[SplitAndSeed, float]  # of the runs of an arm


def _units(values: Sequence[Values]) -> list[Values]:
    """Return what counts once of each arm: its runs, or over several splits its mean on each of these."""
    if len({split for of_arm in values for split, _ in of_arm}) < 2:
        return list(values)
    means: list[Values] = []
    for of_arm in values:
        splits: dict[str, list[float]] = {}
        for (split, _), value in of_arm.items():
            splits.setdefault(split, []).append(value)
        means.append({(split, ""): sum(each) / len(each) for split, each in splits.items()})
    return means


def estimate(values: Sequence[Values], looks: Looks, paired: bool = False, overlap: float = 0.0) -> Estimate:
    """Return the mean of one arm, or of the first of two less the second.

    Within one split runs are independent: their seeds pair nothing, unless the study says that they do (`paired`).
    Over several splits the mean of an arm on a split counts once, and arms are compared on the splits that they share.
    """
    units, several = _units(values), len({split for of_arm in values for split, _ in of_arm}) > 1
    if not several and not paired:
        return Estimate(*(list(of_arm.values()) for of_arm in units), looks=looks)
    shared = [unit for unit in units[0] if all(unit in other for other in units)]
    differences = [units[0][unit] - sum(other[unit] for other in units[1:]) for unit in shared]
    return Estimate(differences or [math.nan], overlap=overlap if several else 0.0, looks=looks)


def outlook(found: Estimate, level: float, edge: float = 0.0, unit: str = "seeds", nothing: str = "") -> str:
    """Say how many seeds tell a mean, or a difference, from an edge, and that none do if there is `nothing`."""
    most = found.looks.most
    if found.n >= most:
        return f"all {most} {unit} that count are there: it stays undecided"
    about, few, many = seeds_to_decide(found, edge, level)
    if about is None:
        return f"if the true difference is as seen, {most} {unit} decide in fewer than 80 % of studies"
    about, few = max(about, found.n + 1), max(few or most, found.n + 1)
    ends = f"{few} to {max(many, few) if many else f'over {most}'}"
    rest = f"; if {nothing}, none will; adding {unit} is allowed, the level accounts for it" if nothing else ""
    return f"if the true difference is as seen, {about} {unit} ({ends}) decide in 80 % of studies{rest}"


@dataclass(frozen=True)
class Answer:
    """What runs say of an arm and the one that it is compared with, by an accuracy."""

    arm: str
    other: str
    comparison: Comparison
    margin: float = 0.0
    waits: str = ""  # for what, where there is no verdict yet

    @property
    def interval(self) -> Interval:
        """Return the interval of the difference, as far as fractions can differ."""
        return self.comparison.interval.within(Interval(-1, 1))

    def sentence(self) -> str:
        """Say it in one sentence, with the difference, its interval and the number of seeds, or of splits."""
        outcome, found = self.comparison.outcome, self.comparison.estimate
        if self.waits:
            return f"{self.arm} against {self.other}: {self.waits}"
        if outcome in (Outcome.BETTER, Outcome.WORSE):
            verb = "beats" if outcome is Outcome.BETTER else "is worse than"
            ends = Interval(*sorted(map(abs, self.interval))).text(lambda end: points(end, "", ""))
            return f"{self.arm} {verb} {self.other} by {points(abs(found.mean), '')} [{ends}], {found.n} seeds"
        shown = f"{points(found.mean)} [{self.interval.text(signed)}], {found.n} seeds"
        if outcome is Outcome.EQUIVALENT:
            return f"{self.arm} and {self.other}: no difference above {points(self.margin, '')}, {shown}"
        return f"{self.arm} against {self.other}: undecided, {shown}"

    def outlook(self) -> str:
        """Say how many seeds would decide where they don't yet."""
        undecided = self.comparison.outcome is Outcome.OPEN and not self.waits
        return outlook(self.comparison.estimate, self.comparison.level) if undecided else ""

    def cell(self) -> str:
        """Return the difference and its interval, where there are runs enough for one."""
        mean = signed(self.comparison.estimate.mean)
        return mean if self.waits else f"{mean} [{self.interval.text(signed)}]"

    def drawn(self) -> tuple[float, float, float, bool]:
        """Return mean and ends in percentage points, and whether it is decided."""
        mean, outcome = 100 * self.comparison.estimate.mean, self.comparison.outcome
        if self.waits:
            return mean, math.nan, math.nan, False
        return mean, 100 * self.interval.low, 100 * self.interval.high, outcome is not Outcome.OPEN


def signed(value: float) -> str:
    """Write a difference of accuracies without its unit, percentage points."""
    return points(value, unit="")


def reference(arm: str, baseline: str, schedules: Mapping[str, str]) -> str:
    """Return what an arm is compared with: the baseline under its own learning rate schedule, where there is one.

    So the two differ in one thing alone. `schedules` are the names of the arms' schedules; empty for the baseline.
    """
    own = f"{baseline}_{schedules[arm]}"
    return "" if arm == baseline else own if own in schedules and own != arm else baseline


def leader(values: Mapping[str, Values]) -> str:
    """Return the arm with the best mean, against which a race holds the others.

    It may be any of them. So each test counts as many times as there are others: the best arm is then called worse in
    5 % of races at most.
    """
    return max(values, key=lambda arm: statistics.fmean(values[arm].values()))


def leads(held: Mapping[str, Answer]) -> str:
    """Say which arm is the best of a race, or may be."""
    best = next(each.other for each in held.values())
    rivals = [arm for arm, each in held.items() if each.comparison.outcome is not Outcome.WORSE]
    if not rivals:
        return f"{best} is the best of {len(held) + 1}."
    alike = all(held[arm].comparison.outcome is Outcome.EQUIVALENT for arm in rivals)
    words = "no better or worse than it by more than the margin" if alike else "may be better"
    return f"{best} leads; {words}: {', '.join(rivals)}."


def answers(
    values: Mapping[str, Values],
    others: Mapping[str, str],
    looks: Looks = EVERY_LOOK,
    *,
    margin: float = 0.0,
    paired: bool = False,
    overlap: float = 0.0,
    tests: int = 0,
) -> dict[str, Answer]:
    """Hold each arm against the one that `others` names; corrected for the number of arms (Holm), or as `compare` says.

    `values` are those of all arms with runs, of which the first count; an arm that lacks them, or whose other does,
    has no answer.
    """
    pairs = {arm: other for arm, other in others.items() if other and values.get(arm) and values.get(other)}
    both = {arm: [first_seeds(values[each], looks.most) for each in (arm, other)] for arm, other in pairs.items()}
    estimates = {arm: estimate(each, looks, paired, overlap) for arm, each in both.items()}
    found = {}
    for arm, each in compare(estimates, margin, tests).items():
        there, waits = min(map(len, _units(both[arm]))), ""
        if looks.once and there < looks.most:
            waits = f"{looks.most} seeds planned, {there} there, no verdict before all are"
        elif each.outcome is Outcome.FEW:
            waits = f"{counted(each.estimate.n, 'seed')}, no verdict below {FEWEST}"
        found[arm] = Answer(arm, pairs[arm], each, margin, waits)
    return found


@dataclass(frozen=True)
class Held:
    """Arms held against their references, by the accuracy that decides."""

    arms: Arms
    what: Quantity
    looks: Looks
    margin: float
    others: Mapping[str, str]  # the reference of each arm; empty for the baseline
    answers: Mapping[str, Answer]
    values: Mapping[str, Values]  # the oldest first
    leads: str = ""  # how far a race is

    @property
    def against(self) -> str:
        """Return the one reference of all arms; empty where they have several, or none."""
        others = set(self.others.values()) - {""}
        return others.pop() if len(others) == 1 else ""

    def sentences(self, short: bool = False) -> list[str]:
        """Return what is said of the arms: each apart, and those together of which there is no verdict yet.

        The short form has all undecided ones together, and not what would decide them.
        """
        apart, together = list[str](), dict[tuple[str, str], list[str]]()
        for arm, other in ((arm, other) for arm, other in self.others.items() if other):
            answer = self.answers.get(arm)
            why = answer.waits if answer else "nothing to compare, a figure is missing"
            if answer and not why and short and answer.comparison.outcome is Outcome.OPEN:
                why = f"undecided, {answer.comparison.estimate.n} seeds"
            if answer and not why:
                apart.append("; ".join(filter(None, (answer.sentence(), "" if short else answer.outlook()))))
            else:
                together.setdefault((other, why), []).append(arm)
        found = [*apart, *(f"{joined(arms)} against {other}: {why}" for (other, why), arms in together.items())]
        if not found and (values := self.what.values(run for runs in self.arms.values() for run in runs)):
            arm, mean = next(iter(self.arms)), self.what.text(statistics.fmean(values))
            found = [f"{arm}: {mean} {self.what.words}, {counted(len(values), 'run')}, nothing to compare it with"]
        lines = [*filter(None, [self.leads]), *(f"{each}." for each in found)]
        few = [each for each in self.answers.values() if each.waits and not self.looks.once]
        more = [self._cost(few)] if few else []
        if any(each.outlook() for each in self.answers.values()):
            more.append("Adding seeds is allowed, the level accounts for it. Without a difference, none decide.")
        return [*lines, *([] if short else more)] or [NOTHING_YET]

    def cell(self, arm: str) -> str:
        """Return the difference of an arm; nothing for the baseline."""
        return self.answers[arm].cell() if arm in self.answers else NONE if self.others[arm] else ""

    def beyond(self, arm: str) -> int:
        """Return how many runs of an arm don't count, since the plan had fewer."""
        values = self.values.get(arm, {})
        return len(values) - len(first_seeds(values, self.looks.most))

    def _cost(self, few: Sequence[Answer]) -> str:
        """Say how many seeds a verdict on some arms is likely to take, and how long they would train."""
        spreads = [statistics.variance(found.values()) for found in self.values.values() if len(found) > 1]
        seeds, guess = FEW_SEEDS, ""
        if spreads:
            seeds = seeds_for(LARGE, math.sqrt(2), self.looks) or self.looks.most
            size = points(LARGE * math.sqrt(statistics.fmean(spreads)), "")
            guess = f", if the true difference is twice the standard deviation between seeds (here {size})"
        seconds, units = 0.0, dict(zip(self.values, _units(list(self.values.values())), strict=True))
        for arm in {name for each in few for name in (each.arm, each.other)}:
            took = [
                sum(run.history.get(EPOCH_SECONDS, {}).values()) or run.metrics.get(TRAIN_SECONDS, 0)
                for run in self.arms[arm]
            ]
            seconds += statistics.fmean(took) * max(0, seeds - len(units[arm]))
        return f"`seeds=auto` would take about {seeds} seeds of each, {duration(seconds)} more{guess}."


def hold(arms: Arms, parent: RunRecord) -> Held:
    """Hold the arms of a study against their references, by what its run was stamped with when it began."""
    runs = [run for of_arm in arms.values() for run in of_arm]
    what, looks = quantity(decisive_accuracy(runs)), looks_of(parent, runs)
    own = parent.params.get("study.baseline", "")
    baseline = own if own in arms else next(iter(arms))
    schedules = {arm: of_arm[0].params.get("schedule.name", "") for arm, of_arm in arms.items()}
    values = dict[str, Values]()
    for arm, of_arm in arms.items():
        oldest = sorted(of_arm, key=lambda run: run.started)
        values[arm] = {pair_of(run): value for run in oldest for value in what.values([run])}
    margin, paired = number(parent.params.get("study.margin", "0")), parent.params.get("study.paired") == "true"
    others, tests = {arm: reference(arm, baseline, schedules) if parent.run_id else "" for arm in arms}, 0
    if parent.params.get("study.looks") == RACE and all(values.values()):
        best, tests = leader(values), len(values) - 1
        others = {arm: "" if arm == best else best for arm in arms}
    overlap = overlap_of(list(arms.values()))
    held = answers(values, others, looks, margin=margin, paired=paired, overlap=overlap, tests=tests)
    return Held(arms, what, looks, margin, others, held, values, leads(held) if tests else "")
