"""A network over prepared images: logits, what they are worth, and how long they took."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effv2.core.errors import RunError
from effv2.data.batches import Statistics
from effv2.data.images import Labels
from effv2.execution.device import Execution, fold_batch_norm
from effv2.training import loop

# On a CPU a pass over few images stays in caches and in memory that the process already has: 2 to 4 times the rate of
# batches of 128 (benchmarks/pretrained.md).
CPU_BATCH_PIXELS = 8 * 224**2
OTHER_BATCH = 128
COMPARED_IMAGES = 512  # that bf16 is compared with float32 on
CALIBRATION_BINS = 15

Progress = Callable[[int], None]  # is given how many images are done


@dataclass(frozen=True)
class Network:
    """A network in its quickest exact form on its device; takes bytes (B, size, size, 3), gives float32 logits."""

    module: nn.Module
    statistics: Statistics
    execution: Execution

    @classmethod
    def prepare(cls, module: nn.Module, statistics: Statistics, execution: Execution) -> Network:
        """Fold batch norms and place `module`, which must be in eval mode and is changed."""
        fold_batch_norm(module)
        return cls(execution.place(module), statistics, execution)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return logits (B, outputs) on the CPU."""
        return self.execution.logits(self.module, self.statistics, pixels.permute(0, 3, 1, 2)).cpu()


def batch_size(wanted: int, size: int, execution: Execution) -> int:
    """Return the images a pass: as wanted, or what suits the device at this image size."""
    if wanted:
        return wanted
    return max(1, round(CPU_BATCH_PIXELS / size**2)) if execution.device.type == "cpu" else OTHER_BATCH


def all_logits(network: Network, pixels: Tensor, batch: int, progress: Progress) -> tuple[Tensor, float]:
    """Return logits (N, outputs), and images/s: of the median pass, the first left out, transfers included.

    RunError for logits that are no finite numbers.
    """
    logits: list[Tensor] = []
    rates: list[float] = []
    progress(0)
    for part in pixels.split(batch):
        started = time.perf_counter()
        logits.append(network(part))
        rates.append(len(part) / (time.perf_counter() - started))
        progress(sum(map(len, logits)))
    everything = torch.cat(logits)
    if not everything.isfinite().all():
        problem = "The outputs are not all finite numbers"
        raise RunError(f"{problem}; the weights are damaged, or need execution.precision fp32.")
    return everything, statistics.median(rates[1:] or rates)


def latency(network: Network, pixels: Tensor, batch: int) -> float:
    """Return the median seconds of a pass of `batch` images, repeated where there are fewer."""
    return loop.median_seconds(partial(network, pixels[torch.arange(batch) % len(pixels)]))


def top1(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output that each image (N) gets, and its probability; of logits, since close ones tie as softmax."""
    predicted = logits.argmax(1)
    return predicted, logits.softmax(1).gather(1, predicted[:, None])[:, 0]


def scores(logits: Tensor, true: Labels, present: Labels) -> dict[str, float]:
    """Return the figures of a set: `true` (N) and `present` (K) are outputs of the network.

    top1_accuracy and top5_accuracy over all outputs, top1_present among those of the classes present alone, loss the
    mean cross-entropy over all outputs, ece the calibration error of the top-1 prediction; accuracies as fractions.
    """
    targets = torch.from_numpy(true)
    predicted, probability = top1(logits)
    right = predicted == targets
    own = logits.gather(1, targets[:, None])
    ahead = (logits > own) | ((logits == own) & (torch.arange(logits.shape[1]) < targets[:, None]))  # as argmax ties
    five = ahead.sum(1) < 5
    among_present = torch.from_numpy(present)[logits[:, present].argmax(1)] == targets
    return {
        "images": len(true),
        "top1_accuracy": right.double().mean().item(),
        "top1_present": among_present.double().mean().item(),
        "top5_accuracy": five.double().mean().item(),
        "loss": F.cross_entropy(logits, targets).item(),
        "ece": calibration_error(probability.double().numpy(), right.numpy()),
    }


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = CALIBRATION_BINS) -> float:
    """Return the expected calibration error (Guo et al. 2017) of confidences (N) in [0, 1] and what was right (N).

    Bins of equal width, open on the left; the mean gap of confidence and accuracy, weighted by the images of a bin.
    """
    edges = np.linspace(0, 1, bins + 1)
    members = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    gaps = np.bincount(members, weights=confidence - right, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def bf16_differences(network: Network, pixels: Tensor, logits: Tensor, true: Labels, batch: int) -> dict[str, float]:
    """Compare bf16 `logits` of all images with float32 ones of at most 512, evenly spaced: what bf16 changes."""
    chosen = np.unique(np.linspace(0, len(pixels) - 1, min(len(pixels), COMPARED_IMAGES)).round().astype(int))
    in_float32 = replace(network, execution=replace(network.execution, bf16=False))
    in_float32.execution.set_float32()
    exact, _ = all_logits(in_float32, pixels[chosen], batch, lambda _: None)
    network.execution.set_float32()
    before, after = exact.argmax(1).numpy(), logits[chosen].argmax(1).numpy()
    return {
        "bf16/compared_images": len(chosen),
        "bf16/top1_difference": float((after == true[chosen]).mean() - (before == true[chosen]).mean()),
        "bf16/predictions_changed": float((after != before).mean()),
    }
