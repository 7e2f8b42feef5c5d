"""What `auto` means on this machine, for a run or for all runs of a study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from effv2.config.schema import Device, Precision, TrainConfig
from effv2.core.errors import InputError
from effv2.core.reporter import Message
from effv2.execution.calibration import calibrate
from effv2.execution.compilation import check_compiler


def place(config: TrainConfig) -> TrainConfig:
    """Return `config` with a device of this machine; InputError for a device or a compiler that it lacks.

    Quick, so that it comes before images are decoded.
    """
    device = resolve_device(config.execution.device)
    if config.execution.compile:
        check_compiler(device)
    return _with_execution(config, device=device)


def resolve(config: TrainConfig, message: Message) -> TrainConfig:
    """Return `config` with `auto` replaced by what this machine has; InputError as place.

    On a processor with bfloat16 instructions the quicker precision is timed, once: what was found is remembered, so
    that the same command on the same machine means the same run. `message` is told when it is timed. It may take
    seconds, so it comes after all that can be wrong was checked.
    """
    placed, precision = place(config), config.execution.precision
    if precision == "auto":
        precision = "bf16" if _prefers_bf16(placed, message) else "fp32"
    return _with_execution(placed, precision=precision)


def resolve_study(configs: Sequence[TrainConfig], message: Message) -> list[TrainConfig]:
    """Resolve the configs of a study; where the precision is `auto`, all take what is best for the first of them."""
    shared: Precision = "auto"
    resolved = []
    for config in configs:
        if config.execution.precision != "auto":
            resolved.append(resolve(config, message))
            continue
        resolved.append(resolve(_with_execution(config, precision=shared), message))
        shared = resolved[-1].execution.precision
    return resolved


def resolve_device(device: Device) -> Device:
    """Return what `auto` means on this machine; InputError for a device it lacks."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        device = "cuda" if available["cuda"] else "mps" if available["mps"] else "cpu"
    if not available[device]:
        have = ", ".join(name for name, there in available.items() if there)
        raise InputError(f"--device {device}: not available to torch on this machine; use auto or {have}.")
    return device


def _with_execution(config: TrainConfig, **update: str) -> TrainConfig:
    return config.model_copy(update={"execution": config.execution.model_copy(update=update)})


def _prefers_bf16(config: TrainConfig, message: Message) -> bool:
    if config.execution.device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return config.execution.device == "cpu" and _cpu_has_bf16() and calibrate(config, message).prefers_bf16


def _cpu_has_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
