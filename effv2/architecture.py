"""EfficientNetV2 as data: stage tables, functions from table to table, and the network of a table.

A table is written as in the paper (Tan & Le 2021, table 4), with slashes between stages:
`block expansion kernel stride in_channels out_channels layers`. The block is F (Fused-MBConv) or M (MBConv).
An M stage that ends in `noSE` has no squeeze-and-excitation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, cast

if TYPE_CHECKING:
    from torch import nn
    from torchvision.models import EfficientNet

Block = Literal["F", "M"]


@dataclass(frozen=True)
class Stage:
    """One row: `layers` blocks. The first block has the stride and changes the channels."""

    block: Block
    expand_ratio: float
    kernel: int
    stride: int
    in_channels: int
    out_channels: int
    layers: int
    squeeze_excitation: bool = True

    def __str__(self) -> str:
        """Return the row in the notation of this module."""
        block, ratio, *numbers, squeeze_excitation = astuple(self)
        return " ".join([block, f"{ratio:g}", *map(str, numbers), *([] if squeeze_excitation else ["noSE"])])


@dataclass(frozen=True)
class Table:
    """The stages between the stem (its width is the first stage's input) and the head's `last_channels`."""

    stages: tuple[Stage, ...]
    last_channels: int = 1280

    def __str__(self) -> str:
        """Return the table in the notation of this module."""
        return " / ".join(map(str, self.stages))


def parse_table(text: str) -> Table:
    """Read a table in the notation of this module; ValueError says which row is wrong and why."""
    stages = tuple(map(_parse_stage, text.split("/")))
    for before, after in pairwise(stages):
        if before.out_channels != after.in_channels:
            gives, takes = f"{str(before)!r} gives {before.out_channels}", f"{str(after)!r} takes {after.in_channels}"
            raise ValueError(f"the row {gives} channels, but the next row {takes}; make the two numbers equal")
    return Table(stages)


def _parse_stage(row: str) -> Stage:
    row = " ".join(row.split())
    found = re.fullmatch(r"([FM]) (\d+(?:\.\d+)?)((?: -?\d+){5})( noSE)?", row)
    if not found or (found[1] == "F" and found[4]):
        form = "F|M expansion kernel stride in_channels out_channels layers [noSE]"
        raise ValueError(f"the row {row!r} is not a stage; write `{form}`, in numbers")
    block, ratio, numbers = cast(Block, found[1]), float(found[2]), [int(word) for word in found[3].split()]
    kernel, stride, in_channels, out_channels, layers = numbers
    if not 1 <= ratio <= 64 or kernel % 2 == 0 or stride not in (1, 2) or not all(0 < n < 10_000 for n in numbers):
        bounds = "expansion is 1 to 64, the kernel odd, the stride 1 or 2, channels and layers are positive"
        raise ValueError(f"the row {row!r} is out of bounds; {bounds}")
    if in_channels % 8 or out_channels % 8:  # torchvision would round them
        raise ValueError(f"the row {row!r} has channels that are not multiples of 8, which the network needs")
    return Stage(block, ratio, kernel, stride, in_channels, out_channels, layers, not found[4])


def _each(table: Table, change: Callable[[Stage], Stage]) -> Table:
    return replace(table, stages=tuple(map(change, table.stages)))


def replace_blocks(table: Table, block: Block) -> Table:
    """Give every stage one block type. A Fused-MBConv has no squeeze-and-excitation."""
    return _each(table, lambda s: replace(s, block=block, squeeze_excitation=s.squeeze_excitation or block == "F"))


def halve_layers(table: Table) -> Table:
    """Halve the layers of every stage, rounded down, to at least one."""
    return _each(table, lambda s: replace(s, layers=max(1, s.layers // 2)))


def scale_depth(table: Table, multiplier: float) -> Table:
    """Multiply the layers of the MBConv stages, rounded up, as torchvision and the post's hyper-parameter check do."""
    return _each(table, lambda s: replace(s, layers=math.ceil(s.layers * multiplier)) if s.block == "M" else s)


def scale_width(table: Table, multiplier: float) -> Table:
    """Multiply the channels of every stage, not of the head, to multiples of 8 as in the EfficientNet paper."""

    def width(channels: int) -> int:
        scaled = channels * multiplier
        rounded = max(8, int(scaled + 4) // 8 * 8)
        return rounded + 8 if rounded < 0.9 * scaled else rounded  # never more than a tenth lower

    return _each(table, lambda s: replace(s, in_channels=width(s.in_channels), out_channels=width(s.out_channels)))


EFFICIENTNET_V2_S = parse_table(
    "F 1 3 1 24 24 2 / F 4 3 2 24 48 4 / F 4 3 2 48 64 4 / M 4 3 2 64 128 6 / M 6 3 1 128 160 9 / M 6 3 2 160 256 15"
)

# The five variants of the published ablation. The others are compared with the first.
PUBLISHED_VARIANTS: dict[str, Table] = {
    "default": EFFICIENTNET_V2_S,
    "mbconv_only": replace_blocks(EFFICIENTNET_V2_S, "M"),
    "fused_only": replace_blocks(EFFICIENTNET_V2_S, "F"),
    "half_layers": halve_layers(EFFICIENTNET_V2_S),
    "drop_one": parse_table("F 1 3 1 24 48 2 / F 4 3 2 48 64 4 / M 4 3 2 64 128 6 / M 6 3 2 128 256 15"),
}

# All named tables. A new variant is one entry here and nothing else.
VARIANTS: dict[str, Table] = PUBLISHED_VARIANTS | {
    "efficientnet_v2_m": parse_table(
        "F 1 3 1 24 24 3 / F 4 3 2 24 48 5 / F 4 3 2 48 80 5"
        " / M 4 3 2 80 160 7 / M 6 3 1 160 176 14 / M 6 3 2 176 304 18 / M 6 3 1 304 512 5"
    ),
    "efficientnet_v2_l": parse_table(
        "F 1 3 1 32 32 4 / F 4 3 2 32 64 7 / F 4 3 2 64 96 7"
        " / M 4 3 2 96 192 10 / M 6 3 1 192 224 19 / M 6 3 2 224 384 25 / M 6 3 1 384 640 7"
    ),
}
# torchvision's names of the networks of these tables, which have published weights.
NETWORKS = {"default": "efficientnet_v2_s"} | {name: name for name in ("efficientnet_v2_m", "efficientnet_v2_l")}


def build_model(
    table: Table,
    num_classes: int,
    dropout: float = 0.2,
    stochastic_depth: float = 0.2,
    zero_init_residual: bool = False,
) -> EfficientNet:
    """Build torchvision's EfficientNetV2 from `table`: images (N, 3, H, W) to logits (N, num_classes).

    `dropout` applies before the classifier. Stochastic depth rises linearly from 0 at the first of n blocks to
    (n - 1) / n of `stochastic_depth` at the last. Parameters are initialised from torch's global generator. With
    `zero_init_residual` the last batch norm of every residual branch begins with a weight of zero, so that each of
    these blocks begins as the identity (Goyal et al. 2017, section 5.1). Nothing else changes.
    """
    from torch import nn
    from torchvision.models import EfficientNet
    from torchvision.models.efficientnet import FusedMBConv, MBConv

    model = EfficientNet(
        [_block_config(stage) for stage in table.stages],
        dropout=dropout,
        stochastic_depth_prob=stochastic_depth,
        num_classes=num_classes,
        norm_layer=partial(nn.BatchNorm2d, eps=1e-3),
        last_channel=table.last_channels,
    )
    if zero_init_residual:
        for block in model.modules():
            if isinstance(block, (FusedMBConv, MBConv)) and block.use_res_connect:
                nn.init.zeros_(block.block[-1][1].weight)
    return model


def _block_config(stage: Stage) -> object:
    from torch import nn
    from torchvision.models import efficientnet

    shape = astuple(stage)[1:-1]
    if stage.block == "F":
        return efficientnet.FusedMBConvConfig(*shape)
    if stage.squeeze_excitation:
        return efficientnet.MBConvConfig(*shape)
    without = partial(efficientnet.MBConv, se_layer=lambda *_, **__: nn.Identity())
    return efficientnet.MBConvConfig(*shape, block=without)


def count_parameters(model: nn.Module) -> int:
    """Count the trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_gflops(table: Table, num_classes: int, image_size: int) -> float:
    """Count the 10^9 multiply-accumulates of one image, without element-wise work, as the paper and torchvision do."""
    import torch

    with torch.device("meta"):
        return gflops_of(build_model(table, num_classes).eval(), image_size)


def gflops_of(model: nn.Module, image_size: int) -> float:
    """Count as count_gflops does, for any network in eval mode, on torch's meta device, which computes nothing."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    shapes = {name: each.to("meta") for name, each in [*model.named_parameters(), *model.named_buffers()]}
    image = torch.empty(1, 3, image_size, image_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        torch.func.functional_call(model, shapes, image)
    return float(counter.get_total_flops()) / 2 / 1e9
