"""Where and how the network is computed: device, precision, memory format."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from effv2.config import Device, ExecutionConfig, TrainConfig
from effv2.errors import InputError
from effv2.execution.fast_paths import use_fast_paths

# Rates of bf16 autocast over float32, both on the fast paths, one run on two cores with bf16 instructions: 1.4 at
# 32 pixels (batch 128), 1.2 at 64 (batch 64), 1.8 at 128 (batch 32). Below 64 pixels float32 is kept all the same:
# there a run is short, and that learning doesn't suffer from bf16 has not been measured yet.
BF16_FROM_PIXELS_ON_CPU = 64

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Execution:
    """A resolved device, precision and memory format."""

    device: torch.device
    bf16: bool
    channels_last: bool

    def place(self, model: Module) -> Module:
        """Move a network to the device, in the memory format of its inputs, on the fast paths of the device."""
        if self.device.type == "cpu" and self.channels_last:
            use_fast_paths(model)
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        return model.to(self.device).to(memory_format=memory_format)

    def to_device(self, tensor: Tensor) -> Tensor:
        """Move a batch to the device."""
        return tensor.to(self.device, non_blocking=True)

    def autocast(self) -> AbstractContextManager[None]:
        """Return the context in which forward passes run."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


def resolve(config: TrainConfig) -> TrainConfig:
    """Return `config` with `auto` replaced by what this machine has; InputError for a device it lacks.

    The choice is a rule, not a timing: the same command on the same machine always means the same run.
    """
    device = resolve_device(config.execution.device)
    precision = config.execution.precision
    if precision == "auto":
        precision = "bf16" if _prefers_bf16(device, config.data.image_size) else "fp32"
    execution = config.execution.model_copy(update={"device": device, "precision": precision})
    return config.model_copy(update={"execution": execution})


def resolve_device(device: Device) -> Device:
    """Return what `auto` means on this machine; InputError for a device it lacks."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        device = "cuda" if available["cuda"] else "mps" if available["mps"] else "cpu"
    if not available[device]:
        have = ", ".join(name for name, there in available.items() if there)
        raise InputError(f"--device {device}: not available to torch on this machine; use auto or {have}.")
    return device


def resolve_study(configs: Sequence[TrainConfig]) -> list[TrainConfig]:
    """Resolve the configs of a study; where the precision is `auto`, all take what the first of them got."""
    resolved = [resolve(config) for config in configs]
    free = [i for i, config in enumerate(configs) if config.execution.precision == "auto"]
    for i in free:
        shared = {"precision": resolved[free[0]].execution.precision}
        resolved[i] = resolved[i].model_copy(update={"execution": resolved[i].execution.model_copy(update=shared)})
    return resolved


def make_execution(config: ExecutionConfig) -> Execution:
    """Build the execution of a resolved config."""
    return Execution(torch.device(config.device), config.precision == "bf16", config.channels_last)


def _prefers_bf16(device: str, image_size: int) -> bool:
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device == "cpu" and image_size >= BF16_FROM_PIXELS_ON_CPU and _cpu_has_bf16()


def _cpu_has_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
