"""How sure a difference is: intervals, paired tests, correction for many, calibration. On SciPy where it has them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

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
CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Interval:
    """Values from one to another, as a confidence interval has."""

    low: float
    high: float

    def within(self, other: Interval) -> Interval:
        """Return its part within another, as that of all values that a quantity can have; itself if there is none."""
        low, high = max(self.low, other.low), min(self.high, other.high)
        return Interval(low, high) if low <= high else self


@dataclass(frozen=True)
class Paired:
    """Two networks on the same images: how many only the first got right, only the second, and McNemar's exact p."""

    only_first: int
    only_second: int
    p: float


def wilson(right: int, count: int) -> Interval:
    """Return Wilson's 95 % interval of a proportion (Wilson 1927), without continuity correction."""
    found = binomtest(right, count).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(float(found.low), float(found.high))


def mcnemar(first: np.ndarray, second: np.ndarray) -> Paired:
    """Test whether two networks are right equally often on the same images (bool (N) each), exactly and two-sided.

    McNemar 1947; under the hypothesis the images that only one of them got right fall to either as a coin does.
    """
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    differing = only_first + only_second
    p = float(binomtest(only_first, differing).pvalue) if differing else 1.0
    return Paired(only_first, only_second, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm 1979), in the given order."""
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    corrected = np.minimum(np.maximum.accumulate(np.asarray(p_values, dtype=float)[order] * factors), 1)
    found = np.empty(len(p_values))
    found[order] = corrected
    return [float(p) for p in found]


def fisher(right: tuple[int, int], counts: tuple[int, int]) -> float:
    """Return Fisher's exact two-sided p for two accuracies on images of which it isn't known who got which right."""
    (a, b), (n, m) = right, counts
    return float(stats.fisher_exact([[a, n - a], [b, m - b]]).pvalue)


class Estimate(ABC):
    """A mean, or the difference of two, and how sure it is.

    Below 20 values by Student's t; from there on by the studentised bootstrap (Efron & Tibshirani 1993, ch. 12),
    which doesn't ask them to be normal.
    """

    @property
    @abstractmethod
    def n(self) -> int:
        """Return the number of values, that of the smaller sample where there are two."""

    @property
    @abstractmethod
    def mean(self) -> float:
        """Return the mean, or the difference of two."""

    @property
    @abstractmethod
    def error(self) -> float:
        """Return the standard error of the mean; NaN for one value."""

    @property
    @abstractmethod
    def degrees(self) -> float:
        """Return the degrees of freedom."""

    @property
    @abstractmethod
    def deviation(self) -> float:
        """Return the standard deviation of one more value, or of the difference of one more of each; NaN for one."""

    overlap: float

    @abstractmethod
    def _resampled(self) -> np.ndarray:
        """Return (mean of a resample - mean) / its standard error, the same ones at every call."""

    @cached_property
    def _pivots(self) -> np.ndarray:
        return self._resampled()

    def interval(self, confidence: float = CONFIDENCE) -> Interval | None:
        """Return the confidence interval of the mean; None for one value."""
        if self.n < 2:
            return None
        tail = (1 - confidence) / 2
        if self.n < BOOTSTRAP_FROM or self.error < TINY:
            high = stats.t.ppf(1 - tail, self.degrees)
            low = -high
        else:
            low, high = np.quantile(self._pivots, [tail, 1 - tail])
        return Interval(self.mean - float(high) * self.error, self.mean - float(low) * self.error)

    def p(self, edge: float) -> float:
        """Return the two-sided p-value of the mean being `edge`; 1 for one value.

        Values that are all the same show nothing of how much they vary: then it is the sign test's.
        """
        if self.n < 2:
            return 1.0
        if self.error < TINY:
            return 1.0 if abs(self.mean - edge) < TINY else min(1.0, 2 * 0.5**self.n)
        t = (self.mean - edge) / self.error
        if self.n < BOOTSTRAP_FROM:
            return float(2 * stats.t.sf(abs(t), self.degrees))
        above = (np.sum(self._pivots >= t) + 1) / (RESAMPLES + 1)
        below = (np.sum(self._pivots <= t) + 1) / (RESAMPLES + 1)
        return float(min(1.0, 2 * min(above, below)))


@dataclass(frozen=True)
class Sample(Estimate):
    """Independent values of one quantity, one a run or a pair of runs.

    `overlap` is the ratio of test to training images where the values come from repeated splits of one set, whose
    training parts overlap: it widens the error of the mean as Nadeau & Bengio (2003) do; 0 for independent values.
    """

    values: tuple[float, ...]
    overlap: float = 0.0

    @property
    def n(self) -> int:
        """Return the number of values."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """Return the mean."""
        return float(np.mean(self.values))

    @property
    def deviation(self) -> float:
        """Return the standard deviation; NaN for one value."""
        return float(np.std(self.values, ddof=1)) if self.n > 1 else float("nan")

    @property
    def error(self) -> float:
        """Return the standard error of the mean; NaN for one value."""
        return self.deviation * float(np.sqrt(1 / self.n + self.overlap))

    @property
    def degrees(self) -> float:
        """Return the degrees of freedom."""
        return self.n - 1

    def prediction(self, deviation: float | None = None, confidence: float = CONFIDENCE) -> Interval | None:
        """Return the interval in which a single further value is expected (normal values); None for one value.

        `deviation` is that of single values, where these are means of several.
        """
        if self.n < 2:
            return None
        spread = np.hypot(self.deviation if deviation is None else deviation, self.error)
        reach = float(stats.t.ppf((1 + confidence) / 2, self.degrees) * spread)
        return Interval(self.mean - reach, self.mean + reach)

    def _resampled(self) -> np.ndarray:
        means, squares = _resamples(self.values, 0)
        return _pivots(means - self.mean, squares)


@dataclass(frozen=True)
class Unpaired(Estimate):
    """The difference of the means of two independent samples (Welch 1947)."""

    first: Sample
    second: Sample
    overlap = 0.0

    @property
    def n(self) -> int:
        """Return the number of values of the smaller sample."""
        return min(self.first.n, self.second.n)

    @property
    def mean(self) -> float:
        """Return the difference of the means."""
        return self.first.mean - self.second.mean

    @property
    def deviation(self) -> float:
        """Return the standard deviation of the difference of one value of each."""
        return float(np.hypot(self.first.deviation, self.second.deviation))

    @property
    def error(self) -> float:
        """Return the standard error of the difference."""
        return float(np.hypot(self.first.error, self.second.error))

    @property
    def degrees(self) -> float:
        """Return Welch's degrees of freedom."""
        if self.error == 0:
            return self.first.degrees + self.second.degrees
        parts = sum(each.error**4 / each.degrees for each in (self.first, self.second))
        return float(self.error**4 / parts)

    def _resampled(self) -> np.ndarray:
        first, squares = _resamples(self.first.values, 0)
        second, others = _resamples(self.second.values, 1)
        return _pivots(first - second - self.mean, squares + others)


def _resamples(values: Sequence[float], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the means of resamples and the squares of their standard errors."""
    known = np.asarray(values)
    drawn = known[np.random.default_rng(seed).integers(0, len(known), (RESAMPLES, len(known)))]
    return drawn.mean(1), drawn.var(1, ddof=1) / len(known)


def _pivots(distances: np.ndarray, squares: np.ndarray) -> np.ndarray:
    found: np.ndarray = distances[squares > 0] / np.sqrt(squares[squares > 0])
    return found


def power(effect: float, deviation: float, n: int, level: float = LEVEL, overlap: float = 0.0) -> float:
    """Return the probability that a two-sided t-test of `n` values tells their mean from one `effect` away from it."""
    if n < 2:
        return 0.0
    limit, shift = special.stdtrit(n - 1, 1 - level / 2), abs(effect) / (deviation * np.sqrt(1 / n + overlap))
    below = np.nan_to_num(special.nctdtr(n - 1, shift, -limit))  # of a large shift it is nothing, and SciPy says NaN
    return float(1 - special.nctdtr(n - 1, shift, limit) + below)


def runs_to_decide(effect: float, deviation: float, level: float = LEVEL, overlap: float = 0.0) -> int | None:
    """Return how many values tell a mean from one `effect` away with 80 % power; None for more than 1,000."""
    found = range(FEWEST, MOST_RUNS + 1)

    def reached(n: int) -> float:
        return power(effect, deviation, n, level, overlap)

    place = bisect_left(found, POWER, key=reached) if effect else len(found)
    return found[place] if place < len(found) else None


def more_to_decide(estimate: Estimate, edge: float, level: float = LEVEL) -> tuple[int, int | None] | None:
    """Return from how many to how many more values are likely to tell the mean from `edge`; None: no telling.

    As if the difference seen were the true one, for the ends of the standard deviation's 80 % interval (chi-square).
    An upper end of None is more than 1,000.
    """
    effect = estimate.mean - edge
    few: int | None
    many: int | None
    if estimate.n < 2 or abs(effect) < TINY:
        return None
    if estimate.error < TINY:  # so many equal ones that the sign test decides
        few = many = int(np.ceil(1 - np.log2(level)))
    else:
        ends = np.sqrt(estimate.degrees / stats.chi2.ppf([0.9, 0.1], estimate.degrees)) * estimate.deviation
        few, many = (runs_to_decide(effect, float(end), level, estimate.overlap) for end in ends)
    if few is None:
        return None
    return max(1, few - estimate.n), None if many is None else max(1, many - estimate.n)


def p_text(p: float) -> str:
    """Write a p-value, to three digits where it is near the level of the tests or below it."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = CALIBRATION_BINS) -> float:
    """Return the expected calibration error (Guo et al. 2017) of confidences (N) in [0, 1] and what was right (N).

    Bins of equal width, open on the left; the mean gap of confidence and accuracy, weighted by the images of a bin.
    """
    edges = np.linspace(0, 1, bins + 1)
    members = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    gaps = np.bincount(members, weights=confidence - right, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))
