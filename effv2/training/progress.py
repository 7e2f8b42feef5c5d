"""The progress of a training: its finished epochs and steps, and the sums of the current epoch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from effv2.config.schema import StoppingConfig


@dataclass
class Progress:
    """Finished epochs and steps, and the metrics of every epoch under their logged names."""

    epoch: int = 0
    step: int = 0
    train_seconds: float = 0.0
    best_accuracy: float = -1.0
    best_epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    def should_stop(self, stopping: StoppingConfig) -> bool:
        """Say whether `patience` epochs brought no better watched accuracy, all of them after `min_epochs`.

        Better than all before or, with best_since min_epochs, than those from min_epochs on (docs/protocols.md).
        """
        if not stopping.patience or self.epoch < stopping.min_epochs + stopping.patience:
            return False
        first = max(1, stopping.min_epochs) if stopping.best_since == "min_epochs" else 1
        found = map(watched_accuracy, self.history[first - 1 :])
        watched = {epoch: accuracy for epoch, accuracy in enumerate(found, first) if accuracy is not None}
        best_epoch = max(watched, key=watched.__getitem__, default=0)
        return self.epoch in watched and self.epoch - max(best_epoch, stopping.min_epochs) >= stopping.patience


def watched_accuracy(metrics: Mapping[str, float]) -> float | None:
    """Return the accuracy that selects, stops and lowers the rate: on validation, or on the test set, or None."""
    return metrics.get("val/accuracy", metrics.get("test/accuracy"))


@dataclass
class EpochSums:
    """Sums over the images of the current epoch: loss (float32) and correct answers (int64).

    The zeros on the CPU can be added to tensors on any device.
    """

    loss: Tensor = field(default_factory=partial(torch.tensor, 0.0))
    right: Tensor = field(default_factory=partial(torch.tensor, 0))
    images: int = 0
    seconds: float = 0.0
