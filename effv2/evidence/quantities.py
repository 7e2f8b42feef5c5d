"""What of a run a claim or a table can be about: any logged metric, or a figure derived from its epochs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from effv2.evidence.figures import Curve
from effv2.evidence.statistics import Interval
from effv2.tracking.read import RunRecord

TRAIN, TEST, VALIDATION = "train/accuracy", "test/accuracy", "val/accuracy"
TRAIN_RATE, EVALUATE_RATE = "throughput/train_images_per_second", "throughput/evaluate_images_per_second"
TRAIN_SECONDS, EPOCH_SECONDS = "time/train_seconds", "time/epoch_seconds"
HISTORIES = (TRAIN, TEST, VALIDATION, TRAIN_RATE, EVALUATE_RATE, TRAIN_SECONDS, EPOCH_SECONDS)
PEAK_SHARE = 0.95
LEVEL_EPOCHS = 10  # the last ones, over which a level is averaged
NEAR_LEVEL = 0.02
LARGEST = 1e300  # databases keep infinity as the largest number there is
TIMED = ("rate/", "time/", "inference/", "throughput/")


def percent(value: float) -> str:
    """Write a fraction as a percentage."""
    return f"{100 * value:.2f} %"


def points(value: float) -> str:
    """Write a difference of two fractions in percentage points."""
    return f"{100 * value:+.2f} points"


def whole(value: float) -> str:
    """Write a number without a fraction."""
    return f"{value:,.0f}"


def tenths(value: float) -> str:
    """Write a number to a tenth."""
    return f"{value:,.1f}"


def decimal(value: float) -> str:
    """Write a number to three digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


@dataclass(frozen=True)
class Quantity:
    """A figure of a run: its name in words, how to take it, how to write it.

    A `fixed` one doesn't vary from run to run: one decides. A `timed` one belongs to the machine that it was taken on.
    `least` is the lowest value that it can have.
    """

    words: str
    take: Callable[[RunRecord], float | None]
    text: Callable[[float], str] = decimal
    fixed: bool = False
    timed: bool = False
    least: float = -math.inf

    def value(self, run: RunRecord) -> float | None:
        """Return the figure of a run; None where the run lacks it, or it is no finite number."""
        found = self.take(run)
        return found if found is not None and abs(found) < LARGEST else None

    @property
    def is_accuracy(self) -> bool:
        """Say whether it is a fraction, whose differences are percentage points."""
        return self.text is percent

    @property
    def possible(self) -> Interval:
        """Return where its values can lie, as far as that is known."""
        return Interval(0, 1) if self.is_accuracy else Interval(0 if self.timed else self.least, math.inf)


def epochs_to_peak_share(curve: Curve, share: float = PEAK_SHARE) -> int:
    """Return the first epoch whose accuracy reaches `share` of the highest one."""
    best = max(curve.values())
    return min(epoch for epoch, accuracy in curve.items() if accuracy >= min(best, share * best))


def level(curve: Curve) -> float:
    """Return the mean over the last ten epochs."""
    return statistics.fmean(curve[epoch] for epoch in sorted(curve)[-LEVEL_EPOCHS:])


def epochs_to_level(curve: Curve) -> int:
    """Return the first epoch from which the mean of five epochs stays within two points of the last ten's."""
    epochs = sorted(curve)
    smooth = np.convolve([curve[epoch] for epoch in epochs], np.full(5, 0.2), "valid")
    away = np.flatnonzero(np.abs(smooth - level(curve)) > NEAR_LEVEL)
    return epochs[int(away[-1]) + 1 if len(away) else 0]


def gain_after(curve: Curve, epoch: int = 10) -> float | None:
    """Return by how much the last ten epochs' mean exceeds that of the three around `epoch`; None without those."""
    if not {epoch - 1, epoch, epoch + 1} <= curve.keys():
        return None
    return level(curve) - statistics.fmean(curve[each] for each in (epoch - 1, epoch, epoch + 1))


def _metric(name: str) -> Callable[[RunRecord], float | None]:
    return lambda run: run.metrics.get(name)


def _of(name: str, figure: Callable[[Curve], float | None], epochs: int = 1) -> Callable[[RunRecord], float | None]:
    """Return a figure of a metric's epochs, None where there are fewer of them."""

    def value(run: RunRecord) -> float | None:
        curve = {epoch: value for epoch, value in run.history.get(name, {}).items() if abs(value) < LARGEST}
        return figure(curve) if len(curve) >= epochs else None

    return value


def _median(curve: Curve) -> float:
    return statistics.median(curve.values())


def _milliseconds(run: RunRecord) -> float | None:
    seconds = run.metrics.get("inference/single_image_seconds")
    return None if seconds is None else 1000 * seconds


QUANTITIES: dict[str, Quantity] = {
    "best/test_accuracy": Quantity("test accuracy, best epoch", _metric("best/test_accuracy"), percent),
    "selected/test_accuracy": Quantity("test accuracy, selected epoch", _metric("selected/test_accuracy"), percent),
    "final/test_accuracy": Quantity("test accuracy, last epoch", _metric("final/test_accuracy"), percent),
    "selected/val_accuracy": Quantity("validation accuracy, best epoch", _metric("selected/val_accuracy"), percent),
    "first/test_accuracy": Quantity("test accuracy, first epoch", _of(TEST, lambda c: c[min(c)]), percent),
    "best/train_accuracy": Quantity("train accuracy, best epoch", _of(TRAIN, lambda c: max(c.values())), percent),
    "level/train_accuracy": Quantity("train accuracy, mean of the last ten epochs", _of(TRAIN, level), percent),
    "level/test_accuracy": Quantity("test accuracy, mean of the last ten epochs", _of(TEST, level), percent),
    "gain/test_after_epoch_10": Quantity("gain in test accuracy after epoch 10", _of(TEST, gain_after, 21), points),
    "epochs/to_95_percent": Quantity(
        "epochs to 95 % of peak train accuracy",
        _of(TRAIN, epochs_to_peak_share),
        tenths,
        least=1,
    ),
    "epochs/to_test_level": Quantity(
        "epochs until test accuracy stays at its level",
        _of(TEST, epochs_to_level, 20),
        tenths,
        least=1,
    ),
    "time/total_train_seconds": Quantity("training, s", _metric("time/total_train_seconds"), tenths, timed=True),
    "time/epoch_seconds": Quantity("an epoch, s", _of(EPOCH_SECONDS, _median), decimal, timed=True),
    "rate/train": Quantity("training, images/s", _of(TRAIN_RATE, _median), whole, timed=True),
    "rate/evaluate": Quantity("inference, images/s", _of(EVALUATE_RATE, _median), whole, timed=True),
    "inference/single_image_milliseconds": Quantity(
        "one image, ms", _milliseconds, lambda value: f"{value:.1f}", timed=True
    ),
    "model/parameters": Quantity("parameters", _metric("model/parameters"), whole, fixed=True),
    "model/gflops": Quantity(
        "GFLOPs", _metric("model/gflops"), lambda value: f"{value:.3f}" if value >= 0.01 else f"{value:.2g}", fixed=True
    ),
}


def quantity(name: str) -> Quantity:
    """Return a named quantity; any other name is a logged metric's."""
    text = percent if "accuracy" in name or "top1" in name else decimal
    return QUANTITIES.get(name) or Quantity(name, _metric(name), text, timed=name.startswith(TIMED))
