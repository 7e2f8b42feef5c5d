"""Muon (Jordan et al. 2024) for the convolutions that mix channels, AdamW for all other parameters.

Muon makes the momentum orthogonal before a step, so that all directions of a matrix learn at the same rate. Its steps
are as large as AdamW's usual steps (Liu et al. 2025, section 2.2), so learning rates and weight decays carry over.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from effv2.core.internals import copy_all, lerp_all

NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315  # coefficients of an iteration that moves singular values near 1
ITERATIONS = 5
STEP_SIZE = 0.2  # root mean square of AdamW's steps, divided by the learning rate
BETAS = 0.9, 0.99  # of AdamW


class Muon(AdamW):
    """Takes parameter groups as AdamW does, each with `lr` and `weight_decay`. `momentum` is Nesterov's."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, momentum: float) -> None:
        super().__init__(groups, lr=lr, betas=BETAS, fused=True)
        self._momentum = momentum

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make a step. Muon sets the gradients that it used to None, so that AdamW skips them."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None and _mixes_channels(parameter):
                    alike[parameter.shape].append(parameter)
            for parameters in alike.values():
                self._step_of_equal_shapes(parameters, group["lr"], group["weight_decay"])
        loss: float | None = super().step(closure)
        return loss

    def _step_of_equal_shapes(self, parameters: list[Tensor], rate: float, weight_decay: float) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        averages = []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:  # AdamW, when it loads a state, expects a step in it
                state |= {"step": torch.zeros(()), "momentum_buffer": torch.zeros_like(parameter)}
            averages.append(state["momentum_buffer"])
            parameter.grad = None
        lerp_all(averages, gradients, 1 - self._momentum)
        ahead = torch.stack(gradients).lerp_(torch.stack(averages), self._momentum)
        step = orthogonal(ahead.flatten(2)).view_as(ahead)
        longest = max(len(parameters[0]), parameters[0][0].numel())
        stepped = (
            torch.stack(parameters).mul_(1 - rate * weight_decay).sub_(step, alpha=rate * STEP_SIZE * longest**0.5)
        )
        copy_all(parameters, list(stepped))


def _mixes_channels(parameter: Tensor) -> bool:
    """Say whether it is the kernel of a convolution that mixes channels, and not that of the stem, which has three."""
    return parameter.ndim == 4 and parameter.shape[1] > 3


def orthogonal(matrices: Tensor) -> Tensor:
    """Return matrices (N, rows, columns) with the same singular vectors and values near 1, on a GPU in bfloat16."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    found: Tensor = x.mT if tall else x
    return found.to(matrices.dtype)
