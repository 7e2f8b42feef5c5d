"""Batches of a split: order, scaling, memory format. No worker processes: the pixels are in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from effv2.config.schema import DataConfig
from effv2.core.randomness import stream_seed
from effv2.data.dataset import Split, to_device

Statistics = tuple[Sequence[float], Sequence[float]]
# Mean and standard deviation that are applied after scaling to [0, 1]; ImageNet's are those of torchvision's presets.
NORMALISATIONS: dict[str, Statistics] = {
    "none": ((0.0,) * 3, (1.0,) * 3),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """Return the shuffled positions of an epoch, a pure function of its arguments."""
    generator = torch.Generator().manual_seed(stream_seed(seed, "order", epoch))
    return torch.randperm(count, generator=generator)


def batch_count(count: int, batch_size: int) -> int:
    """Count the batches of an epoch. A last batch of one image is left out: batch norm can't train on it."""
    full, rest = divmod(count, batch_size)
    return full + (rest > 1)


def training_batches(split: Split, order: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (uint8 images (B, 3, H, W), labels (B)) in the given order."""
    for step in range(batch_count(len(order), batch_size)):
        positions = order[step * batch_size : (step + 1) * batch_size]
        yield split.images(positions), split.labels[positions]


def evaluation_batches(split: Split, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (uint8 images (B, 3, H, W), labels (B)) of every sample, in order."""
    for positions in torch.arange(len(split)).split(batch_size):
        yield split.images(positions), split.labels[positions]


def to_input(images: Tensor, config: DataConfig, channels_last: bool) -> Tensor:
    """Turn bytes (B, 3, H, W) into the network's float32 input on the same device."""
    if config.normalise == "none":
        return _scaled(images, channels_last)
    return normalised(images, NORMALISATIONS[config.normalise], channels_last)


def normalised(images: Tensor, statistics: Statistics, channels_last: bool) -> Tensor:
    """Turn bytes (B, 3, H, W) into float32: scaled to [0, 1], less the mean, over the standard deviation."""
    mean, std = (to_device(torch.tensor(numbers).view(3, 1, 1), images.device) for numbers in statistics)
    return _scaled(images, channels_last).sub_(mean).div_(std)


def _scaled(images: Tensor, channels_last: bool) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return images.to(torch.float32, memory_format=memory_format).div_(255)
