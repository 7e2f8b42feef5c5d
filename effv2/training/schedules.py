"""Learning rates: each a function of the step, except plateau, which follows a metric.

| name | rate after the warm-up |
|---|---|
| none | constant |
| plateau | constant until the watched accuracy stalls, then times plateau_factor (torch's ReduceLROnPlateau) |
| cosine | half a cosine down to 0 (Loshchilov & Hutter 2017) |
| onecycle | 30 % of the steps up from 1/25, then a cosine down to 1/250,000 (Smith & Topin 2018, torch's defaults) |
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from effv2.config.registry import SCHEDULES
from effv2.config.schema import ScheduleConfig

if TYPE_CHECKING:
    from torch.optim import Optimizer


def rate_factor(config: ScheduleConfig, step: int, steps_per_epoch: int) -> float:
    """Return what the peak rate is multiplied by at `step` (from 0), plateau's own reductions apart."""
    factor: float = SCHEDULES[config.name](config, step, steps_per_epoch)
    return factor


@SCHEDULES.register("none")
@SCHEDULES.register("plateau")
def _constant(config: ScheduleConfig, step: int, steps_per_epoch: int) -> float:
    warmup = config.warmup_epochs * steps_per_epoch
    return (step + 1) / warmup if step < warmup else 1.0


@SCHEDULES.register("cosine")
def _half_cosine(config: ScheduleConfig, step: int, steps_per_epoch: int) -> float:
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return (step + 1) / warmup
    return _cosine(1.0, 0.0, (step - warmup) / max(1, config.epochs * steps_per_epoch - warmup))


@SCHEDULES.register("onecycle")
def _one_cycle(config: ScheduleConfig, step: int, steps_per_epoch: int) -> float:
    total = config.epochs * steps_per_epoch
    peak = 0.3 * total - 1
    if step <= peak:
        return _cosine(1 / 25, 1.0, step / peak)
    return _cosine(1.0, 1 / 250_000, (step - peak) / max(1, total - 1 - peak))


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


class Schedule:
    """Sets the optimiser's rate before each step and lets plateau look at each epoch."""

    def __init__(self, config: ScheduleConfig, optimiser: Optimizer, steps_per_epoch: int) -> None:
        self._config, self._optimiser, self._steps_per_epoch = config, optimiser, steps_per_epoch
        self._peak = [float(group["lr"]) for group in optimiser.param_groups]
        self._plateau = None
        if config.name == "plateau":
            from torch.optim.lr_scheduler import ReduceLROnPlateau

            self._plateau = ReduceLROnPlateau(
                optimiser, mode="max", factor=config.plateau_factor, patience=config.plateau_patience
            )

    @property
    def rate(self) -> float:
        """Return the current learning rate."""
        return float(self._optimiser.param_groups[0]["lr"])

    def before_step(self, step: int) -> None:
        """Set the rate of `step`, counted from 0 over the whole training."""
        if self._plateau and step >= self._config.warmup_epochs * self._steps_per_epoch:
            return  # from here on the rate is plateau's
        factor = rate_factor(self._config, step, self._steps_per_epoch)
        for group, peak in zip(self._optimiser.param_groups, self._peak, strict=True):
            group["lr"] = peak * factor

    def after_epoch(self, epoch: int, accuracy: float) -> None:
        """Tell plateau the watched accuracy of `epoch`, counted from 1."""
        if self._plateau and epoch > self._config.warmup_epochs:
            self._plateau.step(accuracy)

    def state_dict(self) -> dict[str, Any]:
        """Return what a continued run needs (the rate itself is the optimiser's)."""
        return self._plateau.state_dict() if self._plateau else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what state_dict returned."""
        if self._plateau:
            self._plateau.load_state_dict(state)
