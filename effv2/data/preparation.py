"""From an opened image to the square of RGB bytes that a network is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from effv2.data.images import Bytes


class Preparation(Protocol):
    """A frozen dataclass: its repr is part of the cache's key."""

    @property
    def size(self) -> int:
        """Return the side of the square in pixels."""

    def __call__(self, image: Image.Image) -> Bytes:
        """Turn an image of any size and mode into RGB bytes (size, size, 3)."""


@dataclass(frozen=True)
class Square:
    """Both sides resized to `size` (bilinear with antialiasing), whatever the aspect ratio: the published rule."""

    size: int

    def __call__(self, image: Image.Image) -> Bytes:
        """Resize.

        The served model repeats these lines (it must not need this package); a test holds the two together.
        """
        return np.asarray(to_rgb(image).resize((self.size, self.size), Image.Resampling.BILINEAR), dtype=np.uint8)


@dataclass(frozen=True)
class CentreCrop:
    """The shorter side resized to `resize`, then the central square of `size`: torchvision's classification preset.

    Its own functions do it, on the image that Pillow decoded, so the bytes are those that the preset would scale.
    `interpolation` is torchvision's name of it, as bilinear.
    """

    size: int
    resize: int
    interpolation: str

    def __call__(self, image: Image.Image) -> Bytes:
        """Resize and crop."""
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import functional as F

        resized = F.resize(to_rgb(image), [self.resize], InterpolationMode(self.interpolation))
        return np.asarray(F.center_crop(resized, [self.size]), dtype=np.uint8)


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn an image of any mode into RGB."""
    if image.mode.startswith("I;16"):  # Pillow would clip 16-bit greys at 255
        image = Image.fromarray((np.asarray(image, dtype=np.uint16) >> 8).astype(np.uint8))
    return image.convert("RGB")
