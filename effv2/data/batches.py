"""Batches of a split: order, augmentation, scaling, memory format. No worker processes: the pixels are in memory.

Augmentation draws separately for every sample, from torch's global generator on the CPU, which the training loop seeds
for each step. Images are bytes (B, 3, H, W) until they become the network's input.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.nn import functional as F

from effv2.config.schema import AugmentConfig
from effv2.core.randomness import stream_seed
from effv2.data.dataset import Split, to_device

CPU = torch.device("cpu")
Statistics = tuple[Sequence[float], Sequence[float]]
# Mean and standard deviation, applied after scaling to [0, 1]. ImageNet's are those of torchvision's presets.
NORMALISATIONS: dict[str, Statistics] = {
    "none": ((0.0,) * 3, (1.0,) * 3),
    "half": ((0.5,) * 3, (0.5,) * 3),  # EfficientNetV2-L's
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
# Share of the image that erasing removes, and its aspect ratio (Zhong et al. 2017; torchvision's defaults).
ERASED_AREA = (0.02, 0.33)
ERASED_RATIO = (0.3, 3.3)
CROP_LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))  # ratios of a resized crop's width to its height


def epoch_order(count: int, seed: int, epoch: int, balanced: Tensor | None = None) -> Tensor:
    """Return the shuffled positions of an epoch, a pure function of its arguments.

    With `balanced`, the labels, as many positions are drawn with replacement, and all classes are equally likely.
    """
    generator = torch.Generator().manual_seed(stream_seed(seed, "order", epoch))
    if balanced is None:
        return torch.randperm(count, generator=generator)
    share = 1 / balanced.bincount().double()
    return torch.multinomial(share[balanced], count, replacement=True, generator=generator)


def batch_count(count: int, batch_size: int) -> int:
    """Count the batches of an epoch. A last batch of one image is left out: batch norm can't train on it."""
    full, rest = divmod(count, batch_size)
    return full + (rest > 1)


def training_batches(
    split: Split, order: Tensor, batch_size: int, device: torch.device = CPU
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (uint8 images (B, 3, H, W), labels (B)) in the given order.

    If the images aren't on the network's device, the next batch is gathered while the network trains on the last one.
    """

    def gather(positions: Tensor) -> tuple[Tensor, Tensor]:
        return split.images(positions), split.labels[positions]

    parts = order.split(batch_size)[: batch_count(len(order), batch_size)]
    if not parts or split.pixels.device != CPU or device == CPU:
        yield from map(gather, parts)
        return
    with ThreadPoolExecutor(1) as pool:
        waiting = [pool.submit(gather, part) for part in parts[:1]]
        for following in [*parts[1:], None]:
            found = waiting.pop().result()
            waiting += [] if following is None else [pool.submit(gather, following)]
            yield found


def normalised(images: Tensor, statistics: Statistics, channels_last: bool) -> Tensor:
    """Turn bytes (B, 3, H, W) into float32: scaled to [0, 1], minus the mean, divided by the standard deviation."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    scaled = images.to(torch.float32, memory_format=memory_format).div_(255)
    if statistics != NORMALISATIONS["none"]:
        mean, std = (to_device(torch.tensor(numbers).view(3, 1, 1), images.device) for numbers in statistics)
        scaled.sub_(mean).div_(std)
    return scaled


def augment(images: Tensor, config: AugmentConfig) -> Tensor:
    """Crop, flip, apply TrivialAugment and RandAugment, and erase; bytes in, bytes out, same shape."""
    if config.crop:
        images = random_crop(images, config.crop)
    if config.resized_crop:
        images = random_resized_crop(images, config.resized_crop)
    if config.flip:
        images = random_flip(images)
    if config.trivial_augment:
        from torchvision.transforms.v2 import TrivialAugmentWide

        images = torch.stack(list(map(TrivialAugmentWide(), images)))
    if config.rand_augment:
        from effv2.data.rand_augment import rand_augment

        images = rand_augment(images, config.rand_augment)
    if config.erasing:
        images = random_erasing(images, config.erasing)
    return images


def random_crop(images: Tensor, padding: int) -> Tensor:
    """Shift each image by up to `padding` pixels in both directions. Reflection fills the border."""
    count, _, height, width = images.shape

    def lines(length: int) -> Tensor:
        """Reflect positions outside [0, length) into it, without repeating the edge pixel."""
        shift, period = torch.randint(-padding, padding + 1, (count, 1)), 2 * (length - 1)
        line = (torch.arange(length) + shift).remainder(period)
        return to_device(torch.minimum(line, period - line), images.device)

    rows, columns = lines(height), lines(width)
    sample = torch.arange(count, device=images.device)[:, None, None]
    last = images.permute(0, 2, 3, 1)
    return last[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def random_resized_crop(images: Tensor, smallest: float) -> Tensor:
    """Crop a random part of each image, of at least the share `smallest` of its area and 3:4 to 4:3, and resize it.

    Bilinear. A part that is too large is cut to the image's sides (Szegedy et al. 2015; torchvision draws again).
    """
    count = len(images)
    area, ratio = torch.empty(count).uniform_(smallest, 1), torch.empty(count).uniform_(*CROP_LOG_RATIO).exp()
    sides = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], 1).clamp(max=1)  # of width and height
    centre = (2 * torch.rand(count, 2) - 1) * (1 - sides)
    windows = to_device(torch.cat([sides.diag_embed(), centre[:, :, None]], 2), images.device)
    grid = F.affine_grid(windows, list(images.shape), align_corners=False)
    shown = F.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)
    return shown.round_().to(torch.uint8)


def random_flip(images: Tensor) -> Tensor:
    """Mirror each image with probability 0.5."""
    mirrored = to_device(torch.rand(len(images)) < 0.5, images.device)
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


def random_erasing(images: Tensor, probability: float) -> Tensor:
    """Blacken a random rectangle of each image with the given probability."""
    count, _, height, width = images.shape
    area = torch.empty(count).uniform_(*ERASED_AREA) * height * width
    ratio = torch.empty(count).uniform_(*torch.tensor(ERASED_RATIO).log().tolist()).exp()
    chosen = torch.rand(count) < probability
    heights = (area * ratio).sqrt().round().clamp(1, height) * chosen
    widths = (area / ratio).sqrt().round().clamp(1, width)
    inside = _rectangles(heights, widths, images)
    return images.masked_fill(inside[:, None], 0)


def mix_samples(inputs: Tensor, targets: Tensor, config: AugmentConfig) -> tuple[Tensor, Tensor]:
    """Mix each sample with another of the batch by mixup or CutMix.

    `inputs` are floats (B, 3, H, W), and `targets` are class probabilities (B, C). The results have the same form. With
    both on, a coin decides for each sample. Mixup: Zhang et al. 2018; CutMix: Yun et al. 2019.
    """
    if not config.mixup and not config.cutmix:
        return inputs, targets
    count, _, height, width = inputs.shape
    partner = to_device(torch.randperm(count), inputs.device)
    cuts = torch.rand(count) < (0.5 if config.mixup and config.cutmix else float(config.cutmix > 0))

    blend = _beta(config.mixup, count)
    share = to_device(blend, inputs.device)  # share of the sample itself: in total, and in each pixel
    pixelwise = share[:, None, None]
    if config.cutmix:
        taken = 1 - _beta(config.cutmix, count)  # share of the image that comes from the partner
        heights = (taken.sqrt() * height).round() * cuts
        inside = _rectangles(heights, (taken.sqrt() * width).round(), inputs).float()
        there = to_device(cuts, inputs.device)
        pixelwise = torch.where(there[:, None, None], 1 - inside, pixelwise)
        share = torch.where(there, 1 - inside.flatten(1).mean(1), share)
    mixed = torch.lerp(inputs[partner], inputs, pixelwise[:, None])
    return mixed, torch.lerp(targets[partner], targets, share[:, None])


def _beta(alpha: float, count: int) -> Tensor:
    return torch.distributions.Beta(alpha, alpha).sample((count,)) if alpha else torch.ones(count)


def _rectangles(heights: Tensor, widths: Tensor, images: Tensor) -> Tensor:
    """Return masks (B, H, W), on the same device, of rectangles of these sizes, uniformly placed in the images."""

    def span(sizes: Tensor, length: int) -> Tensor:
        start = (torch.rand(len(sizes)) * (length - sizes + 1)).floor()[:, None]
        line = torch.arange(length)
        return to_device((line >= start) & (line < start + sizes[:, None]), images.device)

    return span(heights, images.shape[2])[:, :, None] & span(widths, images.shape[3])[:, None, :]


def one_hot(labels: Tensor, outputs: int, smoothing: float) -> Tensor:
    """Return class probabilities (B, outputs), smoothed (Szegedy et al. 2016)."""
    return F.one_hot(labels, outputs).float().mul_(1 - smoothing).add_(smoothing / outputs)
