"""Everything that decides how a training continues, in one object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
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
    """What the steps of the running epoch add up to: loss (float32) and right answers, on the device, over images."""

    loss: Tensor
    right: Tensor
    images: int = 0
    seconds: float = 0.0

    @classmethod
    def begin(cls, device: torch.device) -> EpochSums:
        """Return the sums of no steps."""
        return cls(torch.zeros((), device=device), torch.zeros((), device=device, dtype=torch.int64))

    def add(self, loss: Tensor, right: Tensor, images: int) -> None:
        """Add a step's mean loss and right answers."""
        self.loss = self.loss + loss * images
        self.right = self.right + right
        self.images += images


@dataclass
class TrainState:
    """What can be saved after any step; `selected` holds the weights of the best epoch where validation chooses it.

    Random numbers need no state: each step seeds its own, and the order of an epoch follows from its number.
    """

    model: nn.Module
    averaged: AveragedModel | None
    optimiser: Optimizer
    schedule: Schedule
    progress: Progress
    sums: EpochSums
    selected: dict[str, Tensor] | None = None

    @classmethod
    def create(cls, config: TrainConfig, dataset: Dataset, execution: Execution) -> TrainState:
        """Build a fresh state: weights from the seed's own stream, everything else at its beginning."""
        wanted, outputs = config.model, config.model.outputs or len(dataset.classes)
        settings = wanted.dropout, wanted.stochastic_depth, wanted.zero_init_residual
        with private_randomness():
            torch.manual_seed(stream_seed(config.random.seed, "initialisation"))
            model = execution.place(build_model(wanted.build_table(), outputs, *settings))
        optimiser = make_optimiser(config.optimiser, model)
        schedule = Schedule(config.schedule, optimiser, batch_count(len(dataset.train), config.optimiser.batch_size))
        averaged = AveragedModel(model, use_buffers=True) if config.optimiser.ema_decay else None
        return cls(model, averaged, optimiser, schedule, Progress(), EpochSums.begin(execution.device))

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
        self.progress = Progress(**state["progress"])
        device, sums = self.sums.loss.device, state["sums"]
        self.sums = EpochSums(**{**sums, "loss": sums["loss"].to(device), "right": sums["right"].to(device)})
        self.selected = state["selected"]

    def take_selected(self) -> None:
        """Go back to the weights of the selected epoch; without a validation split it is the last one."""
        if self.selected is not None:
            self.evaluated.load_state_dict(self.selected)
