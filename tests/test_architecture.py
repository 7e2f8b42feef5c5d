"""Stage tables: their notation, their functions, and the network that torchvision builds from them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models import efficientnet, efficientnet_v2_s

from effv2.architecture import (
    EFFICIENTNET_V2_S,
    VARIANTS,
    Block,
    Stage,
    Table,
    build_model,
    count_gflops,
    count_parameters,
    halve_layers,
    parse_table,
    replace_blocks,
    scale_depth,
    scale_width,
)

PUBLISHED = {
    "default": "F 1 3 1 24 24 2 / F 4 3 2 24 48 4 / F 4 3 2 48 64 4"
    " / M 4 3 2 64 128 6 / M 6 3 1 128 160 9 / M 6 3 2 160 256 15",
    "mbconv_only": "M 1 3 1 24 24 2 / M 4 3 2 24 48 4 / M 4 3 2 48 64 4"
    " / M 4 3 2 64 128 6 / M 6 3 1 128 160 9 / M 6 3 2 160 256 15",
    "fused_only": "F 1 3 1 24 24 2 / F 4 3 2 24 48 4 / F 4 3 2 48 64 4"
    " / F 4 3 2 64 128 6 / F 6 3 1 128 160 9 / F 6 3 2 160 256 15",
    "half_layers": "F 1 3 1 24 24 1 / F 4 3 2 24 48 2 / F 4 3 2 48 64 2"
    " / M 4 3 2 64 128 3 / M 6 3 1 128 160 4 / M 6 3 2 160 256 7",
    "drop_one": "F 1 3 1 24 48 2 / F 4 3 2 48 64 4 / M 4 3 2 64 128 6 / M 6 3 2 128 256 15",
}


@st.composite
def tables(draw: st.DrawFn) -> Table:
    widths = draw(st.lists(st.integers(1, 40).map(lambda n: 8 * n), min_size=2, max_size=6))
    stages = []
    for before, after in pairwise(widths):
        block: Block = draw(st.sampled_from(("F", "M")))
        ratio = draw(st.sampled_from((1.0, 1.5, 4.0, 6.0)))
        kernel, stride = draw(st.sampled_from((1, 3, 5))), draw(st.sampled_from((1, 2)))
        squeeze = block == "F" or draw(st.booleans())
        stages.append(Stage(block, ratio, kernel, stride, before, after, draw(st.integers(1, 20)), squeeze))
    return Table(tuple(stages))


@given(tables())
def test_notation_is_lossless(table: Table) -> None:
    assert parse_table(str(table)) == table


@given(tables())
def test_table_functions_change_only_what_they_name(table: Table) -> None:
    assert replace_blocks(replace_blocks(table, "M"), "F") == replace_blocks(table, "F")
    assert scale_width(scale_depth(table, 1), 1) == table
    assert [s.layers for s in halve_layers(table).stages] == [max(1, s.layers // 2) for s in table.stages]
    for scaled in (scale_depth(table, 0.1), scale_width(table, 0.5), halve_layers(table)):
        assert parse_table(str(scaled)) == scaled  # its stages fit together, within the bounds


@given(tables(), st.floats(0.05, 3))
def test_multipliers_are_torchvisions(table: Table, multiplier: float) -> None:
    deep, wide = scale_depth(table, multiplier), scale_width(table, multiplier)
    for stage, deeper, wider in zip(table.stages, deep.stages, wide.stages, strict=True):
        depth = efficientnet.MBConvConfig.adjust_depth(stage.layers, multiplier)
        assert deeper.layers == (depth if stage.block == "M" else stage.layers)
        assert wider.out_channels == efficientnet.MBConvConfig.adjust_channels(stage.out_channels, multiplier)


@pytest.mark.parametrize(("name", "text"), PUBLISHED.items())
def test_published_variants(name: str, text: str) -> None:
    assert str(VARIANTS[name]) == text


@pytest.mark.parametrize("size", ["s", "m", "l"])
def test_tables_are_torchvisions(size: str) -> None:
    stages, last = efficientnet._efficientnet_conf(f"efficientnet_v2_{size}")
    table = EFFICIENTNET_V2_S if size == "s" else VARIANTS[f"efficientnet_v2_{size}"]
    assert last == table.last_channels
    ours = [(s.expand_ratio, s.kernel, s.stride, s.in_channels, s.out_channels, s.layers) for s in table.stages]
    fields = ("expand_ratio", "kernel", "stride", "input_channels", "out_channels", "num_layers")
    assert ours == [tuple(getattr(stage, field) for field in fields) for stage in stages]
    assert [s.block for s in table.stages] == ["F" if "Fused" in type(s).__name__ else "M" for s in stages]


def test_default_takes_torchvisions_weights_and_gives_its_outputs() -> None:
    torch.manual_seed(0)
    theirs = efficientnet_v2_s().eval()
    ours = build_model(VARIANTS["default"], 1000).eval()
    ours.load_state_dict(theirs.state_dict())
    assert count_parameters(ours) == 21_458_488
    images = torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(ours(images), theirs(images))


def test_gflops_are_those_torchvision_publishes() -> None:
    published = efficientnet.EfficientNet_V2_S_Weights.IMAGENET1K_V1.meta["_ops"]
    assert count_gflops(VARIANTS["default"], 1000, 384) == pytest.approx(published, abs=5e-4)


@settings(max_examples=5)
@given(st.integers(8, 40))
def test_without_squeeze_excitation(size: int) -> None:
    model = build_model(parse_table("F 1 3 1 8 8 1 / M 4 3 2 8 16 2 noSE"), 3).eval()
    assert not any(isinstance(module, efficientnet.SqueezeExcitation) for module in model.modules())
    assert model(torch.rand(2, 3, size, size)).shape == (2, 3)


def test_zero_init_residual_begins_with_blocks_that_change_nothing() -> None:
    table = parse_table("F 1 3 1 8 8 2 / F 4 3 2 8 16 2 / M 4 3 2 16 24 3")
    usual, zeroed = (_seeded(table, zero_init_residual) for zero_init_residual in (False, True))
    blocks = [each for each in zeroed.modules() if getattr(each, "use_res_connect", False)]
    for block in blocks:
        (width, *_) = [module.in_channels for module in block.modules() if isinstance(module, torch.nn.Conv2d)]
        images = torch.rand(2, width, 8, 8)
        assert torch.equal(block(images), images)
    others = zip(usual.parameters(), zeroed.parameters(), strict=True)
    assert sum(not torch.equal(one, other) for one, other in others) == len(blocks) == 2 + 1 + 2


def _seeded(table: Table, zero_init_residual: bool) -> efficientnet.EfficientNet:
    torch.manual_seed(0)
    return build_model(table, 5, stochastic_depth=0, zero_init_residual=zero_init_residual)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("F 1 3 1 24 24", "is not a stage"),
        ("X 1 3 1 24 24 2", "is not a stage"),
        ("F 1 3 1 24 24 2 noSE", "is not a stage"),
        ("F 1 three 1 24 24 2", "is not a stage; write .* in numbers"),
        ("F 1 4 1 24 24 2", "out of bounds"),
        ("F 1 3 1 24 24 0", "out of bounds"),
        ("F 1 3 1 24 24 2 / M 4 3 2 32 64 1", "gives 24 channels"),
    ],
)
def test_wrong_tables_are_explained(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_table(text)
