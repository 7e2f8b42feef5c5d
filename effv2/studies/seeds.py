"""Automatic seeds: the number of seeds per arm, as a function of the accuracies of a study's finished trials.

There is no other state, so kills, several machines and resumption change nothing. The rounds are computed again from
the finished trials. Each round uses the trials that it used when it was first decided.
"""

import math
from collections import Counter
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

# User attributes of a finished trial: the accuracy for verdicts, its name, and whether the run is another study's.
ACCURACY, MEASURE, ELSEWHERE = "accuracy", "measure", "elsewhere"


@dataclass(frozen=True)
class Round:
    """The number of seeds per arm. Once all are finished: a sentence per arm, hours so far, and why the rounds end."""

    counts: Mapping[str, int]
    answers: Mapping[str, Answer] = field(default_factory=dict)
    hours: float = 0.0
    ending: str = ""
    leads: str = ""  # the state of a race
    complete: bool = True

    def lines(self) -> list[str]:
        """Describe the state of every arm, in one sentence each, and the time spent."""
        runs = f"{counted(sum(self.counts.values()), 'run')}, {duration(3600 * self.hours)} of runs so far"
        said = [answer.sentence() for answer in self.answers.values()]
        return [*filter(None, [self.leads]), *said, f"{runs}; {self.ending or 'undecided arms get more seeds'}"]


@dataclass(frozen=True)
class AutoSeeds:
    """The rule of a study. Of `arms`, the `wanted` ones get seeds, beginning with their own `random.seed`.

    `before` names the trials that were finished when this rule was first used. They count from the first round on, and
    so do trials of arms that aren't wanted. With `own_splits`, each seed has its own split of the images, whose test
    and other images have the ratio `overlap`. Arms are then compared split by split.
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
        """Return the trials of the given numbers of seeds per arm, seed by seed."""
        found: dict[str, Params] = {}
        for number in range(max(counts.values())):
            for arm in (arm for arm, count in counts.items() if number < count):
                seed = (self.arms[arm].random.seed + number) % 2**32
                name, params = named_trial(arm, seed, number if self.own_splits else None)
                found[name] = params
        return found

    def rounds(self, trials: Trials) -> list[Round]:
        """Return all rounds so far. The last one may be unfinished."""
        known = tuple(sorted(trial.number for trial in trials.values() if trial.state.is_finished()))
        if known not in self._known:
            self._known.clear()
            self._known[known] = self._rounds(trials)
        return self._known[known]

    def _rounds(self, trials: Trials) -> list[Round]:
        """Compute the rounds. If the difference of an arm from its reference is undecided, both get one more seed.

        No arm gets more than the maximum. An arm with a failed run gets none, and neither do arms compared with it.
        """
        finished = {name: trial for name, trial in trials.items() if trial.state.is_finished()}
        before = Counter(str(finished[name].params.get("arm")) for name in self.before if name in finished)
        counts = {arm: FEWEST if before[arm] < self.most else 0 for arm in self.wanted}
        found = list[Round]()
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
            there = Counter(trial.params.get("arm") for trial in used.values())
            after = {arm: count + (arm in growing and there[arm] < most) for arm, count in counts.items()}
            spent = [_hours(trial) for trial in used.values() if not trial.user_attrs.get(ELSEWHERE)]
            hours, more = sum(spent), sum(after.values()) - sum(counts.values())
            ending = ""
            if not more:
                limited = f"the last one: every undecided arm has {most} seeds{', or failed runs' * bool(failed)}"
                ending = limited if undecided else "the last one: all is decided"
            elif hours + more * hours / max(1, len(spent)) > self.budget:
                ending = "the last one: another would exceed the budget"
            found.append(Round(counts, said, hours, ending, leads(said) if self.race else ""))
            if ending:
                return found
            counts = after

    def _answers(self, used: Mapping[str, FrozenTrial]) -> tuple[dict[str, Answer], int]:
        """Return the answers of these trials about each arm, and the highest number of seeds of an arm."""
        noted = (trial for trial in used.values() if ACCURACY in trial.user_attrs)
        complete = sorted(noted, key=lambda trial: trial.number)
        # The plan only limits the study's own runs. Other runs existed before it.
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
