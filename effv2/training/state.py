"""Everything that decides how a training continues, in one object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from effv2.architecture import build_model
from effv2.config.schema import StoppingConfig, TrainConfig
from effv2.core.internals import copy_all, lerp_all
from effv2.core.randomness import private_randomness, stream_seed
from effv2.data.batches import batch_count
from effv2.data.dataset import Dataset
from effv2.execution.device import Execution
from effv2.training.optimisers import Schedule, make_optimiser


@dataclass
class Progress:
    """Finished epochs and steps, and the metrics of every epoch by the names they are logged under."""

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
        watched = [watched_accuracy(metrics) for metrics in self.history[first - 1 :]]
        best_epoch = first + watched.index(max(watched))
        return self.epoch - max(best_epoch, stopping.min_epochs) >= stopping.patience


def watched_accuracy(metrics: Mapping[str, float]) -> float:
    """Return the accuracy that selects, stops and lowers the rate: of validation, of the test set without one."""
    return metrics["val/accuracy"] if "val/accuracy" in metrics else metrics["test/accuracy"]


@dataclass
class EpochSums:
    """What the steps of the running epoch add up to: loss (float32) and right answers (int64) over images.

    Zeros on the CPU can be added to what is on any device.
    """

    loss: Tensor = field(default_factory=partial(torch.tensor, 0.0))
    right: Tensor = field(default_factory=partial(torch.tensor, 0))
    images: int = 0
    seconds: float = 0.0

    def add(self, loss: Tensor, right: Tensor, images: int) -> None:
        """Add a step's mean loss and right answers."""
        self.loss, self.right, self.images = self.loss + loss * images, self.right + right, self.images + images


class TrainState:
    """What can be saved after any step; `selected` holds the weights of the best epoch where validation chooses it.

    Random numbers need no state: each step seeds its own, and the order of an epoch follows from its number.
    """

    def __init__(self, config: TrainConfig, dataset: Dataset, execution: Execution) -> None:
        wanted, optimiser = config.model, config.optimiser
        settings = wanted.dropout, wanted.stochastic_depth, wanted.zero_init_residual
        with private_randomness():
            torch.manual_seed(stream_seed(config.random.seed, "initialisation"))
            network = build_model(wanted.build_table(), wanted.outputs or len(dataset.classes), *settings)
            self.model = execution.place(network)
        self.averaged = AveragedModel(self.model, use_buffers=True) if optimiser.ema_decay else None
        self.optimiser = make_optimiser(optimiser, self.model)
        steps_per_epoch = batch_count(len(dataset.train), optimiser.batch_size)
        self.schedule = Schedule(config.schedule, self.optimiser, steps_per_epoch)
        self.progress, self.sums = Progress(), EpochSums()
        self.selected: dict[str, Tensor] | None = None

    @property
    def evaluated(self) -> nn.Module:
        """Return the network that is evaluated and kept: the averaged one where there is one."""
        return self.averaged.module if self.averaged else self.model

    @torch.no_grad()
    def average(self, decay: float) -> None:
        """Let the averaged weights follow, the decay rising from 0.1 as (1 + n) / (10 + n): the start is forgotten."""
        if self.averaged is None:
            return
        n = int(self.averaged.n_averaged)
        weight = 1 - min(decay, (1 + n) / (10 + n)) if n else 1.0
        averaged, current = ([*module.parameters(), *module.buffers()] for module in (self.averaged.module, self.model))
        smooth = [each.is_floating_point() for each in averaged]
        lerp_all(list(compress(averaged, smooth)), list(compress(current, smooth)), weight)
        counts = [not each for each in smooth]
        copy_all(list(compress(averaged, counts)), list(compress(current, counts)))
        self.averaged.n_averaged += 1  # AveragedModel's own update would wait for a GPU

    def state_dict(self) -> dict[str, Any]:
        """Return all of it as tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict() if self.averaged else None,
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "progress": asdict(self.progress),
            "sums": vars(self.sums).copy(),
            "selected": self.selected,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what state_dict returned."""
        for name in ("model", "averaged", "optimiser", "schedule"):
            if (part := getattr(self, name)) is not None:
                part.load_state_dict(state[name])
        self.progress, self.sums = Progress(**state["progress"]), EpochSums(**state["sums"])
        self.selected = state["selected"]

    def take_selected(self) -> None:
        """Go back to the weights of the selected epoch; without a validation split it is the last one."""
        if self.selected is not None:
            self.evaluated.load_state_dict(self.selected)
