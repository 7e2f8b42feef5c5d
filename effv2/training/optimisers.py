"""Optimisers by name: each a registered function of the parameter groups. All take their step in one fused kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from effv2.config.registry import OPTIMISERS
from effv2.config.schema import OptimiserConfig

if TYPE_CHECKING:
    from torch.optim import Optimizer

Groups = list[dict[str, Any]]


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

    nesterov = config.momentum > 0
    return SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=True)
