"""`seeds=auto`: how many seeds each arm is to have, as a function of what the finished trials of a study reached.

No state is kept, so that kills, several machines and resumption change nothing: the rounds are gone through anew from
the finished trials, each with the trials that it rested on when it was first decided.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from effv2.config.schema import TrainConfig
from effv2.core.words import counted, duration
from effv2.evidence.answers import Answer, Values, answers, leads, reference, rivals
from effv2.evidence.protocols import SplitAndSeed
from effv2.evidence.statistics import EVERY_LOOK, FEWEST, Looks, Outcome
from effv2.studies.queue import Params, Trials

# User attributes of a finished trial: the accuracy that verdicts rest on, and whether another study's run reached it.
ACCURACY, ELSEWHERE = "accuracy", "elsewhere"


def next_seeds(
    counts: Mapping[str, int],
    values: Mapping[str, Values],
    others: Mapping[str, str],
    looks: Looks,
    *,
    most: int,
    margin: float = 0.0,
    paired: bool = False,
    failed: Collection[str] = (),
    race: bool = False,
) -> tuple[dict[str, int], dict[str, Answer]]:
    """Return how many seeds arms are to have next, and what is said of each now; equal counts: nothing more is wanted.

    An arm whose difference from its other is open gets one more, and so does the other; no arm gets more than `most`.
    An arm that `failed` gets none, nor does one that is compared with it.
    """
    found = answers(values, others, looks, margin=margin, paired=paired, race=race)
    left = [each for each in found.values() if each.outcome is Outcome.OPEN]
    left = [each for each in left if each.arm in counts and not {each.arm, each.other} & set(failed)]
    growing = {arm for each in left for arm in (each.arm, each.other)}
    return {arm: count + (arm in growing and count < most) for arm, count in counts.items()}, found


@dataclass(frozen=True)
class Round:
    """So many seeds of each arm; once all are finished, what is said of each arm, hours so far, and why it ends."""

    counts: Mapping[str, int]
    answers: Mapping[str, Answer] = field(default_factory=dict)
    hours: float = 0.0
    ending: str = ""
    leads: str = ""  # how far a race is
    complete: bool = True

    def lines(self) -> list[str]:
        """Say how every arm is doing, a sentence each, and what was spent."""
        runs = f"{counted(sum(self.counts.values()), 'run')}, {duration(3600 * self.hours)} of runs so far"
        said = [answer.sentence() for answer in self.answers.values()]
        return [*filter(None, [self.leads]), *said, f"{runs}; {self.ending or 'more seeds for what is undecided'}"]


@dataclass(frozen=True)
class AutoSeeds:
    """The rule of a study: `arms` by name, of which the `wanted` ones get seeds, their own `random.seed` the first.

    `before` names the trials that were finished when this was first asked for: they count from the first round on, as
    those of arms that aren't wanted do.
    """

    arms: Mapping[str, TrainConfig]
    wanted: tuple[str, ...]
    baseline: str
    most: int = EVERY_LOOK.most
    margin: float = 0.0
    budget: float = math.inf  # hours
    paired: bool = False
    race: bool = False  # against the best arm, not the baseline
    before: tuple[str, ...] = ()
    _known: dict[tuple[int, ...], list[Round]] = field(default_factory=dict, compare=False, repr=False)

    def trials(self, counts: Mapping[str, int]) -> dict[str, Params]:
        """Return the trials of so many seeds of each arm, seed by seed."""
        found: dict[str, Params] = {}
        for number in range(max(counts.values())):
            for arm in (arm for arm, count in counts.items() if number < count):
                seed = (self.arms[arm].random.seed + number) % 2**32
                found[f"{arm}, seed {seed}"] = {"arm": arm, "seed": seed}
        return found

    def rounds(self, trials: Trials) -> list[Round]:
        """Return all rounds so far, the last of which may be under way."""
        known = tuple(sorted(trial.number for trial in trials.values() if trial.state.is_finished()))
        if known not in self._known:
            self._known.clear()
            self._known[known] = self._rounds(trials)
        return self._known[known]

    def _rounds(self, trials: Trials) -> list[Round]:
        finished = {name: trial for name, trial in trials.items() if trial.state.is_finished()}
        counts, found = dict.fromkeys(self.wanted, FEWEST), list[Round]()
        while True:
            names = self.trials(counts)
            if not names.keys() <= finished.keys():
                return [*found, Round(counts, complete=False)]
            others = (name for name, trial in finished.items() if trial.params.get("arm") not in counts)
            used = {name: finished[name] for name in dict.fromkeys([*names, *self.before, *others]) if name in finished}
            failed = {str(names[name]["arm"]) for name in names if finished[name].state == TrialState.FAIL}
            after, said, most = self._decide(counts, used, failed)
            spent = [_hours(trial) for trial in used.values() if not trial.user_attrs.get(ELSEWHERE)]
            hours, more = sum(spent), sum(after.values()) - sum(counts.values())
            ending = ""
            if not more:
                stuck = [each for each in said.values() if each.outcome is Outcome.OPEN]
                ending = f"the end, at {most} seeds of an arm or failed runs" if stuck else "the end: all is decided"
            elif hours + more * hours / max(1, len(spent)) > self.budget:
                ending = "the end: another round would pass the budget"
            found.append(Round(counts, said, hours, ending, leads(said) if self.race else ""))
            if ending:
                return found
            counts = after

    def _decide(
        self, counts: dict[str, int], used: Mapping[str, FrozenTrial], failed: Collection[str]
    ) -> tuple[dict[str, int], dict[str, Answer], int]:
        """Return what `next_seeds` does, of these trials, and the most seeds of an arm."""
        noted = (trial for trial in used.values() if ACCURACY in trial.user_attrs)
        complete = sorted(noted, key=lambda trial: trial.number)
        # What was planned counts for the study's own runs alone: others were there before it.
        own = not any(trial.user_attrs.get(ELSEWHERE) for trial in complete)
        looks = Looks(self.most) if own else EVERY_LOOK
        values: dict[str, dict[SplitAndSeed, float]] = {}
        for trial in complete:
            values.setdefault(trial.params["arm"], {})["", str(trial.params["seed"])] = trial.user_attrs[ACCURACY]
        schedules = {arm: self.arms[arm].schedule.name for arm in self.arms if arm in values}
        race = self.race and bool(values)
        others = rivals(values) if race else {arm: reference(arm, self.baseline, schedules) for arm in schedules}
        most = min(self.most, looks.most)
        how: dict[str, Any] = {"margin": self.margin, "paired": self.paired, "failed": failed, "race": race}
        after, said = next_seeds(counts, values, others, looks, most=most, **how)
        return after, said, most


def _hours(trial: FrozenTrial) -> float:
    return trial.duration.total_seconds() / 3600 if trial.duration is not None else 0.0
