"""The arms of a study, each held against its reference: what is said of them, in words, cells and a figure."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from effv2.evidence.answers import Answer, SplitAndSeed, answers, reference
from effv2.evidence.protocols import counted, looks_of, overlap_of, pair_of
from effv2.evidence.quantities import EPOCH_SECONDS, TRAIN_SECONDS, Quantity, duration, number, quantity
from effv2.evidence.statistics import Looks, Outcome, seeds_for
from effv2.tracking.read import RunRecord, decisive_accuracy

NOTHING_YET, NONE = "No accuracies yet.", "none"  # in a cell: the runs lack the figure
FEW_SEEDS, LARGE = 6, 2.0  # what is guessed where there are no verdicts yet: seeds, and a difference in deviations
Arms = Mapping[str, Sequence[RunRecord]]


@dataclass(frozen=True)
class Held:
    """Arms held against their references, by the accuracy that decides."""

    arms: Arms
    what: Quantity
    looks: Looks
    margin: float
    others: Mapping[str, str]  # the reference of each arm; empty for the baseline
    answers: Mapping[str, Answer]
    there: Mapping[str, int]  # how many seeds, or splits, of an arm count
    beyond: Mapping[str, int]  # how many runs of an arm don't count, since the plan had fewer

    def short(self) -> dict[str, str]:
        """Return a sentence an arm but for the baseline; of a single arm how well it does."""
        found = {arm: self._sentence(arm, other) for arm, other in self.others.items() if other}
        if not found and (values := self.what.values(run for runs in self.arms.values() for run in runs)):
            arm, mean = next(iter(self.arms)), self.what.text(statistics.fmean(values))
            found[arm] = f"{arm}: {mean} {self.what.words}, {counted(len(values), 'run')}, nothing to compare it with"
        return found

    def sentences(self) -> list[str]:
        """Return the sentences with what would decide those that are undecided."""
        ends = {arm: each.outlook() for arm, each in self.answers.items() if not self._early(arm)}
        found = [f"{'; '.join(filter(None, (text, ends.get(arm))))}." for arm, text in self.short().items()]
        few = [arm for arm in self.answers if self._few(arm) and not self.looks.once]
        return [*found, *([self._cost(few)] if few else [])] or [NOTHING_YET]

    def cell(self, arm: str) -> str:
        """Return the difference of an arm and its interval, where there are runs enough for one."""
        if not (answer := self.answers.get(arm)):
            return "" if not self.others[arm] else NONE
        mean = self.what.signed(answer.comparison.estimate.mean)
        return mean if self._few(arm) else f"{mean} [{answer.interval(self.what).text(self.what.signed)}]"

    def drawn(self) -> dict[str, tuple[float, float, float, bool]]:
        """Return mean, ends and whether it is decided of each difference, in percentage points where it is one."""
        found, scale = {}, 100 if self.what.is_accuracy else 1
        for arm, answer in self.answers.items():
            comparison = answer.comparison
            low, high = (math.nan, math.nan) if self._few(arm) else answer.interval(self.what)
            decided = not self._few(arm) and comparison.outcome is not Outcome.OPEN
            found[arm] = (scale * comparison.estimate.mean, scale * low, scale * high, decided)
        return found

    def _early(self, arm: str) -> bool:
        """Say whether a single look was planned, and isn't due."""
        return self.looks.once and min(self.there[arm], self.there[self.others[arm]]) < self.looks.most

    def _few(self, arm: str) -> bool:
        return self._early(arm) or self.answers[arm].comparison.outcome is Outcome.FEW

    def _sentence(self, arm: str, other: str) -> str:
        if arm not in self.answers:
            return f"{arm} against {other}: nothing to compare, a figure is missing"
        if not self._early(arm):
            return self.answers[arm].sentence(self.what)
        there = min(self.there[arm], self.there[other])
        return f"{arm} against {other}: {self.looks.most} seeds planned, {there} there, no verdict before all are"

    def _cost(self, few: Sequence[str]) -> str:
        """Say how many seeds a verdict on some arms is likely to take, and how long they would train."""
        spreads = [
            statistics.variance(found) for runs in self.arms.values() if len(found := self.what.values(runs)) > 1
        ]
        seeds, guess = FEW_SEEDS, ""
        if spreads:
            seeds = seeds_for(LARGE, math.sqrt(2), self.looks) or self.looks.most
            size = self.what.size(LARGE * math.sqrt(statistics.fmean(spreads)))
            guess = f", if the true difference is twice the standard deviation between seeds (here {size})"
        seconds = 0.0
        for arm in {*few, *(self.others[arm] for arm in few)}:
            curves = [sum(run.history.get(EPOCH_SECONDS, {}).values()) for run in self.arms[arm]]
            took = [
                curve or run.metrics.get(TRAIN_SECONDS, 0) for run, curve in zip(self.arms[arm], curves, strict=True)
            ]
            seconds += statistics.fmean(took) * max(0, seeds - self.there[arm])
        return f"`seeds=auto` would take about {seeds} seeds of each, {duration(seconds)} more{guess}."


def hold(arms: Arms, parent: RunRecord) -> Held:
    """Hold the arms of a study against their references, by what its run was stamped with when it began."""
    runs = [run for of_arm in arms.values() for run in of_arm]
    what, looks = quantity(decisive_accuracy(runs)), looks_of(parent, runs)
    margin = number(parent.params.get("study.margin", "0"))
    own = parent.params.get("study.baseline", "")
    baseline = own if own in arms else next(iter(arms))
    schedules = {arm: of_arm[0].params.get("schedule.name", "") for arm, of_arm in arms.items()}
    others = {arm: reference(arm, baseline, schedules) if parent.run_id else "" for arm in arms}
    several = len({pair_of(run)[0] for run in runs}) > 1
    values, there, beyond = dict[str, dict[SplitAndSeed, float]](), dict[str, int](), dict[str, int]()
    for arm, of_arm in arms.items():
        oldest = sorted(of_arm, key=lambda run: run.started)
        found = {pair_of(run): value for run in oldest for value in what.values([run])}
        units = list(dict.fromkeys(pair[0] if several else pair for pair in found))[: looks.most]
        values[arm] = {pair: value for pair, value in found.items() if (pair[0] if several else pair) in units}
        there[arm], beyond[arm] = len(units), len(found) - len(values[arm])
    paired = parent.params.get("study.paired") == "true"
    held = answers(values, others, looks, margin=margin, paired=paired, overlap=overlap_of(list(arms.values())))
    return Held(arms, what, looks, margin, others, held, there, beyond)
