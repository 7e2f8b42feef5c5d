"""How sure a difference is: intervals, paired tests, correction for many, calibration. On SciPy where it has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

CONFIDENCE = 0.95
CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Interval:
    """A confidence interval."""

    low: float
    high: float


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


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = CALIBRATION_BINS) -> float:
    """Return the expected calibration error (Guo et al. 2017) of confidences (N) in [0, 1] and what was right (N).

    Bins of equal width, open on the left; the mean gap of confidence and accuracy, weighted by the images of a bin.
    """
    edges = np.linspace(0, 1, bins + 1)
    members = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    gaps = np.bincount(members, weights=confidence - right, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))
