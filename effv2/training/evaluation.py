"""Evaluation of a network on a split, the metrics of each epoch, and the timing of inference."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from effv2.core.errors import RunError
from effv2.data.dataset import Split
from effv2.execution.device import Forward

TIMED_SECONDS, TIMED_PASSES = 1.0, 11

Metrics = dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy, accuracy (a fraction), float32 logits (N, outputs) and labels (N) in the split's order."""

    loss: float
    accuracy: float
    logits: Tensor
    labels: Tensor


# The metrics of each evaluated split after each epoch, logged as `<split>/<name>`. A new metric is one entry.
EPOCH_METRICS: dict[str, Callable[[Evaluation], float]] = {
    "loss": lambda found: found.loss,
    "accuracy": lambda found: found.accuracy,
}


def evaluate(network: Forward, split: Split, batch_size: int) -> Evaluation:
    """Run a network for inference (from Execution) on `split`. The argmax is over all outputs."""
    parts = map(split.images, torch.arange(len(split)).split(batch_size))
    logits = torch.cat(list(map(network, parts))).cpu()
    loss = F.cross_entropy(logits, split.labels).item()
    accuracy = (logits.argmax(1) == split.labels).double().mean().item()
    return Evaluation(loss, accuracy, logits, split.labels)


def epoch_metrics(found: Evaluation) -> Metrics:
    """Return the metrics by name; RunError names one that fails or is not a number."""
    figures = {}
    for name, measure in EPOCH_METRICS.items():
        try:
            figures[name] = float(measure(found))
        except Exception as error:
            problem = f"The metric {name!r} of EPOCH_METRICS failed ({type(error).__name__}: {error})"
            raise RunError(f"{problem}; correct it.", resumes=True) from error
    return figures


def median_seconds(work: Callable[[], object]) -> float:
    """Return the median seconds of `work` over 1 to 11 calls, as many as fit into a second, after a first call."""
    work()
    seconds: list[float] = []
    while len(seconds) < TIMED_PASSES and sum(seconds) < TIMED_SECONDS:
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
