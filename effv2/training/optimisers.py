"""Optimisers and learning rates by name: each one registered function here, and nothing else.

An optimiser is made from (parameter groups, config) and makes its step in one fused kernel. A schedule maps (config,
step from 0, steps per epoch) to the factor of the peak rate. The commands' help imports this module, so torch is
imported inside functions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from effv2.config.schema import OPTIMISERS, SCHEDULES, OptimiserConfig, ScheduleConfig

if TYPE_CHECKING:
    from torch.nn import Module
    from torch.optim import Optimizer


Groups = list[dict[str, Any]]


def make_optimiser(config: OptimiserConfig, model: Module) -> Optimizer:
    """Build the optimiser. Norms and biases are not decayed. The group with the highest rate is first: it is logged.

    The head has `head_lr_factor` times the rate. Each part of the body has `layer_decay` times the rate of the next
    part: the last part has the factor once, and the stem has it as often as there are parts.
    """
    parts = {name: re.match(r"features\.(\d+)\.", name) for name, _ in model.named_parameters()}
    last = max((int(part[1]) for part in parts.values() if part), default=0)

    def rate(name: str) -> float:
        part = parts[name]
        return config.lr * (config.layer_decay ** (last + 1 - int(part[1])) if part else config.head_lr_factor)

    named = sorted(model.named_parameters(), key=lambda each: -rate(each[0]))
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for decays in (True, False):
        for name, parameter in named:
            if (parameter.ndim > 1) == decays:
                new = {"params": [], "lr": rate(name), "weight_decay": config.weight_decay if decays else 0.0}
                groups.setdefault((decays, rate(name)), new)["params"].append(parameter)
    optimiser: Optimizer = OPTIMISERS[config.name](list(groups.values()), config)
    return optimiser


@OPTIMISERS.register("adam")
def _adam(groups: Groups, config: OptimiserConfig) -> Optimizer:
    from torch.optim import Adam

    return Adam(groups, lr=config.lr, fused=True)


@OPTIMISERS.register("adamw")
def _adamw(groups: Groups, config: OptimiserConfig) -> Optimizer:
    from torch.optim import AdamW

    return AdamW(groups, lr=config.lr, fused=True)


@OPTIMISERS.register("sgd")
def _sgd(groups: Groups, config: OptimiserConfig) -> Optimizer:
    from torch.optim import SGD

    return SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0, fused=True)


@OPTIMISERS.register("muon")
def _muon(groups: Groups, config: OptimiserConfig) -> Optimizer:
    from effv2.training.muon import Muon

    return Muon(groups, config.lr, config.momentum)


def after_warmup(factor: Callable[[int, int], float]) -> Callable[[ScheduleConfig, int, int], float]:
    """Put the linear warm-up before `shape`, a function of the step after the warm-up and the number of such steps."""

    def with_warmup(config: ScheduleConfig, step: int, steps_per_epoch: int) -> float:
        warmup = config.warmup_epochs * steps_per_epoch
        if step < warmup:
            return (step + 1) / warmup
        return factor(step - warmup, config.epochs * steps_per_epoch - warmup)

    return with_warmup


@SCHEDULES.register("plateau")  # Schedule lowers it when the watched accuracy stalls
@SCHEDULES.register("none")
@after_warmup
def _constant(_step: int, _steps: int) -> float:
    return 1.0


@SCHEDULES.register("cosine")  # half a period of a cosine, down to 0 (Loshchilov & Hutter 2017)
@after_warmup
def _half_cosine(step: int, steps: int) -> float:
    return _cosine(1.0, 0.0, step / max(1, steps))


@SCHEDULES.register("onecycle")  # rises from 1/25 for 30 % of the steps (Smith & Topin 2018, torch's defaults)
def _one_cycle(config: ScheduleConfig, step: int, steps_per_epoch: int) -> float:
    total = config.epochs * steps_per_epoch
    peak = 0.3 * total - 1
    if step <= peak:
        return _cosine(1 / 25, 1.0, step / peak)
    return _cosine(1.0, 1 / 250_000, (step - peak) / max(1, total - 1 - peak))


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


class Schedule:
    """Sets the optimiser's rate before each step, and reports each epoch to plateau."""

    def __init__(self, config: ScheduleConfig, optimiser: Optimizer, steps_per_epoch: int) -> None:
        from torch.optim.lr_scheduler import ReduceLROnPlateau

        self._config, self._optimiser, self._steps_per_epoch = config, optimiser, steps_per_epoch
        self._factor, self._peak = SCHEDULES[config.name], [float(group["lr"]) for group in optimiser.param_groups]
        plateau = ReduceLROnPlateau(optimiser, "max", factor=config.plateau_factor, patience=config.plateau_patience)
        self._plateau = plateau if config.name == "plateau" else None

    @property
    def rate(self) -> float:
        """Return the current learning rate."""
        return float(self._optimiser.param_groups[0]["lr"])

    def before_step(self, step: int) -> None:
        """Set the rate of `step`, counted from 0 over the whole training."""
        if self._plateau and step >= self._config.warmup_epochs * self._steps_per_epoch:
            return  # from here on, plateau sets the rate
        factor = self._factor(self._config, step, self._steps_per_epoch)
        for group, peak in zip(self._optimiser.param_groups, self._peak, strict=True):
            group["lr"] = peak * factor

    def after_epoch(self, epoch: int, accuracy: float) -> None:
        """Report the watched accuracy of `epoch`, counted from 1, to plateau."""
        if self._plateau and epoch > self._config.warmup_epochs:
            self._plateau.step(accuracy)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs (the optimiser holds the rate)."""
        return self._plateau.state_dict() if self._plateau else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of state_dict."""
        if self._plateau:
            self._plateau.load_state_dict(state)
