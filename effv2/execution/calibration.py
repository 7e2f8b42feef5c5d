"""Which precision is the quicker for a network on this processor: timed once, remembered in the cache folder.

<cache>/calibrations/<hash of network, input, code and processor>.json    {"fp32": ..., "bf16": ...} seconds a step
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from filelock import FileLock
from torch.nn import functional as F

from effv2.architecture import build_model
from effv2.config.schema import TrainConfig
from effv2.core import provenance
from effv2.core.paths import cache_folder, write_atomically
from effv2.core.randomness import private_randomness
from effv2.execution.device import Execution

# So much quicker bf16 must be to be chosen: below it the gain isn't worth the rounding, and noise may sway the choice.
WORTHWHILE = 1.1
STEPS = 3
PIXELS = 2**18  # a timed step has at most so many, so that large images don't make it long


@dataclass(frozen=True)
class Calibration:
    """Median seconds of forward and backward in either precision."""

    fp32: float
    bf16: float

    @property
    def prefers_bf16(self) -> bool:
        """Say whether bf16 is worth its rounding."""
        return self.fp32 >= WORTHWHILE * self.bf16

    def __str__(self) -> str:
        return f"a step in bf16 is {self.fp32 / self.bf16:.2f} times as fast as in fp32"


def calibrate(config: TrainConfig, message: Callable[[str], None]) -> Calibration:
    """Return what is remembered for the network and input of `config`; timed first where there is nothing."""
    if found := remembered(config):
        return found
    path = _path(config)
    with suppress(OSError):  # a folder that can't be written costs the memory alone
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # two that are timed at once would disturb each other
            if found := remembered(config):
                return found
            found = _time_steps(config)
            write_atomically(path, json.dumps(asdict(found)))
    found = found or _time_steps(config)
    message(f"Timed once on this processor: {found}.")
    return found


def remembered(config: TrainConfig) -> Calibration | None:
    """Return what was timed before for the network and input of `config`, whatever its precision."""
    try:
        return Calibration(**json.loads(_path(config).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _path(config: TrainConfig) -> Path:
    machine = provenance.machine()
    deciding = [str(config.model.build_table()), config.data.image_size, config.optimiser.batch_size]
    deciding += [config.execution.channels_last, os.environ.get("EFFV2_ALLOCATOR", "")]
    deciding += [provenance.code_version(), machine["processor"], machine["threads"]]
    digest = hashlib.sha256(json.dumps(deciding).encode()).hexdigest()[:16]
    return cache_folder() / "calibrations" / f"{digest}.json"


def _time_steps(config: TrainConfig) -> Calibration:
    """Time both precisions in turn, after a step of each that isn't counted."""
    size, device = config.data.image_size, torch.device("cpu")
    forms = {bf16: Execution(device, bf16, config.execution.channels_last) for bf16 in (False, True)}
    with private_randomness():
        model = forms[False].place(build_model(config.model.build_table(), config.model.outputs or 10)).train()
        count = max(2, min(config.optimiser.batch_size, PIXELS // size**2))
        images, labels = torch.rand(count, 3, size, size), torch.zeros(count, dtype=torch.int64)
        if config.execution.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        seconds: dict[bool, list[float]] = {bf16: [] for bf16 in forms}
        for number in range(STEPS + 1):
            for bf16, execution in forms.items():
                started = time.perf_counter()
                with execution.autocast():
                    logits = model(images)
                F.cross_entropy(logits.float(), labels).backward()
                model.zero_grad(set_to_none=True)
                if number:
                    seconds[bf16].append(time.perf_counter() - started)
    return Calibration(statistics.median(seconds[False]), statistics.median(seconds[True]))
