"""The quantities of claims and tables: any logged metric of a run, or a figure derived from its epochs."""

import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np

from effv2.config.studies import TIME_TO
from effv2.core.figures import Curve
from effv2.core.words import decimal, percent, points, tenths, whole
from effv2.evidence.statistics import Interval
from effv2.tracking.read import BEST_TEST, LAST_TEST, SELECTED_TEST, SELECTED_VALIDATION, RunRecord

TRAIN, TEST, VALIDATION = "train/accuracy", "test/accuracy", "val/accuracy"
EPOCH_SECONDS, EPOCH_TRAINING, TRAIN_SECONDS = "time/epoch_seconds", "time/train_seconds", "time/total_train_seconds"
TRAIN_RATE, EVALUATE_RATE = "throughput/train_images_per_second", "throughput/evaluate_images_per_second"
ONE, MANY = "inference/single_image_seconds", "inference/batch_128_seconds"
TO_PEAK, TO_LEVEL = "epochs to 95 % of peak train accuracy", "epochs until test accuracy stays at its level"
PEAK_SHARE = 0.95
LEVEL_EPOCHS = 10  # the last epochs, over which a level is averaged
NEAR_LEVEL = 0.02
LARGEST = 1e300  # databases store infinity as the largest number
TIMED = ("rate/", "time/", "inference/", "throughput/")


@dataclass(frozen=True)
class Quantity:
    """A figure of a run: the logged metric of its name, or the result of `take` for the epochs of `metric`."""

    name: str
    words: str
    text: Callable[[float], str] = decimal
    metric: str = ""
    take: Callable[[Any], float | None] | None = None  # of the values of all epochs
    epochs: int = 1  # that it needs
    over_time: bool = False  # the values are by seconds of training, not by epoch
    shown: bool = False  # in tables of arms
    scale: float = 1
    fixed: bool = False  # it doesn't vary between runs, so one run decides
    timed: bool = False  # it depends on the machine
    least: float = -math.inf  # that it can be

    def value(self, run: RunRecord) -> float | None:
        """Return the figure of a run, infinite if it is never reached; None if the run doesn't have a finite one."""
        if self.take is None:
            found = run.metrics.get(self.metric or self.name)
            return self.scale * found if found is not None and abs(found) < LARGEST else None
        curve = over_time(run, self.metric) if self.over_time else _by_epoch(run, self.metric)
        return self.take(curve) if len(curve) >= self.epochs else None

    def values(self, runs: Iterable[RunRecord]) -> list[float]:
        """Return the figures of the runs that have it."""
        return [found for found in map(self.value, runs) if found is not None]

    @property
    def is_accuracy(self) -> bool:
        """Return whether it is a fraction, with differences in percentage points."""
        return self.text is percent

    @property
    def is_fraction(self) -> bool:
        """Return whether it is an accuracy, or a difference of two."""
        return self.text in (percent, points)

    def difference(self, value: float) -> str:
        """Write a difference of two values: percentage points for fractions."""
        return points(value) if self.is_fraction else f"{value:+.3g}"

    @property
    def possible(self) -> Interval:
        """Return the range of possible values, if known."""
        return Interval(0, 1) if self.is_accuracy else Interval(0 if self.timed else self.least, math.inf)


def _by_epoch(run: RunRecord, metric: str) -> Mapping[int, float]:
    """Return the finite values of a metric, in the order of epochs."""
    return {epoch: value for epoch, value in sorted(run.history.get(metric, {}).items()) if abs(value) < LARGEST}


def over_time(run: RunRecord, metric: str) -> Mapping[float, float]:
    """Return a metric of every epoch by the seconds of training so far; empty if the time of an epoch is missing."""
    curve, seconds = _by_epoch(run, metric), _by_epoch(run, EPOCH_TRAINING)
    spent = dict(zip(seconds, accumulate(seconds.values()), strict=True))
    return {spent[epoch]: value for epoch, value in curve.items()} if curve.keys() <= spent.keys() else {}


def _median(curve: Curve) -> float:
    return statistics.median(curve.values())


def _level(curve: Curve) -> float:
    return statistics.fmean(list(curve.values())[-LEVEL_EPOCHS:])


def _first_at(curve: Mapping[Any, float], level: float) -> float:
    return min((place for place, accuracy in curve.items() if accuracy >= level), default=math.inf)


def _epochs_to_peak_share(curve: Curve) -> float:
    best = max(curve.values())
    return _first_at(curve, min(best, PEAK_SHARE * best))


def _epochs_to_level(curve: Curve) -> int:
    """Return the first epoch from which the mean of five epochs stays within two points of the last ten's."""
    smooth = np.convolve(list(curve.values()), np.full(5, 0.2), "valid")
    away = np.flatnonzero(np.abs(smooth - _level(curve)) > NEAR_LEVEL)
    return list(curve)[int(away[-1]) + 1 if len(away) else 0]


def _gain(curve: Curve) -> float | None:
    """Return the mean of the last ten epochs minus that of epochs 9 to 11; None without those."""
    around = [curve[epoch] for epoch in (9, 10, 11) if epoch in curve]
    return _level(curve) - statistics.fmean(around) if len(around) == 3 else None


ALL = (  # in the order of tables
    Quantity(BEST_TEST, "test accuracy, best epoch", percent, shown=True),
    Quantity(SELECTED_TEST, "test accuracy, selected epoch", percent, shown=True),
    Quantity(SELECTED_VALIDATION, "validation accuracy, selected epoch", percent, shown=True),
    Quantity(TRAIN_SECONDS, "training, s", tenths, shown=True, timed=True),
    Quantity(LAST_TEST, "test accuracy, last epoch", percent, shown=True),
    Quantity("selected/test_ece", "calibration error, selected epoch", percent, shown=True),
    Quantity("first/test_accuracy", "test accuracy, first epoch", percent, TEST, lambda curve: curve[min(curve)]),
    Quantity("best/train_accuracy", "highest train accuracy", percent, TRAIN, lambda c: max(c.values())),
    Quantity("level/train_accuracy", "train accuracy, mean of the last ten epochs", percent, TRAIN, _level),
    Quantity("level/test_accuracy", "test accuracy, mean of the last ten epochs", percent, TEST, _level),
    Quantity("gain/test_after_epoch_10", "gain in test accuracy after epoch 10", points, TEST, _gain, epochs=21),
    Quantity("epochs/to_95_percent", TO_PEAK, tenths, TRAIN, _epochs_to_peak_share, shown=True, least=1),
    Quantity("epochs/to_test_level", TO_LEVEL, tenths, TEST, _epochs_to_level, epochs=20, least=1),
    Quantity(EPOCH_SECONDS, "one epoch, s", decimal, EPOCH_SECONDS, _median, timed=True),
    Quantity("rate/train", "training, images/s", tenths, TRAIN_RATE, _median, shown=True, timed=True),
    Quantity("rate/evaluate", "inference, images/s", tenths, EVALUATE_RATE, _median, shown=True, timed=True),
    Quantity("inference/single_image_milliseconds", "one image, ms", tenths, ONE, shown=True, scale=1000, timed=True),
    Quantity("inference/batch_128_milliseconds", "128 images, ms", whole, MANY, shown=True, scale=1000, timed=True),
    Quantity("model/parameters", "parameters", whole, shown=True, fixed=True),
    Quantity("model/gflops", "GFLOPs", lambda g: f"{g:.3f}" if g >= 0.01 else f"{g:.2g}", shown=True, fixed=True),
    Quantity("published/top1_accuracy", "top-1 published by torchvision", percent, shown=True),
    Quantity("bf16/top1_difference", "bf16 minus float32, top-1", points, shown=True),
    Quantity("bf16/predictions_changed", "bf16, predictions changed", percent, shown=True),
)
QUANTITIES = {each.name: each for each in ALL}
SHOWN = {name: what for name, what in QUANTITIES.items() if what.shown}
CURVES = {"test accuracy": TEST, "validation accuracy": VALIDATION, "train accuracy": TRAIN}  # that are drawn
# The metrics whose epochs are read, and those that are exported with them.
HISTORIES = tuple(dict.fromkeys([*CURVES.values(), EPOCH_TRAINING, *(each.metric for each in ALL if each.take)]))
OF_SPLITS = ("train/", "val/", "test/")  # prefixes of the metrics of every epoch of a split
EXPORTED = (*HISTORIES, *OF_SPLITS, "learning_rate")


def shown_for(runs: Iterable[RunRecord]) -> dict[str, Quantity]:
    """Return the quantities of tables: the usual ones, and the last value of each other metric of every epoch."""
    logged = {name for run in runs for name in run.metrics if name.startswith(OF_SPLITS)}
    return SHOWN | {name: quantity(name) for name in sorted(logged) if not name.endswith(("/loss", "/accuracy"))}


def quantity(name: str) -> Quantity:
    """Return a named quantity, a time to an accuracy, or a logged metric for any other name."""
    if time_to := re.match(TIME_TO, name):
        metric, level = f"{time_to[1]}/accuracy", float(time_to[2])
        accuracy = next(words for words, each in CURVES.items() if each == metric)
        words, take = f"training to {100 * level:g} % {accuracy}, s", partial(_first_at, level=level)
        return Quantity(name, words, tenths, metric, take, over_time=True, timed=True)
    text = percent if "accuracy" in name or "top1" in name else decimal
    return QUANTITIES.get(name) or Quantity(name, name, text, timed=name.startswith(TIMED))
