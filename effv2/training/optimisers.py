"""Optimisers by name: each a registered function of (parameter groups, config). A new one is one such function here.

All take their step in one fused kernel. The command's help imports this module, so torch is imported inside.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from effv2.config.registry import OPTIMISERS

if TYPE_CHECKING:
    from torch.nn import Module
    from torch.optim import Optimizer

    from effv2.config.schema import OptimiserConfig

Groups = list[dict[str, Any]]


def make_optimiser(config: OptimiserConfig, model: Module) -> Optimizer:
    """Build the optimiser. Norms and biases are not decayed."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    decays = (matrices, config.weight_decay), (vectors, 0.0)
    groups = [{"params": parameters, "weight_decay": decay} for parameters, decay in decays]
    optimiser: Optimizer = OPTIMISERS[config.name](groups, config)
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

    nesterov = config.momentum > 0
    return SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=True)
