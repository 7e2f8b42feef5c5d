"""What changes from epoch to epoch: stages of progressive learning (Tan & Le 2021, section 4), and frozen layers.

The body of EfficientNetV2 is its `features`, and the head is its `classifier`.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from effv2.config.schema import AugmentConfig, OptimiserConfig, ProgressiveConfig, TrainConfig
from effv2.core.errors import InputError
from effv2.training.progress import watched_accuracy

SIZE_STEP = 4  # pixels: sizes between the first and the last are multiples of this


@dataclass(frozen=True)
class Stage:
    """One stage, counted from 1: the side of its images in pixels, their augmentation, and the dropout of the head."""

    number: int
    image_size: int
    augment: AugmentConfig
    dropout: float


def stages_of(config: TrainConfig) -> list[Stage]:
    """Return the stages of a training; one stage without progressive learning."""
    count = config.progressive.stages
    shares = [number / (count - 1) for number in range(count)] if count > 1 else [1.0]
    return [_stage(config, number, share) for number, share in enumerate(shares, 1)]


def _stage(config: TrainConfig, number: int, share: float) -> Stage:
    """Return the stage in which settings have risen by a share of the way to those of the last stage."""
    first, last = config.progressive, config.augment

    def risen(start: float, end: float) -> float:
        return end if start < 0 or share == 1 else start + share * (end - start)

    last_size = first.last_image_size or config.data.image_size
    size = round(risen(first.image_size or last_size, last_size))
    if 0 < share < 1:
        size = SIZE_STEP * round(size / SIZE_STEP)
    changed = {
        "crop": round(last.crop * size / config.data.image_size),
        "rand_augment": risen(first.rand_augment, last.rand_augment),
        "mixup": risen(first.mixup, last.mixup),
    }
    return Stage(number, size, last.model_copy(update=changed), risen(first.dropout, config.model.dropout))


def stage_of(config: TrainConfig, epoch: int) -> Stage:
    """Return the stage of an epoch, both counted from 1. The numbers of epochs of two stages differ by at most one."""
    stages = stages_of(config)
    return stages[min(len(stages), 1 + (epoch - 1) * len(stages) // config.schedule.epochs) - 1]


def check_stages(config: TrainConfig) -> None:
    """Raise InputError for more stages than epochs, and for stages without a rising setting."""
    first, stages = config.progressive, config.progressive.stages
    if stages > config.schedule.epochs:
        problem = f"there are only {config.schedule.epochs} epochs"
        raise InputError("progressive.stages", stages, problem, "give fewer stages or raise schedule.epochs")
    if stages > 1 and not first.image_size and first.rand_augment == first.mixup == first.dropout == -1:
        remedy = "give progressive.image_size, rand_augment, mixup or dropout for the first stage"
        raise InputError("progressive.stages", stages, "nothing rises in them", remedy)


def set_dropout(network: nn.Module, dropout: float) -> None:
    """Set the dropout before the classifier."""
    for layer in network.get_submodule("classifier").modules():
        if isinstance(layer, nn.Dropout):
            layer.p = dropout


def stage_metrics(config: TrainConfig, stage: Stage) -> dict[str, float]:
    """Return the logged metrics for the stage of an epoch; empty without progressive learning."""
    if config.progressive == ProgressiveConfig():
        return {}
    return {"progressive/stage": stage.number, "progressive/image_size": stage.image_size}


def stage_table(config: TrainConfig, history: Sequence[Mapping[str, float]]) -> list[tuple[str | float, ...]]:
    """Return titles, and a row for each trained stage: its settings, time, throughput and last accuracy."""
    head = "stage epochs image_size rand_augment mixup dropout train_seconds images_per_second watched_accuracy"
    rows: list[tuple[str | float, ...]] = [tuple(head.split())]
    for stage in stages_of(config):
        epochs = [each for each in history if each["progressive/stage"] == stage.number]
        if epochs:
            rate = statistics.median(each["throughput/train_images_per_second"] for each in epochs)
            seconds = sum(each["time/train_seconds"] for each in epochs)
            settings = stage.image_size, stage.augment.rand_augment, stage.augment.mixup, stage.dropout
            reached = [accuracy for each in epochs if (accuracy := watched_accuracy(each)) is not None]
            ended = round(reached[-1], 4) if reached else ""
            rows.append((stage.number, len(epochs), *settings, round(seconds, 3), round(rate), ended))
    return rows


def set_modes(network: nn.Module, config: OptimiserConfig, epoch: int) -> None:
    """Put a network into training mode for an epoch, counted from 1, except frozen layers.

    Frozen layers are in eval mode and get no gradients, so neither steps nor weight decay nor batches change them.
    """
    body, frozen = network.get_submodule("features"), body_is_frozen(config, epoch)
    network.train()
    body.train(not frozen).requires_grad_(not frozen)
    if norms_are_frozen(config, epoch):
        for layer in body.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eval().requires_grad_(False)


def body_is_frozen(config: OptimiserConfig, epoch: int) -> bool:
    """Say whether only the head is trained in an epoch."""
    return config.frozen_epochs < 0 or epoch <= config.frozen_epochs


def norms_are_frozen(config: OptimiserConfig, epoch: int) -> bool:
    """Say whether batch norm is frozen in an epoch."""
    return config.freeze_batch_norm or body_is_frozen(config, epoch)
