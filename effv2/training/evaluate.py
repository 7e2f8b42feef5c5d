"""Loss, accuracy and logits of a network on a split."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from effv2.config.schema import TrainConfig
from effv2.data.batches import to_input
from effv2.data.dataset import Split, to_device
from effv2.execution.device import Execution, Forward

LATENCY_WARMUP, LATENCY_PASSES = 3, 11


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy, fraction right, float32 logits (N, outputs) and labels (N) in the split's order."""

    loss: float
    accuracy: float
    logits: Tensor
    labels: Tensor


# What is measured of each evaluated split after each epoch, and logged as `<split>/<name>`. A new metric is one entry.
EPOCH_METRICS: dict[str, Callable[[Evaluation], float]] = {
    "loss": lambda found: found.loss,
    "accuracy": lambda found: found.accuracy,
}


def evaluate(network: Forward, split: Split, config: TrainConfig, execution: Execution) -> Evaluation:
    """Run a network for inference (of Execution) over `split`; the argmax is over all outputs."""
    batches = map(split.images, torch.arange(len(split)).split(config.evaluation.batch_size))
    logits = torch.cat([_logits(network, images, config, execution) for images in batches]).cpu()
    loss = F.cross_entropy(logits, split.labels).item()
    accuracy = (logits.argmax(1) == split.labels).double().mean().item()
    return Evaluation(loss, accuracy, logits, split.labels)


def _logits(network: Forward, images: Tensor, config: TrainConfig, execution: Execution) -> Tensor:
    """Return float32 logits (B, outputs) of bytes (B, 3, H, W), on the device; the next call leaves them alone."""
    inputs = to_input(to_device(images, execution.device), config.data, execution.channels_last)
    with torch.inference_mode(), execution.autocast():
        return network(inputs).to(torch.float32, copy=True)


def single_image_latency(network: Forward, config: TrainConfig, execution: Execution) -> float:
    """Return the median seconds of one image through a network for inference, from bytes to logits on the host."""
    image, seconds = torch.zeros(1, 3, *[config.data.image_size] * 2, dtype=torch.uint8), []
    for _ in range(LATENCY_WARMUP + LATENCY_PASSES):
        started = time.perf_counter()
        _logits(network, image, config, execution).cpu()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[LATENCY_WARMUP:])
