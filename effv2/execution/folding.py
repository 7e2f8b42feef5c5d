"""Batch norm folded into the convolution before it: exact up to rounding, for evaluation alone.

In eval mode batch norm is an affine map a channel, so its factors go into the kernels and its offset into the bias.
Rates of channels-last float32 evaluation on two cores, batch 8: see benchmarks/pretrained.md.
"""

from __future__ import annotations

import copy
from typing import TypeVar, cast

from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from effv2.execution import fast_paths

Module = TypeVar("Module", bound=nn.Module)


def fold_batch_norm(model: nn.Module) -> None:
    """Fold every batch norm that directly follows a convolution, in place; `model` must be in eval mode.

    A symbolic trace tells what follows what; a network that can't be traced, or whose modules are used several times,
    is left as it is. State dict and training are those of another network afterwards.
    """
    try:
        graph = _Tracer().trace(model)
    except Exception:
        return
    modules = dict(model.named_modules())
    calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        conv, norm = modules[str(before.target)], modules[str(node.target)]
        once = calls.count(str(before.target)) == calls.count(str(node.target)) == 1
        if once and isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats:
            model.set_submodule(str(before.target), _folded(conv, norm))
            model.set_submodule(str(node.target), nn.Identity())


def sharing_copy(module: Module) -> Module:
    """Return a copy whose parameters and buffers are the very tensors of `module`."""
    return copy.deepcopy(module, {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]})


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    folded = sharing_copy(conv)
    statistics = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var), norm.eps
    folded.weight, folded.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics, norm.weight, norm.bias)
    return folded


class _Tracer(fx.Tracer):
    """Takes layers on a fast path as torch's own: as they are."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m).__module__ == fast_paths.__name__ or super().is_leaf_module(m, module_qualified_name)
