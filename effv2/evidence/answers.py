"""The arms of a study compared with its baseline: the answers to "does this change help?", in words and cells."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import pandas as pd

from effv2.config.options import RACE
from effv2.config.studies import PLATEAU
from effv2.core.errors import joined
from effv2.core.words import counted, number, points
from effv2.evidence.protocols import SplitAndSeed, looks_of, overlap_of, pair_of, that_count
from effv2.evidence.quantities import Quantity, quantity
from effv2.evidence.statistics import EVERY_LOOK, FEWEST, Estimate, Interval, Looks, Outcome, compare
from effv2.tracking.read import RunRecord, decisive_accuracy

NOTHING_YET, NONE = "No accuracies yet.", "none"  # in a cell: the runs don't have the figure
signed = partial(points, unit="")  # writes a difference of accuracies without its unit, percentage points
Arms = Mapping[str, Sequence[RunRecord]]
Values = Mapping[SplitAndSeed, float]  # of the runs of an arm


def estimate(values: Sequence[Values], looks: Looks, paired: bool = False, overlap: float = 0.0) -> Estimate:
    """Return the mean of one arm, or of the first of two minus the second.

    Within one split, runs are independent: equal seeds form no pairs, unless the study is `paired`. Over several
    splits, the mean of an arm on a split counts once, and arms are compared on their common splits.
    """
    several = len({split for of_arm in values for split, _ in of_arm}) > 1
    if not several and not paired:
        return Estimate(*(list(of_arm.values()) for of_arm in values), looks=looks)
    by_pair = map(pd.Series, values)
    first, *other = (each.groupby(level=0).mean() for each in by_pair) if several else by_pair
    common = first.index.intersection(other[0].index) if other else first.index
    differences = (first[common] - other[0][common] if other else first).tolist()
    return Estimate(differences or [math.nan], overlap=overlap if several else 0.0, looks=looks)


def outlook(found: Estimate, level: float, edge: float = 0.0, unit: str = "seeds", nothing: str = "") -> str:
    """Estimate how many seeds distinguish a mean, or a difference, from an edge. If `nothing` is true, none do."""
    most = found.n if found.looks.once else found.looks.most  # no more are planned
    if found.n >= most:
        return f"the maximum of {most} {unit} is reached, so it remains undecided"
    about, few, many = found.seeds_to_decide(edge, level)
    if about is None:
        return f"if the truth is as seen, even {most} {unit} decide in fewer than 80 % of studies"
    about, few = max(about, found.n + 1), max(few or most, found.n + 1)
    ends = f"{few} to {max(many, few) if many else f'over {most}'}"
    rest = f"; no number is enough if {nothing}" if nothing else ""
    return f"if the truth is as seen, {about} {unit} (80 % interval {ends}) are enough in 80 % of studies{rest}"


@dataclass(frozen=True)
class Answer:
    """The comparison of an arm with its reference, by an accuracy."""

    arm: str
    other: str
    outcome: Outcome
    estimate: Estimate  # of the difference
    level: float  # of the test
    margin: float = 0.0
    waits: str = ""  # why there is no verdict yet
    unit: str = "seed"  # what the estimate counts: seeds or splits

    @property
    def interval(self) -> Interval:
        """Return the interval that agrees with the outcome: it excludes 0, is within the margin, or neither."""
        level = 2 * self.level if self.outcome is Outcome.EQUIVALENT else self.level
        return self.estimate.interval(level).within(Interval(-1, 1))

    def sentence(self) -> str:
        """Return the answer in one sentence, with the difference, its interval and the number of seeds or splits."""
        mean, seeds = self.estimate.mean, f"{self.estimate.n} {self.unit}s"
        if self.waits:
            return f"{self.arm} against {self.other}: {self.waits}"
        if self.outcome in (Outcome.BETTER, Outcome.WORSE):
            verb = "beats" if self.outcome is Outcome.BETTER else "is worse than"
            ends = Interval(*sorted(map(abs, self.interval))).text(lambda end: points(end, "", ""))
            return f"{self.arm} {verb} {self.other} by {points(abs(mean), '')} [{ends}], {seeds}"
        shown = f"{points(mean)} [{self.interval.text(signed)}], {seeds}"
        if self.outcome is Outcome.EQUIVALENT:
            return f"{self.arm} and {self.other}: no difference above {points(self.margin, '')}, {shown}"
        return f"{self.arm} against {self.other}: undecided, {shown}"

    def outlook(self) -> str:
        """Estimate how many seeds would decide an undecided difference."""
        return outlook(self.estimate, self.level, unit=f"{self.unit}s") if self.outcome is Outcome.OPEN else ""

    def drawn(self) -> tuple[float, float, float, bool]:
        """Return mean and ends in percentage points (ends NaN if it waits), and whether it is decided."""
        low, high = (math.nan, math.nan) if self.waits else self.interval
        decided = self.outcome not in (Outcome.OPEN, Outcome.FEW)
        return 100 * self.estimate.mean, 100 * low, 100 * high, decided


def opponents(values: Mapping[str, Values], baseline: str, schedules: Mapping[str, str], race: bool) -> dict[str, str]:
    """Return what each arm is compared with; empty for the one that others are compared with.

    In a race, this is the arm with the best mean. It may be any of them, so each test counts as many times as there are
    others. Then the best arm is called worse in at most 5 % of races. Otherwise, it is the baseline with the arm's own
    learning rate schedule, if there is one. So the two differ in only one setting. `schedules` names the schedules.
    """
    if race:
        baseline = max(values, key=lambda arm: statistics.fmean(values[arm].values()), default="")
    others = dict.fromkeys(schedules, baseline) | {baseline: ""}
    for arm, schedule in schedules.items():
        own = f"{baseline}_{schedule}"
        if own in schedules and not race and arm not in (own, baseline):
            others[arm] = own
    return others


def leads(held: Mapping[str, Answer]) -> str:
    """Name the arms of a race that are, or may be, the best; empty if there are no others."""
    if not held:
        return ""
    best = next(each.other for each in held.values())
    left = {arm: each.outcome for arm, each in held.items() if each.outcome is not Outcome.WORSE}
    if not left:
        return f"{best} is the best of {len(held) + 1}."
    alike = set(left.values()) == {Outcome.EQUIVALENT}
    words = "equal to it within the margin" if alike else "may be better"
    return f"{best} leads; {words}: {', '.join(left)}."


def answers(
    values: Mapping[str, Values],
    others: Mapping[str, str],
    looks: Looks = EVERY_LOOK,
    *,
    margin: float = 0.0,
    paired: bool = False,
    overlap: float = 0.0,
    race: bool = False,
) -> dict[str, Answer]:
    """Compare each arm with its reference in `others`, corrected for the number of arms (Holm, or as in a race).

    `values` are those of all arms with runs. The first seeds count. An arm without values, or with a reference
    without values, has no answer.
    """
    pairs = {arm: other for arm, other in others.items() if other and values.get(arm) and values.get(other)}
    both = {arm: [that_count(values[each], looks) for each in (arm, other)] for arm, other in pairs.items()}
    estimates = {arm: estimate(each, looks, paired, overlap) for arm, each in both.items()}
    found = {}
    for arm, (outcome, level) in compare(estimates, margin, len(others) - 1 if race else 0).items():
        unit = "split" if len({split for split, _ in both[arm][0]}) > 1 else "seed"
        few = f"{counted(estimates[arm].n, unit)}, but a verdict needs {FEWEST}" if outcome is Outcome.FEW else ""
        waits = looks.waits(min(map(len, both[arm]))) or few
        said = Outcome.FEW if waits else outcome
        found[arm] = Answer(arm, pairs[arm], said, estimates[arm], level, margin, waits, unit)
    return found


@dataclass(frozen=True)
class Held:
    """Arms compared with their references, by the accuracy that decides."""

    arms: Arms
    what: Quantity
    looks: Looks
    margin: float
    others: Mapping[str, str]  # the reference of each arm; empty for the baseline
    answers: Mapping[str, Answer]
    values: Mapping[str, Values]  # the oldest first
    leads: str = ""  # the state of a race

    @property
    def against(self) -> str:
        """Return the common reference of all arms; empty if they have several, or none."""
        others = set(self.others.values()) - {""}
        return others.pop() if len(others) == 1 else ""

    def sentences(self, short: bool = False) -> list[str]:
        """Return the answers: one sentence per arm, and one for all arms that wait for a verdict.

        The short form has one for all undecided arms, and does not estimate what would decide them.
        """
        apart, together = list[str](), dict[tuple[str, str], list[str]]()
        for arm, other in ((arm, other) for arm, other in self.others.items() if other):
            answer = self.answers.get(arm)
            why = answer.waits if answer else "nothing to compare, because a figure is missing"
            if answer and short and answer.outcome is Outcome.OPEN:
                why = f"undecided, {answer.estimate.n} {answer.unit}s"
            if answer and not why:
                apart.append("; ".join(filter(None, (answer.sentence(), "" if short else answer.outlook()))))
            else:
                together.setdefault((other, why), []).append(arm)
        found = [*apart, *(f"{joined(arms)} against {other}: {why}" for (other, why), arms in together.items())]
        if not found and (values := self.what.values(run for runs in self.arms.values() for run in runs)):
            arm, mean = next(iter(self.arms)), self.what.text(statistics.fmean(values))
            found = [f"{arm}: {mean} {self.what.words}, {counted(len(values), 'run')}, and nothing to compare it with"]
        lines = [*filter(None, [self.leads]), *(f"{each}." for each in found)]
        more, open_ = [], [each for each in self.answers.values() if each.outcome is Outcome.OPEN]
        if any(each.waits for each in self.answers.values()):
            more = ["With `seeds` auto, seeds are added until this is decided. `plan` estimates what that costs."]
        if any(each.estimate.n < self.looks.most for each in open_):
            valid = f"The test stays valid if you add {open_[0].unit}s."
            more.append(f"{valid} To show that there is no difference, give a `margin`.")
        return [*lines, *([] if short or self.looks.once else more)] or [NOTHING_YET]

    def cell(self, arm: str) -> str:
        """Return the difference of an arm and, with enough runs, its interval; empty for the baseline."""
        if (answer := self.answers.get(arm)) is None:
            return NONE if self.others[arm] else ""
        interval = "" if answer.waits else f" [{answer.interval.text(signed)}]"
        return f"{signed(answer.estimate.mean)}{interval}"


def hold(arms: Arms, parent: RunRecord) -> Held:
    """Compare the arms of a study with their references, by the rules that its run recorded when it began."""
    runs, stamps = [run for of_arm in arms.values() for run in of_arm], parent.params
    what, looks = quantity(decisive_accuracy(runs)), looks_of(parent, runs)
    values = dict[str, Values]()
    for arm, of_arm in arms.items():
        oldest = sorted(of_arm, key=lambda run: run.started)
        # Within a study, the seed of a split names it, also for arms with other images.
        values[arm] = {pair_of(run, other_images=True): value for run in oldest for value in what.values([run])}
    own = stamps.get("study.baseline", "")
    baseline = next((each for each in (own, own + PLATEAU) if each in arms), own or next(iter(arms)))
    schedules = {arm: of_arm[0].params.get("schedule.name", "") for arm, of_arm in arms.items()}
    race = stamps.get("study.looks") == RACE and all(values.values())
    others = opponents(values, baseline, schedules, race) if parent.run_id else dict.fromkeys(arms, "")
    margin, paired = number(stamps.get("study.margin", "0")), stamps.get("study.paired") == "true"
    overlap = overlap_of(list(arms.values()), what.name)
    held = answers(values, others, looks, margin=margin, paired=paired, overlap=overlap, race=race)
    return Held(arms, what, looks, margin, others, held, values, leads(held) if race else "")
