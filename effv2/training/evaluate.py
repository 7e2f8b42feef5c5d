"""Loss, accuracy and logits of a network on a split."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from effv2.config.schema import TrainConfig
from effv2.data.batches import evaluation_batches, to_input
from effv2.data.dataset import Split
from effv2.execution.device import Execution, Forward

LATENCY_WARMUP, LATENCY_PASSES = 3, 11


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy, fraction right, and float32 logits (N, outputs) in the split's order."""

    loss: float
    accuracy: float
    logits: Tensor


def evaluate(form: Forward, split: Split, config: TrainConfig, execution: Execution) -> Evaluation:
    """Run a network in an evaluation form (of Execution) over `split`; the argmax is over all outputs."""
    logits = []
    with torch.inference_mode():
        for images, _ in evaluation_batches(split, config.evaluation.batch_size):
            inputs = to_input(execution.to_device(images), config.data, execution.channels_last)
            with execution.autocast():
                logits.append(form(inputs).to(torch.float32, copy=True))
        everything = torch.cat(logits).cpu()
        loss = F.cross_entropy(everything, split.labels).item()
        accuracy = (everything.argmax(1) == split.labels).double().mean().item()
    return Evaluation(loss, accuracy, everything)


def single_image_latency(form: Forward, config: TrainConfig, execution: Execution) -> float:
    """Return the median seconds of one image through an evaluation form, from bytes to logits on the host."""
    size = config.data.image_size
    image = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    seconds = []
    with torch.inference_mode():
        for _ in range(LATENCY_WARMUP + LATENCY_PASSES):
            started = time.perf_counter()
            inputs = to_input(execution.to_device(image), config.data, execution.channels_last)
            with execution.autocast():
                form(inputs).float().cpu()
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[LATENCY_WARMUP:])
