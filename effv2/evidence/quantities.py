"""What of a run a claim or a table can be about: any logged metric, or a figure derived from its epochs.

A quantity is one entry in QUANTITIES. Those that are `shown` stand in the tables of studies, in this order.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from effv2.core.figures import Curve
from effv2.evidence.statistics import Interval
from effv2.tracking.accuracies import BEST_TEST, LAST_TEST, SELECTED_TEST, SELECTED_VALIDATION
from effv2.tracking.read import RunRecord

TRAIN, TEST, VALIDATION = "train/accuracy", "test/accuracy", "val/accuracy"
EPOCH_SECONDS, TRAIN_SECONDS = "time/epoch_seconds", "time/total_train_seconds"
TRAIN_RATE, EVALUATE_RATE = "throughput/train_images_per_second", "throughput/evaluate_images_per_second"
PEAK_SHARE = 0.95
LEVEL_EPOCHS = 10  # the last ones, over which a level is averaged
NEAR_LEVEL = 0.02
LARGEST = 1e300  # databases keep infinity as the largest number there is
TIMED = ("rate/", "time/", "inference/", "throughput/")


whole, tenths = "{:,.0f}".format, "{:,.1f}".format  # numbers without a fraction, to a tenth


def percent(value: float) -> str:
    """Write a fraction as a percentage."""
    return f"{100 * value:.2f} %"


def points(value: float) -> str:
    """Write a difference of two fractions in percentage points."""
    return f"{100 * value:+.2f} points"


def decimal(value: float) -> str:
    """Write a number to three digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def number(text: str) -> float:
    """Read a number; NaN where the text is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def duration(seconds: float) -> str:
    """Write a duration in minutes or hours."""
    minutes = seconds / 60
    return f"{minutes / 60:.1f} hours" if minutes >= 60 else f"{minutes:.1f} minutes"


@dataclass(frozen=True)
class Quantity:
    """A figure of a run: its name in words, and the logged metric that it is, or that `take` derives it from.

    `take` gets the values of all epochs, `epochs` of them at least. Tables of arms have the `main` quantities first,
    and of many arms those alone. A `fixed` quantity doesn't vary from run to run: one decides. A `timed` one belongs
    to the machine that it was taken on. `least` is the lowest value that it can have.
    """

    words: str
    metric: str
    take: Callable[[Curve], float | None] | None = None
    text: Callable[[float], str] = decimal
    shown: Literal["", "main", "more"] = ""
    epochs: int = 1
    scale: float = 1
    fixed: bool = False
    timed: bool = False
    least: float = -math.inf

    def value(self, run: RunRecord) -> float | None:
        """Return the figure of a run; None where the run lacks it, or it is no finite number."""
        if self.take is None:
            found = run.metrics.get(self.metric)
        else:
            curve = {epoch: value for epoch, value in run.history.get(self.metric, {}).items() if abs(value) < LARGEST}
            found = self.take(curve) if len(curve) >= self.epochs else None
        return self.scale * found if found is not None and abs(found) < LARGEST else None

    def values(self, runs: Iterable[RunRecord]) -> list[float]:
        """Return the figures of those runs that have it."""
        return [found for found in map(self.value, runs) if found is not None]

    @property
    def is_accuracy(self) -> bool:
        """Say whether it is a fraction, whose differences are percentage points."""
        return self.text is percent

    @property
    def possible(self) -> Interval:
        """Return where its values can lie, as far as that is known."""
        return Interval(0, 1) if self.is_accuracy else Interval(0 if self.timed else self.least, math.inf)


def _median(curve: Curve) -> float:
    return statistics.median(curve.values())


def _level(curve: Curve) -> float:
    return statistics.fmean(curve[epoch] for epoch in sorted(curve)[-LEVEL_EPOCHS:])


def _epochs_to_peak_share(curve: Curve) -> int:
    best = max(curve.values())
    return min(epoch for epoch, accuracy in curve.items() if accuracy >= min(best, PEAK_SHARE * best))


def _epochs_to_level(curve: Curve) -> int:
    """Return the first epoch from which the mean of five epochs stays within two points of the last ten's."""
    epochs = sorted(curve)
    smooth = np.convolve([curve[epoch] for epoch in epochs], np.full(5, 0.2), "valid")
    away = np.flatnonzero(np.abs(smooth - _level(curve)) > NEAR_LEVEL)
    return epochs[int(away[-1]) + 1 if len(away) else 0]


def _gain_after_10(curve: Curve) -> float | None:
    """Return by how much the last ten epochs' mean exceeds that of epochs 9 to 11; None without those."""
    around = {9, 10, 11}
    return (
        _level(curve) - statistics.fmean(curve[epoch] for epoch in sorted(around)) if around <= curve.keys() else None
    )


TO_PEAK, TO_LEVEL = "epochs to 95 % of peak train accuracy", "epochs until test accuracy stays at its level"
ONE_IMAGE, MANY_IMAGES = "inference/single_image_seconds", "inference/batch_128_seconds"
QUANTITIES: dict[str, Quantity] = {
    BEST_TEST: Quantity("test accuracy, best epoch", BEST_TEST, None, percent, "main"),
    SELECTED_TEST: Quantity("test accuracy, selected epoch", SELECTED_TEST, None, percent, "main"),
    LAST_TEST: Quantity("test accuracy, last epoch", LAST_TEST, None, percent, "more"),
    SELECTED_VALIDATION: Quantity("validation accuracy, best epoch", SELECTED_VALIDATION, None, percent, "main"),
    "first/test_accuracy": Quantity("test accuracy, first epoch", TEST, lambda curve: curve[min(curve)], percent),
    "best/train_accuracy": Quantity("train accuracy, best epoch", TRAIN, lambda curve: max(curve.values()), percent),
    "level/train_accuracy": Quantity("train accuracy, mean of the last ten epochs", TRAIN, _level, percent),
    "level/test_accuracy": Quantity("test accuracy, mean of the last ten epochs", TEST, _level, percent),
    "gain/test_after_epoch_10": Quantity(
        "gain in test accuracy after epoch 10", TEST, _gain_after_10, points, epochs=21
    ),
    "epochs/to_95_percent": Quantity(TO_PEAK, TRAIN, _epochs_to_peak_share, tenths, "more", least=1),
    "epochs/to_test_level": Quantity(TO_LEVEL, TEST, _epochs_to_level, tenths, epochs=20, least=1),
    TRAIN_SECONDS: Quantity("training, s", TRAIN_SECONDS, None, tenths, "main", timed=True),
    EPOCH_SECONDS: Quantity("an epoch, s", EPOCH_SECONDS, _median, timed=True),
    "rate/train": Quantity("training, images/s", TRAIN_RATE, _median, whole, "more", timed=True),
    "rate/evaluate": Quantity("inference, images/s", EVALUATE_RATE, _median, whole, "more", timed=True),
    "inference/single_image_milliseconds": Quantity(
        "one image, ms", ONE_IMAGE, None, tenths, "more", scale=1000, timed=True
    ),
    "inference/batch_128_milliseconds": Quantity(
        "128 images, ms", MANY_IMAGES, None, whole, "more", scale=1000, timed=True
    ),
    "model/parameters": Quantity("parameters", "model/parameters", None, whole, "more", fixed=True),
    "model/gflops": Quantity(
        "GFLOPs", "model/gflops", None, lambda g: f"{g:.3f}" if g >= 0.01 else f"{g:.2g}", "more", fixed=True
    ),
    "published/top1_accuracy": Quantity(
        "top-1 that torchvision publishes", "published/top1_accuracy", None, percent, "more"
    ),
    "bf16/top1_difference": Quantity("bf16 less float32, top-1", "bf16/top1_difference", None, points, "more"),
    "bf16/predictions_changed": Quantity(
        "bf16, predictions changed", "bf16/predictions_changed", None, percent, "more"
    ),
}
SHOWN = {name: what for name, what in QUANTITIES.items() if what.shown}
CURVES = {"test accuracy": TEST, "validation accuracy": VALIDATION, "train accuracy": TRAIN}  # that are drawn
# The metrics whose epochs are read, and those that are exported with them.
HISTORIES = tuple(dict.fromkeys([*CURVES.values(), *(each.metric for each in QUANTITIES.values() if each.take)]))
EXPORTED = (*HISTORIES, "train/loss", "val/loss", "test/loss", "learning_rate", "time/train_seconds")


def quantity(name: str) -> Quantity:
    """Return a named quantity; any other name is a logged metric's."""
    text = percent if "accuracy" in name or "top1" in name else decimal
    return QUANTITIES.get(name) or Quantity(name, name, text=text, timed=name.startswith(TIMED))
