"""Batch norm in training on CPUs, with the SiLU after it: one pass for torch's two, nothing stored between them.

With blocks.cpp, norms.cpp is compiled once, at its first use, and kept in a private folder of the cache. Without a C++
compiler, torch's layers stay. The two forms differ by rounding.

<cache>/compiled-<user id>/norms-<hash of source and flags>.so
"""

import ctypes
import os
import shlex
import stat
import subprocess
import uuid
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchvision.ops import Conv2dNormActivation

from effv2.core.paths import cache_folder
from effv2.core.provenance import sha256_of_values

SOURCES = [Path(__file__).with_name(f"{name}.cpp") for name in ("blocks", "norms")]  # the first includes the other
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-fopenmp", "-shared"]
VECTORS = {  # by what torch found the processor able to do
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": [*(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")), "-mfma", "-mprefer-vector-width=512"],
}
COMPLETE = b"complete"  # ends a compiled file: a truncated one, which can end the process, is compiled again
KINDS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class ConvNorm(Conv2dNormActivation):  # type: ignore[misc]
    """A convolution, its batch norm and perhaps a SiLU, these two as one function in training."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the maps (N, C', H', W') of maps (N, C, H, W)."""
        convolution, norm, *activation = self
        output: Tensor
        if not norm.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            output = super().forward(input)
            return output
        maps = convolution(input).contiguous(memory_format=torch.channels_last)
        if fits(maps, norm):
            output = _NormSiLU.apply(maps, norm.weight, norm.bias, (norm, bool(activation)))
        else:  # torch's own error where there is one value a channel
            output = nn.Sequential(norm, *activation)(maps)
        return output


def applies(layer: nn.Module) -> bool:
    """Return whether a layer can become a ConvNorm, on this machine."""
    parts = [*layer.children()][1:] if type(layer) is Conv2dNormActivation else []
    if [*map(type, parts)] not in ([nn.BatchNorm2d], [nn.BatchNorm2d, nn.SiLU]):
        return False
    usual = parts[0].affine and parts[0].track_running_stats and parts[0].momentum is not None
    return bool(usual) and compiled()


def compiled() -> bool:
    """Return whether this machine has the compiled functions."""
    return _library() is not None


def fits(maps: Tensor, norm: Any) -> bool:
    """Return whether the compiled functions can normalise these maps (N, C, H, W)."""
    usual = maps.device.type == "cpu" and maps.dtype in KINDS and norm.weight.dtype == torch.float32
    return bool(usual) and maps.numel() > maps.shape[1]


def statistics(maps: Tensor, norm: Any) -> Tensor:
    """Return the mean and the inverse standard deviation of each channel, (2, C); updates the running ones."""
    found, channels = torch.empty(2, maps.shape[1]), maps.shape[1]
    running = norm.running_mean, norm.running_var
    call("statistics", (maps, *found, *running), float(norm.momentum), norm.eps, maps.numel() // channels, channels)
    norm.num_batches_tracked.add_(1)
    return found


class _NormSiLU(torch.autograd.Function):
    """Batch norm of maps (N, C, H, W) in channels-last memory by its own statistics, then SiLU if wanted."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, bias: Tensor, settings: Any) -> Tensor:
        norm, silu = settings
        channels, output, of_batch = len(weight), torch.empty_like(maps), statistics(maps, norm)
        call("forward", (maps, output, weight, bias, *of_batch), maps.numel() // channels, channels, silu)
        ctx.save_for_backward(maps, weight, bias, of_batch)
        ctx.silu = silu
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        maps, weight, bias, of_batch = ctx.saved_tensors
        gradient = gradients[0].to(maps.dtype).contiguous(memory_format=torch.channels_last)
        channels, of_maps, found = len(weight), torch.empty_like(maps), torch.empty(2, len(weight))
        tensors = maps, gradient, of_maps, weight, bias, *of_batch, *found
        call("backward", tensors, maps.numel() // channels, channels, ctx.silu)
        return of_maps, *found, None


def call(name: str, tensors: tuple[Tensor, ...], *numbers: float) -> None:
    """Call the compiled function for the type of the first tensor."""
    function = getattr(_library(), f"{name}_{KINDS[tensors[0].dtype]}")
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    function(*pointers, *((ctypes.c_float if isinstance(each, float) else ctypes.c_long)(each) for each in numbers))


@cache
def _library() -> ctypes.CDLL | None:
    """Return the compiled functions, None where they can't be compiled or kept."""
    flags = [*FLAGS, *VECTORS.get(torch.backends.cpu.get_cpu_capability(), [])]
    folder = cache_folder() / f"compiled-{os.getuid()}"
    path = folder / f"norms-{sha256_of_values([*map(Path.read_text, SOURCES), *flags])[:16]}.so"
    unfinished = path.with_name(f".{uuid.uuid4().hex}.so")
    with suppress(OSError, subprocess.SubprocessError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.lstat()
        if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o022:
            return None  # others could put their code there
        if not path.exists() or not path.read_bytes().endswith(COMPLETE):
            command = [*shlex.split(os.environ.get("CXX") or "g++"), *flags, str(SOURCES[0]), "-o", str(unfinished)]
            try:
                subprocess.run(command, check=True, capture_output=True, timeout=300)  # noqa: S603
                with unfinished.open("ab") as file:
                    file.write(COMPLETE)
                unfinished.replace(path)
            finally:
                unfinished.unlink(missing_ok=True)
        return ctypes.CDLL(str(path))
    return None
