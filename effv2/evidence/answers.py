"""The arms of a study held against its baseline: the answer to "does this change help?", a sentence an arm."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from effv2.evidence.quantities import Quantity
from effv2.evidence.statistics import (
    EVERY_LOOK,
    Comparison,
    Estimate,
    Interval,
    Looks,
    Outcome,
    compare,
    seeds_to_decide,
)

SplitAndSeed = tuple[str, str]  # which split of the images a run used, and the seed of its training
Values = Mapping[SplitAndSeed, float]  # of the runs of an arm


def estimate(values: Sequence[Values], looks: Looks, paired: bool = False, overlap: float = 0.0) -> Estimate:
    """Return the mean of one arm, or of the first of two less the second.

    Within one split runs are independent: their seeds pair nothing, unless the study says that they do (`paired`).
    Over several splits the mean of an arm on a split counts once, and arms are compared on the splits that they share.
    """
    splits = {split for of_arm in values for split, _ in of_arm}
    if len(splits) == 1 and not paired:
        return Estimate(*(list(of_arm.values()) for of_arm in values), looks=looks)
    units = [_by_split(of_arm) if len(splits) > 1 else dict(of_arm) for of_arm in values]
    shared = [unit for unit in units[0] if all(unit in other for other in units)]
    differences = [units[0][unit] - sum(other[unit] for other in units[1:]) for unit in shared]
    return Estimate(differences or [float("nan")], overlap=overlap if len(splits) > 1 else 0.0, looks=looks)


def _by_split(values: Values) -> dict[SplitAndSeed, float]:
    """Return the mean of each split."""
    splits: dict[SplitAndSeed, list[float]] = {}
    for (split, _), value in values.items():
        splits.setdefault((split, ""), []).append(value)
    return {split: sum(each) / len(each) for split, each in splits.items()}


def reference(arm: str, baseline: str, schedules: Mapping[str, str]) -> str:
    """Return what an arm is compared with: the baseline under its own learning rate schedule, where there is one.

    So the two differ in one thing alone. `schedules` are the names of the arms' schedules; empty for the baseline.
    """
    own = f"{baseline}_{schedules[arm]}"
    return "" if arm == baseline else own if own in schedules and own != arm else baseline


@dataclass(frozen=True)
class Answer:
    """What runs say of an arm and the one that it is compared with."""

    arm: str
    other: str
    comparison: Comparison
    margin: float = 0.0

    @property
    def seeds(self) -> int:
        """Return the number of seeds of the arm that has fewer; over splits that of the splits."""
        return self.comparison.estimate.n

    def interval(self, what: Quantity) -> Interval:
        """Return the interval of the difference, as far as fractions can differ."""
        found = self.comparison.interval
        return found.within(Interval(-1, 1)) if what.is_accuracy else found

    def sentence(self, what: Quantity) -> str:
        """Say it in one sentence, with the difference, its interval and the number of seeds."""
        outcome, found = self.comparison.outcome, self.comparison.estimate
        seeds = "1 seed" if self.seeds == 1 else f"{self.seeds} seeds"
        if outcome is Outcome.FEW:
            return f"{self.arm} against {self.other}: {seeds}, no verdict below 3"
        low, high = self.interval(what)
        if outcome in (Outcome.BETTER, Outcome.WORSE):
            verb = "beats" if outcome is Outcome.BETTER else "is worse than"
            ends = sorted((abs(low), abs(high)))
            size = what.size(abs(found.mean))
            return f"{self.arm} {verb} {self.other} by {size} [{Interval(*ends).text(what.bare)}], {seeds}"
        shown = f"{what.difference(found.mean)} [{Interval(low, high).text(what.signed)}], {seeds}"
        if outcome is Outcome.EQUIVALENT:
            return f"{self.arm} and {self.other}: no difference above {what.size(self.margin)}, {shown}"
        return f"{self.arm} against {self.other}: undecided, {shown}"

    def outlook(self) -> str:
        """Say how many seeds would decide where they don't yet."""
        if self.comparison.outcome is not Outcome.OPEN:
            return ""
        return outlook(self.comparison.estimate, self.comparison.level)


def outlook(
    found: Estimate, level: float, edge: float = 0.0, unit: str = "seeds", nothing: str = "there is none"
) -> str:
    """Say how many seeds tell a mean, or a difference, from an edge."""
    most = found.looks.most
    if found.n >= most:
        return f"all {most} {unit} that count are there: it stays undecided"
    about, few, many = seeds_to_decide(found, edge, level)
    if about is None:
        return f"if the true difference is as seen, {most} {unit} decide in fewer than 80 % of studies"
    ends = f"{few or most} to {many or f'over {most}'}"
    return (
        f"if the true difference is as seen, {about} {unit} ({ends}) decide in 80 % of studies; if {nothing}, none "
        f"will; adding {unit} is allowed, the level accounts for it"
    )


def answers(
    values: Mapping[str, Values],
    others: Mapping[str, str],
    looks: Looks = EVERY_LOOK,
    *,
    margin: float = 0.0,
    paired: bool = False,
    overlap: float = 0.0,
) -> dict[str, Answer]:
    """Hold each arm against the one that `others` names; corrected for the number of arms (Holm).

    `values` are those of all arms with runs; an arm that lacks them, or whose other does, has no answer.
    """
    pairs = {arm: other for arm, other in others.items() if other and values.get(arm) and values.get(other)}
    estimates = {arm: estimate([values[arm], values[other]], looks, paired, overlap) for arm, other in pairs.items()}
    return {arm: Answer(arm, pairs[arm], each, margin) for arm, each in compare(estimates, margin).items()}
