"""Fast paths and copies for inference equal torch's layers. `auto` is timed once and remembered."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision import models
from torchvision.ops import Conv2dNormActivation, SqueezeExcitation

from effv2.architecture import build_model, parse_table
from effv2.config.schema import TrainConfig
from effv2.core.errors import InputError
from effv2.execution import blocks, norms
from effv2.execution import resolve as resolving
from effv2.execution.device import Execution, fold_batch_norm
from effv2.execution.fast_paths import FEWEST_IMAGES, use_fast_paths
from effv2.execution.resolve import Calibration, check_compiler, remembered, resolve_study
from tests.conftest import tiny_config

LAYERS: dict[str, Callable[[bool], nn.Module]] = {
    "pointwise": lambda bias: nn.Conv2d(16, 24, 1, bias=bias),
    "dense": lambda bias: nn.Conv2d(16, 24, 3, padding=1, bias=bias),
    "dense, stride 2": lambda bias: nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=bias),
    "depthwise": lambda bias: nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=bias),
    "depthwise, stride 2": lambda bias: nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=16, bias=bias),
    "depthwise, uneven stride": lambda bias: nn.Conv2d(16, 16, 3, stride=(1, 2), padding=1, groups=16, bias=bias),
    "squeeze-excitation": lambda _: SqueezeExcitation(16, 4, activation=nn.SiLU),
    "norm": lambda _: Conv2dNormActivation(16, 20, 1, activation_layer=None),  # 20 channels are no multiple of a vector
    "norm, SiLU": lambda _: Conv2dNormActivation(16, 20, 1, activation_layer=nn.SiLU),
}


@settings(max_examples=150)
@given(
    kind=st.sampled_from(sorted(LAYERS)),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)) | st.integers(1, 9).map(lambda side: (side, side)),
    bias=st.booleans(),
    channels_last=st.booleans(),
    bf16=st.booleans(),
    count=st.sampled_from([5, FEWEST_IMAGES]),
)
def test_fast_paths_equal_torchs_layers(
    kind: str, size: tuple[int, int], bias: bool, channels_last: bool, bf16: bool, count: int
) -> None:
    """Torch's layer runs in float32: in bfloat16, its gradients of taps that only meet padding can be garbage.

    On maps that aren't square, outputs can be garbage too. effv2 has no such maps, and leaves them to torch.
    """
    assume(not bf16 or size[0] == size[1])
    torch.manual_seed(0)
    plain = LAYERS[kind](bias)
    fast = copy.deepcopy(plain)
    use_fast_paths(fast)
    assert type(fast) is not type(plain) and fast.state_dict().keys() == plain.state_dict().keys()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    results = []
    for layer, autocast in ((plain, False), (fast, bf16)):
        images = torch.randn(count, 16, *size, generator=torch.Generator().manual_seed(1))
        images = images.contiguous(memory_format=memory_format).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = layer(images)
            with torch.no_grad():
                assert torch.allclose(layer(images), output, rtol=1e-5, atol=1e-5 if not bf16 else 2e-2)
                buffers = [buffer.clone() for buffer in layer.buffers()]
        (output.float() * torch.arange(output.numel()).view(output.shape).cos()).sum().backward()
        results.append([output, images.grad, *(parameter.grad for parameter in layer.parameters()), *buffers])
    # Sums of up to 648 bfloat16 products have an error of 0.04 (standard deviation), or 0.3 % over all of them.
    rtol, atol, share = (0.02, 0.3, 0.01) if bf16 else (1e-4, 1e-4, 1e-4)
    for wanted, got in zip(*results, strict=True):
        expected, found = wanted.float(), got.float()
        assert torch.allclose(expected, found, rtol=rtol, atol=atol)
        assert (expected - found).norm() <= share * expected.norm() + atol
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        assert plain(images).dtype == output.dtype


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("size", "stride"), [(1, 1), (2, 2), (3, 1), (3, 2), (5, 2), (8, 1)])
def test_a_block_equals_its_layers_in_float64(size: int, stride: int, bf16: bool) -> None:
    """Nine images are two groups, whose sums are added up."""
    torch.manual_seed(0)
    network = build_model(parse_table(f"F 1 3 1 8 8 1 / M 4 3 {stride} 8 24 1"), 10)
    (plain,) = (module.block for module in network.modules() if type(module) is models.efficientnet.MBConv)
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.5)
    fast, exact, results = copy.deepcopy(plain), plain.double(), []
    use_fast_paths(fast)
    assert type(fast) is blocks.MBConvBlock
    images = torch.randn(9, 8, size, size, dtype=torch.float64)
    for block, inputs in ((fast, images.float().requires_grad_()), (exact, images.requires_grad_())):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16 and block is fast):
            output = block.train()(inputs.contiguous(memory_format=torch.channels_last))
        (output.double() * torch.arange(output.numel()).view(output.shape).cos()).sum().backward()
        results.append([output, inputs.grad, *(each.grad for each in block.parameters()), *block.buffers()])
    for found, expected in zip(*results, strict=True):
        assert (found.double() - expected).norm() <= (0.1 if bf16 else 1e-5) * expected.double().norm() + 1e-3 * bf16


@pytest.mark.parametrize("bf16", [False, True])
def test_a_norm_of_many_pixels_is_exact_and_has_the_same_bits_with_any_number_of_threads(bf16: bool) -> None:
    """Compare with float64, on maps far from zero whose sums take three blocks."""
    torch.manual_seed(0)
    plain = Conv2dNormActivation(4, 24, 1, activation_layer=nn.SiLU)
    nn.init.normal_(plain[1].weight)
    images = torch.randn(8, 4, 32, 32) + 30
    results = []
    for threads, exact in ((1, False), (2, False), (1, True)):
        layer, before = copy.deepcopy(plain), torch.get_num_threads()
        inputs = images.clone()
        if exact:
            layer, inputs = layer.double(), inputs.double()
        else:
            use_fast_paths(layer)
        torch.set_num_threads(threads)
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16 and not exact):
                output = layer(inputs.requires_grad_())
            (output.double() * torch.arange(output.numel()).view(output.shape).cos()).sum().backward()
        finally:
            torch.set_num_threads(before)
        gradients = [parameter.grad for parameter in layer[1].parameters()]
        results.append([output, *gradients, layer[1].running_mean, layer[1].running_var])
    for one, two, expected in zip(*results, strict=True):
        assert torch.equal(one, two)
        assert (one.double() - expected).norm() <= (0.1 if bf16 else 1e-5) * expected.norm()


def test_compiled_norms_are_not_loaded_from_a_folder_that_others_can_write_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EFFV2_CACHE", str(tmp_path))
    assert norms._library.__wrapped__() is not None
    (folder,) = tmp_path.glob("compiled-*")
    assert [path.suffix for path in folder.iterdir()] == [".so"] and folder.stat().st_mode & 0o077 == 0
    folder.chmod(0o770)
    assert norms._library.__wrapped__() is None


def test_truncated_norms_are_compiled_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EFFV2_CACHE", str(tmp_path))
    norms._library.__wrapped__()
    (path,) = tmp_path.glob("compiled-*/*.so")
    content = path.read_bytes()
    path.unlink()  # the file that this process has loaded stays as it was
    path.write_bytes(content[: len(content) // 2])
    assert norms._library.__wrapped__() is not None and path.read_bytes() == content


def test_without_a_compiler_batch_norms_are_left_unchanged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("EFFV2_CACHE", str(tmp_path))
    monkeypatch.setattr(norms, "_library", norms._library.__wrapped__)
    layer = Conv2dNormActivation(4, 8, 1)
    use_fast_paths(layer)
    assert type(layer) is Conv2dNormActivation


def test_squeeze_excitation_of_other_functions_is_left_unchanged() -> None:
    layer = SqueezeExcitation(16, 4)
    use_fast_paths(layer)
    assert type(layer) is SqueezeExcitation


ALLOCATING = """
import os, resource, effv2.core.processes as processes, torch
def faults():
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            torch.zeros(2**24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for setting in ("system", ""):
    os.environ["EFFV2_ALLOCATOR"] = setting
    processes.tune_allocator()
    print(faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
def test_memory_is_faulted_in_once_unless_the_user_wants_the_systems_way() -> None:
    done = subprocess.run([sys.executable, "-c", ALLOCATING], capture_output=True, text=True)
    system, tuned = map(int, done.stdout.split())
    assert tuned < 100 and system > 200


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 1, stride=2),
        nn.Conv2d(4, 4, 1, groups=4),
        nn.Conv2d(4, 4, 1, padding=1),
        nn.Conv2d(4, 4, 3, padding=1, stride=(1, 2)),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Conv2d(4, 8, 3, padding=1, groups=4),
        nn.Conv2d(4, 4, 5, padding=2, groups=4),
        nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode="reflect"),
    ],
    ids=str,
)
def test_other_convolutions_are_left_unchanged(conv: nn.Conv2d) -> None:
    use_fast_paths(conv)
    assert type(conv) is nn.Conv2d


def test_an_in_place_silu_no_longer_overwrites_its_input() -> None:
    layer, images = nn.SiLU(inplace=True), torch.ones(2)
    use_fast_paths(layer)
    assert layer(images)[0] != 1 and images.tolist() == [1, 1]


def test_float32_means_float32_on_cuda_unless_bf16_is_wanted() -> None:
    matmul, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    settings = [torch.backends.cudnn, matmul, convolutions]
    before = [setting.fp32_precision for setting in settings]
    try:
        for wanted, expected, other in ((True, "tf32", "ieee"), (False, "ieee", "tf32")):
            convolutions.fp32_precision = other  # its own setting, which may differ from cudnn's
            Execution(torch.device("cuda"), wanted, channels_last=True).set_float32()
            assert matmul.fp32_precision == convolutions.fp32_precision == expected
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


def test_without_a_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match=r"execution\.compile true: the C\+\+ compiler no-such-compiler is missing"):
        resolve_study([tiny_config(execution={"compile": True})], print)


def test_a_torch_too_old_to_compile_for_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.10.1+cu130")
    with pytest.raises(InputError, match=r"needs torch 2\.11 or newer, and this is 2\.10\.1"):
        check_compiler("cuda")


@pytest.mark.slow
def test_compiled_blocks_train_alike_and_are_kept_for_the_next_process(tmp_path: Path) -> None:
    """Two full batches and a smaller one, which runs uncompiled."""
    seconds, losses = [], []
    for compiled in (True, True, False):
        script = COMPILED.replace("COMPILED", str(compiled))
        environment = os.environ | {"EFFV2_CACHE": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        first, loss = map(float, done.stdout.split())
        seconds.append(first)
        losses.append(loss)
    assert seconds[1] < seconds[0] / 2
    assert losses[0] == losses[1] == pytest.approx(losses[2], rel=1e-4)


COMPILED = """
import time
from effv2.data.dataset import load_dataset
from effv2.training.loop import Training
from tests.conftest import tiny_config
table = "F 1 3 1 8 8 1 / F 2 3 2 8 16 2 / F 2 3 2 16 16 2 / M 2 3 1 16 16 1"  # maps of 4x4, 2x2 and 1x1 pixels
config = tiny_config(execution={"compile": COMPILED}, model={"variant": "own", "table": table})
training = Training(config, load_dataset(config.data))
started, ends = time.perf_counter(), []
training.on_step = lambda step, steps: ends.append(time.perf_counter())
*_, last = training
network = training.execution.inference_copy(training.state.model)
assert not any(module._compiled_call_impl for module in network.modules())
print(ends[0] - started, last["train/loss"])
"""


def test_a_missing_device_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(InputError, match=r"execution\.device cuda: not available.*cpu"):
        resolve_study([TrainConfig.model_validate({"execution": {"device": "cuda"}})], print)


@pytest.fixture
def bf16_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EFFV2_CACHE", str(tmp_path))
    monkeypatch.setattr("effv2.execution.resolve.cpu_has_bf16", lambda: True)


AUTO = {"device": "cpu", "precision": "auto"}


@pytest.mark.usefixtures("bf16_processor")
def test_auto_times_both_precisions_once_and_remembers() -> None:
    config, remarks = tiny_config(execution=AUTO), list[str]()
    (resolved,) = resolve_study([config], remarks.append)
    timed = remembered(config)
    assert timed is not None and min(timed.fp32, timed.bf16) > 0
    assert resolved.execution.precision == ("bf16" if timed.fp32 >= 1.1 * timed.bf16 else "fp32")
    assert len(remarks) == 1 and "times as fast" in remarks[0]
    assert resolve_study([config, resolved], remarks.append) == [resolved] * 2 and len(remarks) == 1
    assert remembered(tiny_config(execution=AUTO, optimiser={"batch_size": 16})) is None


@pytest.mark.usefixtures("bf16_processor")
def test_arms_of_a_study_share_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolving, "_time_steps", lambda config: Calibration(config.data.image_size, 10))
    small, large = (tiny_config(data={"image_size": size}, execution=AUTO) for size in (8, 16))
    pinned = tiny_config(execution={"precision": "bf16"})
    for order, expected in (([small, pinned, large], "fp32"), ([large, pinned, small], "bf16")):
        found = [each.execution.precision for each in resolve_study(order, print)]
        assert found == [expected, "bf16", expected]


@pytest.mark.parametrize("bf16", [False, True])
def test_a_copy_for_inference_gives_the_outputs_of_the_network_and_leaves_it_unchanged(bf16: bool) -> None:
    torch.manual_seed(0)
    execution = Execution(torch.device("cpu"), bf16, channels_last=True)
    network = execution.place(build_model(parse_table("F 1 3 1 8 8 1 / M 2 3 2 8 16 2"), 5)).train()
    images = torch.rand(64, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    with execution.autocast():
        network(images)  # this gives the norms statistics
    before = copy.deepcopy(network.state_dict())
    copied = execution.inference_copy(network)
    with torch.inference_mode(), execution.autocast():
        expected, found = network.eval()(images).float(), copied(images).float()
    assert counted(copied, nn.BatchNorm2d) == 0 and counted(network, nn.BatchNorm2d) > 0
    assert torch.allclose(expected, found, rtol=0, atol=(0.02 if bf16 else 1e-5) * float(expected.abs().max()))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def counted(module: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(each, kind) for each in module.modules())


@pytest.mark.parametrize(
    ("name", "left"),
    [("resnet18", 0), ("mobilenet_v3_small", 0), ("densenet121", 62), ("swin_t", 0)],
)
def test_folded_batch_norm_changes_only_rounding(name: str, left: int) -> None:
    """Everything that can be folded is folded. DenseNet's norms before a convolution stay."""
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


def test_a_batch_norm_whose_convolution_serves_others_too_is_left_unchanged() -> None:
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
