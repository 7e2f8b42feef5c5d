"""Fast paths equal torch's convolutions, forward and backward; `auto` is resolved by rule."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision import models
from torchvision.ops import SqueezeExcitation

from effv2.config import TrainConfig
from effv2.errors import InputError
from effv2.execution.device import resolve, resolve_study
from effv2.execution.fast_paths import use_fast_paths
from effv2.execution.folding import fold_batch_norm

LAYERS: dict[str, Callable[[bool], nn.Module]] = {
    "pointwise": lambda bias: nn.Conv2d(16, 24, 1, bias=bias),
    "depthwise": lambda bias: nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=bias),
    "depthwise, stride 2": lambda bias: nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=16, bias=bias),
    "depthwise, uneven stride": lambda bias: nn.Conv2d(16, 16, 3, stride=(1, 2), padding=1, groups=16, bias=bias),
    "squeeze-excitation": lambda _: SqueezeExcitation(16, 4, activation=nn.SiLU),
}


@settings(max_examples=120, deadline=None)
@given(
    kind=st.sampled_from(sorted(LAYERS)),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)) | st.just((2, 2)),
    bias=st.booleans(),
    channels_last=st.booleans(),
    bf16=st.booleans(),
)
def test_fast_paths_equal_torchs_layers(
    kind: str, size: tuple[int, int], bias: bool, channels_last: bool, bf16: bool
) -> None:
    torch.manual_seed(0)
    plain = LAYERS[kind](bias)
    fast = copy.deepcopy(plain)
    use_fast_paths(fast)
    assert type(fast) is not type(plain) and fast.state_dict().keys() == plain.state_dict().keys()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    results = []
    for layer in (plain, fast):
        images = torch.randn(5, 16, *size, generator=torch.Generator().manual_seed(1))
        images = images.contiguous(memory_format=memory_format).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = layer(images)
            with torch.no_grad():
                assert torch.allclose(layer(images), output, rtol=1e-5, atol=1e-5 if not bf16 else 2e-2)
        (output.float() * torch.arange(output.numel()).view(output.shape).cos()).sum().backward()
        results.append([output, images.grad, *(parameter.grad for parameter in layer.parameters())])
    rtol, atol = (0.02, 0.1) if bf16 else (1e-4, 1e-4)
    for expected, found in zip(*results, strict=True):
        assert expected.dtype == found.dtype and torch.allclose(expected, found, rtol=rtol, atol=atol)


def test_squeeze_excitation_of_other_functions_is_left_alone() -> None:
    layer = SqueezeExcitation(16, 4)
    use_fast_paths(layer)
    assert type(layer) is SqueezeExcitation


def test_the_allocator_is_left_alone_where_the_user_says_so() -> None:
    script = "import os; from effv2.execution.allocator import tune_allocator; tune_allocator()\n"
    script += "print(os.environ.get('THP_MEM_ALLOC_ENABLE'))"
    for setting, expected in (("system", "None"), ("", "1")):
        environment = os.environ | {"EFFV2_ALLOCATOR": setting}
        environment.pop("THP_MEM_ALLOC_ENABLE", None)
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == (expected if sys.platform == "linux" else "None")


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 1, stride=2),
        nn.Conv2d(4, 4, 1, groups=4),
        nn.Conv2d(4, 4, 1, padding=1),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Conv2d(4, 8, 3, padding=1, groups=4),
        nn.Conv2d(4, 4, 5, padding=2, groups=4),
        nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode="reflect"),
    ],
    ids=str,
)
def test_other_convolutions_are_left_alone(conv: nn.Conv2d) -> None:
    use_fast_paths(conv)
    assert type(conv) is nn.Conv2d


def test_device_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(InputError, match=r"--device cuda: not available.*cpu"):
        resolve(TrainConfig.model_validate({"execution": {"device": "cuda"}}))


def test_resolving_is_repeatable_and_leaves_no_auto() -> None:
    resolved = resolve(TrainConfig())
    assert "auto" not in (resolved.execution.device, resolved.execution.precision)
    assert resolve(resolved) == resolved == resolve(TrainConfig())


def test_arms_of_a_study_share_the_precision() -> None:
    sizes = [TrainConfig.model_validate({"data": {"image_size": size}}) for size in (32, 128)]
    pinned = TrainConfig.model_validate({"execution": {"precision": "bf16"}})
    first, second, third = resolve_study([*sizes, pinned])
    assert first.execution.precision == second.execution.precision == resolve(sizes[0]).execution.precision
    assert third.execution.precision == "bf16"


def counted(module: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(each, kind) for each in module.modules())


@pytest.mark.parametrize(
    ("name", "left"),
    [("efficientnet_v2_s", 0), ("resnet50", 0), ("mobilenet_v3_small", 0), ("densenet121", 62), ("swin_t", 0)],
)
def test_folded_batch_norm_changes_rounding_alone(name: str, left: int) -> None:
    """DenseNet's norms before a convolution stay; what of a network can be folded is."""
    generator = torch.manual_seed(0)
    network = models.get_model(name, weights=None).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn(module.num_features, generator=generator) / 10
            module.running_var = torch.rand(module.num_features, generator=generator) + 0.5
            nn.init.uniform_(module.weight, 0.5, 1.5, generator)
            nn.init.normal_(module.bias, 0, 0.1, generator)
    images = torch.rand(2, 3, 64, 64, generator=generator)
    with torch.inference_mode():
        before = network(images)
        fold_batch_norm(network)
        after = network(images)
    assert counted(network, nn.BatchNorm2d) == left
    assert torch.allclose(before, after, atol=1e-5 * float(before.abs().max()))


def test_a_batch_norm_whose_convolution_serves_others_too_is_left_alone() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            maps = self.conv(images)
            output: torch.Tensor = self.norm(maps) + maps
            return output

    class Untraceable(nn.Sequential):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            for module in self if images.sum() > 0 else ():
                images = module(images)
            return images

    for network in (Shared().eval(), Untraceable(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()):
        fold_batch_norm(network)
        assert counted(network, nn.BatchNorm2d) == 1
