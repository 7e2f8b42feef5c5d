"""`seeds=auto`: how many seeds each arm is to have, as a function of what the finished trials of a study reached.

No state is kept, so that kills, several machines and resumption change nothing: the rounds are gone through anew from
the finished trials, each with the trials that it rested on when it was first decided.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from effv2.config.schema import TrainConfig
from effv2.core.words import counted, duration
from effv2.evidence.answers import Answer, answers, leads, opponents
from effv2.evidence.protocols import SplitAndSeed
from effv2.evidence.statistics import EVERY_LOOK, FEWEST, Looks, Outcome
from effv2.studies.queue import Params, Trials

# User attributes of a finished trial: the accuracy that verdicts rest on, and whether another study's run reached it.
ACCURACY, ELSEWHERE = "accuracy", "elsewhere"


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
    those of arms that aren't wanted do. On `own_splits` each seed has a split of the images of its own, whose test
    and other images have the ratio `overlap`: arms are then compared split by split.
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
    own_splits: bool = False
    overlap: float = 0.0
    _known: dict[tuple[int, ...], list[Round]] = field(default_factory=dict, compare=False, repr=False)

    def trials(self, counts: Mapping[str, int]) -> dict[str, Params]:
        """Return the trials of so many seeds of each arm, seed by seed."""
        found: dict[str, Params] = {}
        for number in range(max(counts.values())):
            for arm in (arm for arm, count in counts.items() if number < count):
                seed = (self.arms[arm].random.seed + number) % 2**32
                name, params = named_trial(arm, seed, number if self.own_splits else None)
                found[name] = params
        return found

    def rounds(self, trials: Trials) -> list[Round]:
        """Return all rounds so far, the last of which may be under way."""
        known = tuple(sorted(trial.number for trial in trials.values() if trial.state.is_finished()))
        if known not in self._known:
            self._known.clear()
            self._known[known] = self._rounds(trials)
        return self._known[known]

    def _rounds(self, trials: Trials) -> list[Round]:
        """Return the rounds anew. An arm whose difference from its other is open gets one more, and so does the other.

        No arm gets more than there may be. One of which a run failed gets none, nor does one that is compared with it.
        """
        finished = {name: trial for name, trial in trials.items() if trial.state.is_finished()}
        counts, found = dict.fromkeys(self.wanted, FEWEST), list[Round]()
        while True:
            names = self.trials(counts)
            if not names.keys() <= finished.keys():
                return [*found, Round(counts, complete=False)]
            others = (name for name, trial in finished.items() if trial.params.get("arm") not in counts)
            used = {name: finished[name] for name in dict.fromkeys([*names, *self.before, *others]) if name in finished}
            failed = {names[name]["arm"] for name in names if finished[name].state == TrialState.FAIL}
            said, most = self._answers(used)
            undecided = [each for each in said.values() if each.outcome is Outcome.OPEN]
            left = [each for each in undecided if each.arm in counts and not {each.arm, each.other} & failed]
            growing = {arm for each in left for arm in (each.arm, each.other)}
            after = {arm: count + (arm in growing and count < most) for arm, count in counts.items()}
            spent = [_hours(trial) for trial in used.values() if not trial.user_attrs.get(ELSEWHERE)]
            hours, more = sum(spent), sum(after.values()) - sum(counts.values())
            ending = ""
            if not more:
                ending = (
                    f"the end, at {most} seeds of an arm or failed runs" if undecided else "the end: all is decided"
                )
            elif hours + more * hours / max(1, len(spent)) > self.budget:
                ending = "the end: another round would pass the budget"
            found.append(Round(counts, said, hours, ending, leads(said) if self.race else ""))
            if ending:
                return found
            counts = after

    def _answers(self, used: Mapping[str, FrozenTrial]) -> tuple[dict[str, Answer], int]:
        """Return what these trials say of each arm, and the most seeds of an arm."""
        noted = (trial for trial in used.values() if ACCURACY in trial.user_attrs)
        complete = sorted(noted, key=lambda trial: trial.number)
        # What was planned counts for the study's own runs alone: others were there before it.
        own = not any(trial.user_attrs.get(ELSEWHERE) for trial in complete)
        looks = Looks(self.most) if own else EVERY_LOOK
        values: dict[str, dict[SplitAndSeed, float]] = {}
        for trial in complete:
            pair = str(trial.params.get("split", "")), str(trial.params["seed"])
            values.setdefault(trial.params["arm"], {})[pair] = trial.user_attrs[ACCURACY]
        schedules = {arm: self.arms[arm].schedule.name for arm in self.arms if arm in values}
        others = opponents(values, self.baseline, schedules, self.race)
        rules: dict[str, Any] = {"margin": self.margin, "paired": self.paired, "overlap": self.overlap}
        return answers(values, others, looks, race=self.race, **rules), min(self.most, looks.most)


def named_trial(arm: str, seed: int, split: int | None) -> tuple[str, Params]:
    """Return the name and the parameters of a trial; `split` is None where there is but one."""
    if split is None:
        return f"{arm}, seed {seed}", {"arm": arm, "seed": seed}
    return f"{arm}, split {split}, seed {seed}", {"arm": arm, "seed": seed, "split": split}


def _hours(trial: FrozenTrial) -> float:
    return trial.duration.total_seconds() / 3600 if trial.duration is not None else 0.0
