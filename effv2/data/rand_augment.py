"""RandAugment (Cubuk et al. 2020): two random operations of equal strength change each image.

Images with the same operation are changed together, so that a GPU needs few kernels.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as tv

from effv2.data.dataset import to_device

OPERATIONS_PER_IMAGE = 2
FULL_STRENGTH = 10  # the magnitude of AutoAugment's largest changes (Cubuk et al. 2019); others are relative to it
SHEAR, SHIFT, ANGLE, ENHANCED = 0.3, 0.45, 30.0, 0.9  # the largest changes: angle in degrees, shift as share of a side
POSTERIZED_BITS, GREY = 4, 128.0
# From bytes (B, 3, H, W) and their strengths (B), -1 to 1 at FULL_STRENGTH, to bytes of the same shape.
Operation = Callable[[Tensor, Tensor], Tensor]


def _warped(images: Tensor, strength: Tensor, kind: Tensor) -> Tensor:
    """Shear along x or y, shift along x or y, or rotate, by `kind` (B), 0 to 4. The outside is grey."""
    shear, shift, angle = SHEAR * strength, 2 * SHIFT * strength, torch.deg2rad(ANGLE * strength)
    turned = kind == 4
    cosine, sine = torch.where(turned, angle.cos(), 1), torch.where(turned, angle.sin(), 0)
    rows = [
        torch.stack([cosine, torch.where(kind == 0, shear, -sine), torch.where(kind == 2, shift, 0)], 1),
        torch.stack([torch.where(kind == 1, shear, sine), cosine, torch.where(kind == 3, shift, 0)], 1),
    ]
    matrices = to_device(torch.stack(rows, 1), images.device)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return _bytes(F.grid_sample(images.float() - GREY, grid, align_corners=False) + GREY)


def _enhanced(plain: Callable[[Tensor], Tensor]) -> Operation:
    """Return an operation that moves images away from, or towards, their version by `plain` (floats 0 to 255)."""

    def change(images: Tensor, strength: Tensor) -> Tensor:
        factor = to_device((1 + ENHANCED * strength).clamp(min=0), images.device)[:, None, None, None]
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
NOTHING = WARPS + len(CHANGES)  # the last operation doesn't change the image


def rand_augment(images: Tensor, magnitude: float) -> Tensor:
    """Change bytes (B, 3, H, W) by RandAugment of `magnitude`, drawn from torch's global generator on the CPU.

    Shifts, rotations and colours change in either direction, as in AutoAugment.
    """
    count, device = len(images), images.device
    now = torch.arange(count)  # the image at each place
    for _ in range(OPERATIONS_PER_IMAGE):
        drawn = torch.randint(NOTHING + 1, (count,))
        strength = magnitude / FULL_STRENGTH * (2 * torch.randint(2, (count,)) - 1)
        order = drawn.argsort(stable=True)  # equal operations are adjacent
        drawn, strength, now = drawn[order], strength[order], now[order]
        images = images[to_device(order, device)]
        ends = [0, *torch.searchsorted(drawn, torch.arange(WARPS, NOTHING + 1)).tolist()]
        changes: list[Operation] = [partial(_warped, kind=drawn[: ends[1]]), *CHANGES]
        spans = zip(changes, pairwise(ends), strict=True)
        changed = [change(images[a:b], strength[a:b]) for change, (a, b) in spans if a < b]
        images = torch.cat([*changed, images[ends[-1] :]])
    return images[to_device(now.argsort(), device)]
