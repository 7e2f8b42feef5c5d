"""RandAugment (Cubuk et al. 2020): each image goes through two operations drawn at random, of equal strength.

Images that drew the same operation are changed together, so that a GPU has work in few kernels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as tv

OPERATIONS_PER_IMAGE = 2
FULL_STRENGTH = 10  # the magnitude of AutoAugment's largest changes (Cubuk et al. 2019), to which others are relative
SHEAR, SHIFT, ANGLE, ENHANCED = 0.3, 0.45, 30.0, 0.9  # the largest; an angle in degrees, shifts as shares of a side
POSTERIZED_BITS, GREY = 4, 128.0
# Given bytes (B, 3, H, W) and the strength of each (B), -1 to 1 at FULL_STRENGTH, returns bytes of the same shape.
Operation = Callable[[Tensor, Tensor], Tensor]


def _warped(images: Tensor, strength: Tensor, kind: Tensor) -> Tensor:
    """Shear along x or y, shift along x or y, or rotate: what `kind` (B), from 0 to 4, says. Grey comes from outside."""
    shear, shift, angle = SHEAR * strength, 2 * SHIFT * strength, torch.deg2rad(ANGLE * strength)
    turned = kind == 4
    cosine, sine = torch.where(turned, angle.cos(), 1), torch.where(turned, angle.sin(), 0)
    rows = [
        torch.stack([cosine, torch.where(kind == 0, shear, -sine), torch.where(kind == 2, shift, 0)], 1),
        torch.stack([torch.where(kind == 1, shear, sine), cosine, torch.where(kind == 3, shift, 0)], 1),
    ]
    matrices = torch.stack(rows, 1).to(images.device, non_blocking=True)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return _bytes(F.grid_sample(images.float() - GREY, grid, align_corners=False) + GREY)


def _enhanced(plain: Callable[[Tensor], Tensor]) -> Operation:
    """Return what moves images away from, or towards, what `plain` makes of them (floats 0 to 255)."""

    def change(images: Tensor, strength: Tensor) -> Tensor:
        factor = (1 + ENHANCED * strength).clamp(min=0).to(images.device, non_blocking=True)[:, None, None, None]
        pixels = images.float()
        return _bytes(torch.lerp(plain(pixels), pixels, factor))

    return change


def _blurred(pixels: Tensor) -> Tensor:
    """Blur by the 3x3 kernel of Pillow's SMOOTH."""
    kernel = torch.ones(3, 1, 3, 3, device=pixels.device)
    kernel[:, :, 1, 1] = 5
    return F.conv2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), kernel / 13, groups=3)


def _bytes(pixels: Tensor) -> Tensor:
    return pixels.round().clamp(0, 255).to(torch.uint8)


WARPS = 5
CHANGES: tuple[Operation, ...] = (
    _enhanced(torch.zeros_like),  # brightness
    _enhanced(tv.rgb_to_grayscale),  # colour
    _enhanced(lambda pixels: tv.rgb_to_grayscale(pixels).mean((1, 2, 3), keepdim=True)),  # contrast
    _enhanced(_blurred),  # sharpness
    lambda images, strength: tv.posterize(images, max(1, 8 - round(POSTERIZED_BITS * float(strength[0].abs())))),
    lambda images, strength: tv.solarize(images, max(0.0, 255 * (1 - float(strength[0].abs())))),
    lambda images, strength: tv.autocontrast(images),
    lambda images, strength: tv.equalize(images),
)
NOTHING = WARPS + len(CHANGES)  # the last operation leaves the image as it is


def rand_augment(images: Tensor, magnitude: float) -> Tensor:
    """Change bytes (B, 3, H, W) by RandAugment of `magnitude`, drawn from torch's global generator on the CPU.

    Either direction is as likely. Colours change by the magnitude in either, as those of Pillow in AutoAugment.
    """
    for _ in range(OPERATIONS_PER_IMAGE):
        drawn = torch.randint(NOTHING + 1, (len(images),))
        strength = magnitude / FULL_STRENGTH * (2 * torch.randint(2, (len(images),)) - 1)
        changed = images.clone()
        for number in range(-1, len(CHANGES)):
            chosen = (drawn < WARPS if number < 0 else drawn == WARPS + number).nonzero()[:, 0]
            if not len(chosen):
                continue
            there = chosen.to(images.device, non_blocking=True)
            if number < 0:
                changed[there] = _warped(images[there], strength[chosen], drawn[chosen])
            else:
                changed[there] = CHANGES[number](images[there], strength[chosen])
        images = changed
    return images
