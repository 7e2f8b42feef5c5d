"""Certainty of differences: tests and intervals that hold at every look, corrected for many; on SciPy."""

import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from enum import Enum
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import special, stats
from scipy.stats import binomtest

CONFIDENCE = 0.95
LEVEL = 0.05  # of every test, two-sided
POWER = 0.8  # probability with which more runs should decide
FEWEST = 3  # runs that a verdict needs
TINY = 1e-12  # differences below this are rounding
MOST_LOOKS = 50  # largest number of seeds in the table of levels
LEVELS = Path(__file__).with_name("levels.csv")  # made by benchmarks/levels.py


class Interval(NamedTuple):
    """The values between two ends, such as a confidence interval."""

    low: float
    high: float

    def within(self, other: "Interval") -> "Interval":
        """Return its part within another, such as the range of a quantity; itself if there is none."""
        low, high = max(self.low, other.low), min(self.high, other.high)
        return Interval(low, high) if low <= high else self

    def text(self, write: Callable[[float], str]) -> str:
        """Write both ends."""
        return f"{write(self.low)} to {write(self.high)}"


class Looks(NamedTuple):
    """How often a comparison is looked at: after every run, up to `most` seeds per arm, or once with all runs.

    If it is looked at after every run, only one seed per split counts. Further seeds on a split aren't a new sample of
    splits, so the levels don't cover them.
    """

    most: int = 30
    once: bool = False
    splits: int = 1  # on each of which all seeds are then planned

    def overall(self, p: float, samples: int) -> float:
        """Return the probability, without an effect, of so small a p-value at any look (Student's or Welch's)."""
        return p if self.once else _interpolate(p, *reversed(_levels(samples, self.most)))

    def nominal(self, alpha: float, samples: int) -> float:
        """Return the level of a single look that gives a share `alpha` of errors over all looks."""
        return alpha if self.once else _interpolate(alpha, *_levels(samples, self.most))

    def waits(self, there: int) -> str:
        """Explain why this number of runs per arm allows no verdict yet; empty if it may allow one."""
        planned = self.most * self.splits
        early = self.once and there < planned
        return f"{there} of {planned} planned runs, and a verdict needs all" if early else ""

    @property
    def most_splits(self) -> int:
        """Return the most splits that count."""
        return self.splits if self.once else self.most

    def counted(self, splits: int) -> str:
        """Describe how many runs of an arm count."""
        return "one seed per split" if splits > 1 and not self.once else f"{self.most} seeds of an arm"

    def text(self) -> str:
        """Return this in words."""
        return f"one look, at {self.most} seeds" if self.once else f"every look up to {self.most} seeds"


EVERY_LOOK = Looks()  # unless another rule was fixed in advance


@cache
def _levels(samples: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return logarithms of levels, overall and of a single look, for the next number of seeds of the table."""
    row = pd.read_csv(LEVELS, index_col=["kind", "most"]).loc[samples].loc[most:].iloc[0]
    return np.log(row.index.to_numpy(float)), np.log(row.to_numpy())


def _interpolate(p: float, xs: np.ndarray, ys: np.ndarray) -> float:
    """Interpolate between points in rising order, on logarithms. Extrapolate below the first two points."""
    x = np.log(max(p, 1e-300))
    below = ys[0] + (x - xs[0]) * (ys[1] - ys[0]) / (xs[1] - xs[0])
    return float(np.exp(below if x < xs[0] else np.interp(x, xs, ys)))


def wilson(right: int, count: int) -> Interval:
    """Return Wilson's 95 % interval of a proportion (Wilson 1927), without continuity correction."""
    found = binomtest(right, count).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(float(found.low), float(found.high))


def right_on_shared(answers: Collection[Mapping[str, bool]]) -> np.ndarray:
    """Return which images networks got right, bool (networks, images), for the images that all of them have."""
    shared = sorted(set.intersection(*map(set, answers)))
    return np.array([[each[image] for image in shared] for each in answers], bool)


def mcnemar(first: np.ndarray, second: np.ndarray) -> tuple[int, int, float]:
    """Return on how many images only the first, and only the second network is right (bool (N) each), and McNemar's p.

    Exact and two-sided (McNemar 1947). If both are right equally often, a fair coin decides which one is right there.
    """
    alone = int((first & ~second).sum()), int((second & ~first).sum())
    return *alone, float(binomtest(alone[0], sum(alone)).pvalue) if any(alone) else 1.0


def holm(p_values: Sequence[float], weights: Sequence[float] = ()) -> list[tuple[float, float]]:
    """Correct p-values for their number (Holm 1979), heavier ones less; return each with the level of its own test.

    That is the level of its step, or of the one at which Holm's procedure stopped.
    """
    p, w = np.asarray(p_values, dtype=float), np.asarray(weights or [1.0] * len(p_values))
    order = np.argsort(p / w, kind="stable")
    steps = (p / w)[order]
    left = np.cumsum(w[order][::-1])[::-1]  # of the weights, at each step
    corrected = np.minimum(np.maximum.accumulate(steps * left), 1)
    step = np.minimum(np.searchsorted(steps, steps), np.sum(corrected < LEVEL))  # equal p-values share the first level
    found = np.column_stack([corrected, LEVEL * w[order] / left[step]])[np.argsort(order)]
    return list(map(tuple, found.tolist()))


class Estimate:
    """The mean of one sample, or of the first of two minus the second (Welch 1947), and its certainty.

    A sample is independent values of one quantity, one per run or pair of runs. Intervals are Student's. Intervals and
    p-values hold at all `looks`. `overlap` is the ratio of test to training images if the values come from repeated
    splits of one set, whose parts overlap. It widens the error (Nadeau & Bengio 2003). It is 0 for independent values.
    """

    def __init__(self, *samples: Sequence[float], overlap: float = 0.0, looks: Looks = EVERY_LOOK) -> None:
        self.samples, self.overlap, self.looks = samples, overlap, looks
        counts = list(map(len, samples))
        means = [float(np.mean(each)) for each in samples]
        deviations = [float(np.std(each, ddof=1)) if len(each) > 1 else math.nan for each in samples]
        errors = [deviation * math.sqrt(1 / n + overlap) for deviation, n in zip(deviations, counts, strict=True)]
        self.n = min(counts)
        self.mean = means[0] - sum(means[1:])
        self.deviation = math.hypot(*deviations)  # of one more value, or of one more difference; NaN for one value
        self.error = math.hypot(*errors)  # of the mean; NaN for one value
        self.degrees = float(sum(counts) - len(counts))  # of freedom
        if len(samples) > 1 and self.error > 0:
            self.degrees = self.error**4 / sum(each**4 / (n - 1) for each, n in zip(errors, counts, strict=True))

    def interval(self, level: float = LEVEL) -> Interval:
        """Return the interval of the mean, which misses it at any look in a share `level`; NaN for one value.

        It agrees with `p`: it has no ends if the values are equal and too few for the sign test.
        """
        if self.error < TINY and self.p(math.inf) >= level:
            return Interval(-math.inf, math.inf)
        nominal = self.looks.nominal(level, len(self.samples))
        reach = float(-special.stdtrit(self.degrees, nominal / 2) * self.error)
        return Interval(self.mean - reach, self.mean + reach)

    def p(self, edge: float) -> float:
        """Return the two-sided p-value, over all looks, of the mean being `edge`, for two values or more.

        Equal values don't show how much they vary: for them it is the p-value of the sign test.
        """
        if self.error < TINY:
            nominal = 1.0 if abs(self.mean - edge) < TINY else min(1.0, 2 * 0.5**self.n)
        else:
            nominal = float(2 * special.stdtr(self.degrees, -abs(self.mean - edge) / self.error))
        return self.looks.overall(nominal, len(self.samples))

    def p_within(self, low: float, high: float) -> float:
        """Return the p-value of a mean outside of two edges, from one test of each (TOST, Schuirmann 1987)."""
        return max(self.p(low), self.p(high)) / 2 if low < self.mean < high else 1.0

    def prediction(self) -> Interval:
        """Return the prediction interval of a single further value (normal values); NaN for one value."""
        reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, self.degrees) * math.hypot(self.deviation, self.error))
        return Interval(self.mean - reach, self.mean + reach)

    def seeds_to_decide(self, edge: float = 0.0, level: float = LEVEL) -> tuple[int | None, ...]:
        """Return how many seeds tell the mean from `edge` in 80 % of studies, and that number's 80 % interval.

        As if the mean seen were the true one. The ends are those of the standard deviation (chi-square).
        """
        ends, samples = self.degrees / stats.chi2.ppf([0.5, 0.9, 0.1], self.degrees), len(self.samples)
        nominal, possible = self.looks.nominal(level, samples), range(FEWEST, self.looks.most + 1)
        found: list[int | None] = []
        for deviation in np.maximum(np.sqrt(ends) * self.deviation, TINY):
            of = partial(power, self.mean - edge, deviation, level=nominal, samples=samples, overlap=self.overlap)
            place = bisect_left(possible, POWER, key=of)
            found.append(possible[place] if place < len(possible) else None)
        return tuple(found)


def over_images(right: Sequence[np.ndarray], looks: Looks = EVERY_LOOK) -> tuple[float, Interval]:
    """Return the mean and interval of one arm's right answers (bool (runs, images)), or of the first minus the second.

    The interval counts both runs and images as samples. Every run has the same images, so the two variances add, minus
    the residual, which both contain.
    """
    found = Estimate(*(each.mean(axis=1).tolist() for each in right), looks=looks)
    first, *other = (each.mean(axis=0) for each in right)
    by_image, residual = first - sum(other), 0.0
    for each in right:
        (runs, images), rest = each.shape, each - each.mean(axis=1, keepdims=True) - each.mean(axis=0)
        residual += float(np.var(rest)) / ((runs - 1) * (images - 1))
    variance = max(found.error**2 + float(np.var(by_image, ddof=1)) / len(by_image) - residual, found.error**2)
    reach = (found.interval().high - found.mean) * math.sqrt(variance) / max(found.error, TINY)
    return found.mean, Interval(found.mean - reach, found.mean + reach)


class Outcome(str, Enum):
    """The result of the comparison of an arm with its reference."""

    BETTER = "better"
    WORSE = "worse"
    EQUIVALENT = "equivalent"  # within the margin
    OPEN = "undecided"
    FEW = "too few runs"


def compare(estimates: Mapping[str, Estimate], margin: float = 0.0, tests: int = 0) -> dict[str, tuple[Outcome, float]]:
    """Decide for each difference whether it is above 0, below 0, or within the margin; wrong in at most 5 % of studies.

    Also returns the level of each test. Holm's correction counts each difference once, because it can't both be 0 and
    be as large as the margin. If the data choose the comparisons, `tests` is the number of all possible ones
    (Bonferroni).
    """
    enough = {name: each for name, each in estimates.items() if each.n >= FEWEST}
    differ = {name: each.p(0) for name, each in enough.items()}
    alike = {name: each.p_within(-margin, margin) if margin else 1.0 for name, each in enough.items()}
    smaller = [min(differ[name], alike[name]) for name in enough]
    corrected = [(min(p * tests, 1.0), LEVEL / tests) for p in smaller] if tests else holm(smaller)
    found = dict.fromkeys(estimates, (Outcome.FEW, LEVEL))
    for (name, each), (p, level) in zip(enough.items(), corrected, strict=True):
        differs = Outcome.BETTER if each.mean > 0 else Outcome.WORSE
        decided = Outcome.EQUIVALENT if alike[name] < differ[name] else differs
        found[name] = decided if p < LEVEL else Outcome.OPEN, level
    return found


def power(
    effect: float, deviation: float, n: int, level: float = LEVEL, samples: int = 1, *, overlap: float = 0.0
) -> float:
    """Return the power of a single two-sided t-test for a mean of `n` values at a distance `effect`.

    `deviation` is that of one value or, for two samples of `n` each, that of one difference.
    """
    degrees = samples * (n - 1)
    limit, shift = -special.stdtrit(degrees, level / 2), abs(effect) / (deviation * math.sqrt(1 / n + overlap))
    return float(sum(stats.nct.sf(limit, degrees, [shift, -shift])))  # the cdf is NaN for many shifts


def p_text(p: float) -> str:
    """Write a p-value, with three decimals if it is near the level of the tests or below it."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"
