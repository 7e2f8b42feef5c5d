"""How sure a difference is: intervals, paired tests, correction for many. On SciPy where it has them."""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy import special, stats
from scipy.stats import binomtest

CONFIDENCE = 0.95
LEVEL = 0.05  # of every test, two-sided
POWER = 0.8  # with which more runs are to decide
FEWEST = 3  # runs that a verdict takes
BOOTSTRAP_FROM = 20  # runs
RESAMPLES = 9_999
TINY = 1e-12  # below which a difference is rounding
MOST_RUNS = 1_000  # that are worth naming


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


def wilson(right: int, count: int) -> Interval:
    """Return Wilson's 95 % interval of a proportion (Wilson 1927), without continuity correction."""
    found = binomtest(right, count).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(float(found.low), float(found.high))


def mcnemar(first: np.ndarray, second: np.ndarray) -> tuple[int, int, float]:
    """Return on how many images only one of two networks is right, either (bool (N) each), and McNemar's exact p.

    McNemar 1947, two-sided; if they are right equally often these images fall to either as a coin does.
    """
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    differing = only_first + only_second
    return only_first, only_second, float(binomtest(only_first, differing).pvalue) if differing else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm 1979), in the given order."""
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    found = np.minimum(np.maximum.accumulate(np.asarray(p_values, dtype=float)[order] * factors), 1)
    return [float(p) for p in found[np.argsort(order)]]


class Estimate:
    """The mean of one sample, or of the first of two less the second (Welch 1947), and how sure it is.

    A sample is independent values of one quantity, one a run or a pair of runs. Below 20 values the interval is
    Student's; from there on that of the studentised bootstrap (Efron & Tibshirani 1993, ch. 12), for any distribution.
    `overlap` is the ratio of test to training images where the values come from repeated splits of one set, whose
    training parts overlap: it widens the error as Nadeau & Bengio (2003) do; 0 for independent values.
    """

    def __init__(self, *samples: Sequence[float], overlap: float = 0.0) -> None:
        self.samples, self.overlap = samples, overlap
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

    @cached_property
    def _pivots(self) -> np.ndarray:
        """Return (mean of a resample - mean) / its standard error, the same ones at every call."""
        drawn = []
        for seed, each in enumerate(self.samples):
            places = np.random.default_rng(seed).integers(0, len(each), (RESAMPLES, len(each)))
            drawn.append(np.asarray(each)[places])
        distances = drawn[0].mean(1) - sum(each.mean(1) for each in drawn[1:]) - self.mean
        squares = sum(each.var(1, ddof=1) / each.shape[1] for each in drawn)
        found: np.ndarray = distances[squares > 0] / np.sqrt(squares[squares > 0])
        return found

    def interval(self) -> Interval:
        """Return the confidence interval of the mean; NaN for one value."""
        tail = (1 - CONFIDENCE) / 2
        if self.n < BOOTSTRAP_FROM or self.error < TINY:
            high = stats.t.ppf(1 - tail, self.degrees)
            low = -high
        else:
            low, high = np.quantile(self._pivots, [tail, 1 - tail])
        return Interval(self.mean - float(high) * self.error, self.mean - float(low) * self.error)

    def p(self, edge: float) -> float:
        """Return the two-sided p-value of the mean being `edge`, for two values or more.

        Values that are all the same show nothing of how much they vary: then it is the sign test's.
        """
        if self.error < TINY:
            return 1.0 if abs(self.mean - edge) < TINY else min(1.0, 2 * 0.5**self.n)
        t = (self.mean - edge) / self.error
        if self.n < BOOTSTRAP_FROM:
            return float(2 * stats.t.sf(abs(t), self.degrees))
        above = (np.sum(self._pivots >= t) + 1) / (RESAMPLES + 1)
        below = (np.sum(self._pivots <= t) + 1) / (RESAMPLES + 1)
        return float(min(1.0, 2 * min(above, below)))

    def prediction(self, deviation: float | None = None) -> Interval:
        """Return the interval in which a single further value is expected (normal values); NaN for one value.

        `deviation` is that of single values, where these are means of several.
        """
        spread = math.hypot(self.deviation if deviation is None else deviation, self.error)
        reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, self.degrees) * spread)
        return Interval(self.mean - reach, self.mean + reach)


def power(effect: float, deviation: float, n: int, level: float = LEVEL, overlap: float = 0.0) -> float:
    """Return the probability that a two-sided t-test of `n` values tells their mean from one `effect` away from it."""
    limit, shift = special.stdtrit(n - 1, 1 - level / 2), abs(effect) / (deviation * np.sqrt(1 / n + overlap))
    below = np.nan_to_num(special.nctdtr(n - 1, shift, -limit))  # of a large shift it is nothing, and SciPy says NaN
    return float(1 - special.nctdtr(n - 1, shift, limit) + below)


def more_to_decide(estimate: Estimate, edge: float, level: float = LEVEL) -> tuple[int, int | None] | None:
    """Return from how many to how many more values (None: over 1,000) tell the mean from `edge`; None: no telling.

    As if the difference seen were the true one, for the ends of the standard deviation's 80 % interval (chi-square).
    """
    effect, degrees, more = estimate.mean - edge, estimate.degrees, range(1, MOST_RUNS + 1 - estimate.n)
    if abs(effect) < TINY:
        return None
    if estimate.error < TINY:  # so many equal ones that the sign test decides
        few = max(1, math.ceil(1 - math.log2(level)) - estimate.n)
        return few, few
    overlap = estimate.overlap if len(estimate.samples) == 1 else 0.0

    def fewest(deviation: float) -> int | None:
        place = bisect_left(more, POWER, key=lambda k: power(effect, deviation, estimate.n + k, level, overlap))
        return more[place] if place < len(more) else None

    few_or_none, many = map(fewest, np.sqrt(degrees / stats.chi2.ppf([0.9, 0.1], degrees)) * estimate.deviation)
    return None if few_or_none is None else (few_or_none, many)


def p_text(p: float) -> str:
    """Write a p-value, to three digits where it is near the level of the tests or below it."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"
