"""Loss, accuracy and logits of a network on a split."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

from effv2.config.schema import TrainConfig
from effv2.core.errors import RunError
from effv2.data.batches import NORMALISATIONS, Statistics, normalised
from effv2.data.dataset import Split, to_device
from effv2.execution.device import Execution, Forward

TIMED_SECONDS, TIMED_PASSES = 1.0, 11


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


def epoch_metrics(found: Evaluation) -> dict[str, float]:
    """Return the figures by name; RunError names one that fails or is no number."""
    figures = {}
    for name, measure in EPOCH_METRICS.items():
        try:
            figures[name] = float(measure(found))
        except Exception as error:
            problem = f"The metric {name!r} of EPOCH_METRICS failed ({type(error).__name__}: {error})"
            raise RunError(f"{problem}; correct it.", resumes=True) from error
    return figures


def evaluate(network: Forward, split: Split, config: TrainConfig, execution: Execution) -> Evaluation:
    """Run a network for inference (of Execution) over `split`; the argmax is over all outputs."""
    statistics = NORMALISATIONS[config.data.normalise]
    batches = map(split.images, torch.arange(len(split)).split(config.evaluation.batch_size))
    logits = torch.cat([infer(network, images, statistics, execution) for images in batches]).cpu()
    loss = F.cross_entropy(logits, split.labels).item()
    accuracy = (logits.argmax(1) == split.labels).double().mean().item()
    return Evaluation(loss, accuracy, logits, split.labels)


def infer(network: Forward, images: Tensor, statistics: Statistics, execution: Execution) -> Tensor:
    """Return float32 logits (B, outputs) of bytes (B, 3, H, W), on the device; the next call leaves them alone."""
    inputs = normalised(to_device(images, execution.device), statistics, execution.channels_last)
    with torch.inference_mode(), execution.autocast():
        return network(inputs).to(torch.float32, copy=True)


def single_image_latency(network: Forward, config: TrainConfig, execution: Execution) -> float:
    """Return the median seconds of one image through a network for inference, from bytes to logits on the host."""
    image = torch.zeros(1, 3, *[config.data.image_size] * 2, dtype=torch.uint8)
    statistics = NORMALISATIONS[config.data.normalise]
    return median_seconds(lambda: infer(network, image, statistics, execution).cpu(), uncounted=3)


def median_seconds(work: Callable[[], object], uncounted: int = 1) -> float:
    """Return the median seconds of `work` after calls that don't count: as many as fit a second, 1 to 11."""
    for _ in range(uncounted):
        work()
    seconds: list[float] = []
    while len(seconds) < TIMED_PASSES and sum(seconds) < TIMED_SECONDS:
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return median(seconds)
