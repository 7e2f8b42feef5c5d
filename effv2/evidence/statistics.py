"""How sure a difference is: tests and intervals that hold at every look, and correction for many; on SciPy."""

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
POWER = 0.8  # with which more runs are to decide
FEWEST = 3  # runs that a verdict takes
TINY = 1e-12  # below which a difference is rounding
MOST_LOOKS = 50  # seeds, to which the table of levels goes
LEVELS = Path(__file__).with_name("levels.csv")  # made by benchmarks/levels.py


class Interval(NamedTuple):
    """Values from one to another, as a confidence interval has."""

    low: float
    high: float

    def within(self, other: "Interval") -> "Interval":
        """Return its part within another, as that of all values that a quantity can have; itself if there is none."""
        low, high = max(self.low, other.low), min(self.high, other.high)
        return Interval(low, high) if low <= high else self

    def text(self, write: Callable[[float], str]) -> str:
        """Write both ends."""
        return f"{write(self.low)} to {write(self.high)}"


class Looks(NamedTuple):
    """How often a comparison may be looked at: after every run, up to `most` seeds of an arm; or once, with all."""

    most: int = 30
    once: bool = False
    splits: int = 1  # on each of which all seeds are then planned

    def overall(self, p: float, samples: int) -> float:
        """Return how likely as small a p-value, Student's or Welch's, comes up at any look where there is no effect."""
        return p if self.once else _interpolate(p, *reversed(_levels(samples, self.most)))

    def nominal(self, alpha: float, samples: int) -> float:
        """Return how small the p-value of a single look has to be, for a share `alpha` of errors over all looks."""
        return alpha if self.once else _interpolate(alpha, *_levels(samples, self.most))

    def waits(self, there: int) -> str:
        """Say that there is no verdict yet, with so many runs of an arm; empty where there may be one."""
        planned = self.most * self.splits
        early = self.once and there < planned
        return f"{planned} seeds planned, {there} are there: no verdict before all are" if early else ""

    def text(self) -> str:
        """Say it."""
        return f"one look, at {self.most} seeds" if self.once else f"every look up to {self.most} seeds"


EVERY_LOOK = Looks()  # where nothing else was said beforehand


@cache
def _levels(samples: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return logarithms of levels, overall and of a single look, for the next number of seeds of the table."""
    row = pd.read_csv(LEVELS, index_col=["kind", "most"]).loc[samples].loc[most:].iloc[0]
    return np.log(row.index.to_numpy(float)), np.log(row.to_numpy())


def _interpolate(p: float, xs: np.ndarray, ys: np.ndarray) -> float:
    """Interpolate between points in rising order, on logarithms; go on below the first as between the first two."""
    x = np.log(max(p, 1e-300))
    below = ys[0] + (x - xs[0]) * (ys[1] - ys[0]) / (xs[1] - xs[0])
    return float(np.exp(below if x < xs[0] else np.interp(x, xs, ys)))


def wilson(right: int, count: int) -> Interval:
    """Return Wilson's 95 % interval of a proportion (Wilson 1927), without continuity correction."""
    found = binomtest(right, count).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(float(found.low), float(found.high))


def right_on_shared(answers: Collection[Mapping[str, bool]]) -> np.ndarray:
    """Return which images networks got right (bool (networks, images)), of those images that all of them have."""
    shared = sorted(set.intersection(*map(set, answers)))
    return np.array([[each[image] for image in shared] for each in answers], bool)


def mcnemar(first: np.ndarray, second: np.ndarray) -> tuple[int, int, float]:
    """Return on how many images only one of two networks is right, either (bool (N) each), and the exact p of that.

    McNemar 1947, two-sided; if they are right equally often these images fall to either as a coin does.
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
    step = np.minimum(np.searchsorted(steps, steps), np.sum(corrected < LEVEL))  # equal ones share the first
    found = np.column_stack([corrected, LEVEL * w[order] / left[step]])[np.argsort(order)]
    return list(map(tuple, found.tolist()))


class Estimate:
    """The mean of one sample, or of the first of two less the second (Welch 1947), and how sure it is.

    A sample is independent values of one quantity, one a run or a pair of runs; intervals are Student's. They and the
    p-values hold however often one looked, as `looks` says. `overlap` is the ratio of test to training images where
    the values come from repeated splits of one set, whose parts overlap: it widens the error as Nadeau & Bengio (2003)
    do; 0 for independent values.
    """

    def __init__(self, *samples: Sequence[float], overlap: float = 0.0, looks: Looks = EVERY_LOOK) -> None:
        self.samples, self.overlap, self.looks = samples, overlap, looks
        counts = list(map(len, samples))
        means = [float(np.mean(each)) for each in samples]
        deviations = [float(np.std(each, ddof=1)) if len(each) > 1 else math.nan for each in samples]
        errors = [deviation * math.sqrt(1 / n + overlap) for deviation, n in zip(deviations, counts, strict=True)]
        self.n = min(counts)
        self.mean = means[0] - sum(means[1:])
        self.deviation = math.hypot(*deviations)  # of one more value, or of one more of each; NaN for one value
        self.error = math.hypot(*errors)  # of the mean; NaN for one value
        self.degrees = float(sum(counts) - len(counts))  # of freedom
        if len(samples) > 1 and self.error > 0:
            self.degrees = self.error**4 / sum(each**4 / (n - 1) for each, n in zip(errors, counts, strict=True))

    def interval(self, level: float = LEVEL) -> Interval:
        """Return the confidence interval of the mean, which misses it at any look in a share `level`; NaN for one."""
        nominal = self.looks.nominal(level, len(self.samples))
        reach = float(-special.stdtrit(self.degrees, nominal / 2) * self.error)
        return Interval(self.mean - reach, self.mean + reach)

    def p(self, edge: float) -> float:
        """Return the two-sided p-value, over all looks, of the mean being `edge`, for two values or more.

        Values that are all the same show nothing of how much they vary: then it is the sign test's.
        """
        if self.error < TINY:
            nominal = 1.0 if abs(self.mean - edge) < TINY else min(1.0, 2 * 0.5**self.n)
        else:
            nominal = float(2 * special.stdtr(self.degrees, -abs(self.mean - edge) / self.error))
        return self.looks.overall(nominal, len(self.samples))

    def p_within(self, low: float, high: float) -> float:
        """Return the p-value of the mean lying outside of two edges, one test of either (TOST, Schuirmann 1987)."""
        return max(self.p(low), self.p(high)) / 2 if low < self.mean < high else 1.0

    def prediction(self) -> Interval:
        """Return the interval in which a single further value is expected (normal values); NaN for one value."""
        reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, self.degrees) * math.hypot(self.deviation, self.error))
        return Interval(self.mean - reach, self.mean + reach)

    def seeds_to_decide(self, edge: float = 0.0, level: float = LEVEL) -> tuple[int | None, ...]:
        """Return how many seeds tell the mean from `edge` in 80 % of studies, and that number's 80 % interval.

        As if the mean seen were the true one. The ends are those of the standard deviation (chi-square).
        """
        ends = self.degrees / stats.chi2.ppf([0.5, 0.9, 0.1], self.degrees)
        found = partial(seeds_for, self.mean - edge, looks=self.looks, level=level, overlap=self.overlap)
        return tuple(found(max(each, TINY), samples=len(self.samples)) for each in np.sqrt(ends) * self.deviation)


def over_images(right: Sequence[np.ndarray], looks: Looks = EVERY_LOOK) -> tuple[float, Interval]:
    """Return the mean of one arm's right answers (bool (runs, images)), or of the first less the second, and how sure.

    The interval counts both runs and images as samples. Every run has the same images, so that their variances add,
    less what both of them hold: the residual.
    """
    signs = [1.0, -1.0][: len(right)]
    found = Estimate(*(each.mean(axis=1) for each in right), looks=looks)
    by_image = np.sum([sign * each.mean(axis=0) for sign, each in zip(signs, right, strict=True)], axis=0)
    residual = 0.0
    for each in right:
        (runs, images), rows, columns = each.shape, each.mean(axis=1, keepdims=True), each.mean(axis=0)
        rest = (each - rows - columns + each.mean()) ** 2
        residual += float(rest.sum()) / ((runs - 1) * (images - 1) * runs * images)
    variance = max(found.error**2 + float(np.var(by_image, ddof=1)) / len(by_image) - residual, found.error**2)
    reach = (found.interval().high - found.mean) * math.sqrt(variance) / max(found.error, TINY)
    return found.mean, Interval(found.mean - reach, found.mean + reach)


class Outcome(str, Enum):
    """What runs say of an arm and the one that it is compared with."""

    BETTER = "better"
    WORSE = "worse"
    EQUIVALENT = "equivalent"  # within the margin
    OPEN = "undecided"
    FEW = "too few runs"


def compare(estimates: Mapping[str, Estimate], margin: float = 0.0, tests: int = 0) -> dict[str, tuple[Outcome, float]]:
    """Say of each difference whether it is above 0, below 0, or within the margin; wrong in 5 % of studies at most.

    Returns the level of its test, too. Holm's correction counts each difference once: of its being 0 and its being as
    large as the margin one is false. `tests` is the number of all comparisons that there could be, where the data say
    which ones are made (Bonferroni).
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
    """Return the probability that a single two-sided t-test tells a mean of `n` values from one `effect` away from it.

    `deviation` is that of one value; of two samples of `n` each, that of one difference.
    """
    degrees = samples * (n - 1)
    limit, shift = -special.stdtrit(degrees, level / 2), abs(effect) / (deviation * math.sqrt(1 / n + overlap))
    below = np.nan_to_num(special.nctdtr(degrees, shift, -limit))  # of a large shift it is nothing, and SciPy says NaN
    return float(1 - special.nctdtr(degrees, shift, limit) + below)


def seeds_for(
    effect: float, deviation: float, looks: Looks, level: float = LEVEL, samples: int = 2, *, overlap: float = 0.0
) -> int | None:
    """Return with how many seeds of each arm 80 % of studies find an effect; None: with more than are looked at."""
    nominal, possible = looks.nominal(level, samples), range(looks.most if looks.once else FEWEST, looks.most + 1)
    place = bisect_left(possible, POWER, key=lambda n: power(effect, deviation, n, nominal, samples, overlap=overlap))
    return possible[place] if place < len(possible) else None


def p_text(p: float) -> str:
    """Write a p-value, to three digits where it is near the level of the tests or below it."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"
