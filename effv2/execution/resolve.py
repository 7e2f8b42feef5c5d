"""The meaning of `auto` on this machine, for a run or for all runs of a study.

The faster precision for a network on this processor is determined once by timing, and stored in the cache folder:

<cache>/calibrations/<hash of network, input, code and processor>.json    {"fp32": ..., "bf16": ...} seconds per step
"""

import json
import os
import shutil
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from filelock import FileLock
from torch.nn import functional as F

from effv2.architecture import build_model
from effv2.config.schema import Device, TrainConfig
from effv2.core import provenance
from effv2.core.errors import InputError
from effv2.core.paths import cache_folder, write_atomically
from effv2.core.randomness import private_randomness
from effv2.core.reporter import Message
from effv2.execution import norms
from effv2.execution.device import Execution

COMPILES_FOR_CUDA = (2, 11)  # reports say that older ones refuse our settings of TF32 (pytorch issue 166387)
# Minimum speed-up of bf16. Below it the gain isn't worth the rounding, and noise may decide the choice.
WORTHWHILE = 1.1
STEPS = 3
PIXELS = 2**18  # maximum for a timed step, so that large images don't make it long


def with_device(config: TrainConfig) -> TrainConfig:
    """Return `config` with a device of this machine, without timing; InputError for a missing device or compiler."""
    device = resolve_device(config.execution.device)
    if config.execution.compile:
        check_compiler(device)
    return config.updated("execution", device=device)


def resolve_study(configs: Sequence[TrainConfig], message: Message) -> list[TrainConfig]:
    """Resolve configs alike: if the precision is `auto`, all get the faster one for the first, timed if needed."""
    resolved = list(map(with_device, configs))
    undecided = [config for config in resolved if config.execution.precision == "auto"]
    shared = "bf16" if undecided and _prefers_bf16(undecided[0], message) else "fp32"
    return [each.updated("execution", precision=shared) if each in undecided else each for each in resolved]


def resolve_device(device: Device) -> Device:
    """Return the device that `auto` means on this machine; InputError for a missing device."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        device = "cuda" if available["cuda"] else "mps" if available["mps"] else "cpu"
    if not available[device]:
        have = ", ".join(name for name, there in available.items() if there)
        raise InputError("execution.device", device, "not available to torch on this machine", f"use auto or {have}")
    return device


def check_compiler(device: str) -> None:
    """Raise InputError if a network can't be compiled: without a C++ compiler, or with an older torch."""
    if device == "cuda" and tuple(map(int, torch.__version__.split(".")[:2])) < COMPILES_FOR_CUDA:
        problem = f"on a GPU it needs torch 2.11 or newer, and this is {torch.__version__}"
        raise InputError("execution.compile", "true", problem, "update it, or give false")
    compiler = os.environ.get("CXX", "g++")
    if device == "cpu" and shutil.which(compiler) is None:
        remedy = "install it, name another in CXX, or give false"
        raise InputError("execution.compile", "true", f"the C++ compiler {compiler} is missing", remedy)


@dataclass(frozen=True)
class Calibration:
    """Median seconds of a forward and backward pass in each precision."""

    fp32: float
    bf16: float

    @property
    def prefers_bf16(self) -> bool:
        """Say whether the gain of bf16 is worth its rounding."""
        return self.fp32 >= WORTHWHILE * self.bf16

    def __str__(self) -> str:
        return f"a step in bf16 is {self.fp32 / self.bf16:.2f} times as fast as in fp32"


def remembered(config: TrainConfig) -> Calibration | None:
    """Return the stored timing for the network and input of `config`, for any precision."""
    try:
        return Calibration(**json.loads(_path(config).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _prefers_bf16(config: TrainConfig, message: Message) -> bool:
    if config.execution.device != "cpu":
        return config.execution.device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    timed = _calibrate(config, message) if cpu_has_bf16() else None
    return timed is not None and timed.prefers_bf16


def cpu_has_bf16() -> bool:
    """Say whether the processor computes in bfloat16; otherwise this is emulated, and slow."""
    with suppress(OSError):
        return not {"avx512_bf16", "amx_bf16"}.isdisjoint(Path("/proc/cpuinfo").read_text().split())
    return False


def _calibrate(config: TrainConfig, message: Message) -> Calibration:
    """Return the stored timing for the network and input of `config`. Without one, time and store it first."""
    path = _path(config)
    with ExitStack() as stack:
        with suppress(OSError):  # if the folder can't be written, only the stored timing is lost
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(f"{path}.lock"))  # two simultaneous timings would disturb each other
        if found := remembered(config):
            return found
        found = _time_steps(config)
        with suppress(OSError):
            write_atomically(path, json.dumps(asdict(found)))
    chosen = "bf16" if found.prefers_bf16 else "fp32"
    message(f"Timed once for this network: {found}, so auto means {chosen} (bf16 from {WORTHWHILE} times on).")
    return found


def _path(config: TrainConfig) -> Path:
    machine = provenance.machine()
    deciding = [str(config.model.build_table()), config.data.image_size, config.optimiser.batch_size]
    deciding += [config.execution.channels_last, os.environ.get("EFFV2_ALLOCATOR", "")]
    deciding += [provenance.code_version(), machine["processor"], machine["threads"], norms.compiled()]
    return cache_folder() / "calibrations" / f"{provenance.sha256_of_values(deciding)[:16]}.json"


def _time_steps(config: TrainConfig) -> Calibration:
    """Time both precisions in turn, after one step of each that isn't counted."""
    size, device = config.data.image_size, torch.device("cpu")
    executions = [Execution(device, bf16, config.execution.channels_last) for bf16 in (False, True)]
    with private_randomness():
        model = executions[0].place(build_model(config.model.build_table(), config.model.outputs or 10)).train()
        count = max(2, min(config.optimiser.batch_size, PIXELS // size**2))
        images, labels = torch.rand(count, 3, size, size), torch.zeros(count, dtype=torch.int64)
        if config.execution.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        seconds: tuple[list[float], list[float]] = [], []
        for _ in range(STEPS + 1):
            for execution, timed in zip(executions, seconds, strict=True):
                started = time.perf_counter()
                with execution.autocast():
                    logits = model(images)
                F.cross_entropy(logits.float(), labels).backward()
                model.zero_grad(set_to_none=True)
                timed.append(time.perf_counter() - started)
    return Calibration(*(statistics.median(timed[1:]) for timed in seconds))
