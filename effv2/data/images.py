"""Labelled images that can be opened one by one, and what is made of each: the square of bytes that a network gets."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Labels = NDArray[np.int64]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class LabelledImages:
    """Images with labels and ids, in the order (class, file) of the published rule.

    `items` is an array of paths (N) or of greyscale bytes (N, H, W). Files are trusted to be unchanged while their
    sizes and modification times are.
    """

    items: NDArray[Any]
    labels: Labels
    ids: tuple[str, ...]

    @classmethod
    def of_files(cls, paths: Sequence[Path], labels: Sequence[int], ids: Sequence[str]) -> LabelledImages:
        """Return images in files."""
        return cls(np.array(paths, dtype=object), np.array(labels, dtype=np.int64), tuple(ids))

    def __len__(self) -> int:
        return len(self.items)

    @property
    def _in_files(self) -> bool:
        return self.items.dtype == object

    def open(self, index: int) -> Image.Image:
        """Return one image, whole; OSError, ValueError or SyntaxError (Pillow) for a broken one."""
        if not self._in_files:  # the grey channel copied to three, as the published notebooks did
            return Image.fromarray(self.items[index]).convert("RGB")
        with Image.open(self.items[index]) as image:
            if image.format in ("EPS", "IPTC"):
                raise ValueError("PostScript, or what may hold it, is a program that Pillow would have run")
            image.load()
            return image

    def stamp(self) -> str:
        """Return a string that changes whenever the content may have changed, quickly."""
        if not self._in_files:
            return self.digest()
        digest = hashlib.sha256()
        for path in self.items:
            digest.update(os.fsencode(path.absolute()) + b"\0")
            with suppress(OSError):  # what can't be read is reported when it is decoded
                status = path.stat()
                digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
        return digest.hexdigest()

    def digest(self) -> str:
        """Hash the content: the bytes of the array, or of each file; a file that can't be read has its own hash."""
        if not self._in_files:
            return sha256_of(self.items)
        digest = hashlib.sha256()
        for path in self.items:
            try:
                content = path.read_bytes()
            except OSError:  # reported when it is decoded
                content = b"unreadable\0" + os.fsencode(path)
            digest.update(hashlib.sha256(content).digest())
        return digest.hexdigest()

    def take(self, positions: Any) -> LabelledImages:
        """Return the images at `positions`."""
        at = np.asarray(positions, dtype=np.int64)
        return LabelledImages(self.items[at], self.labels[at], tuple(map(self.ids.__getitem__, at)))

    def join(self, others: LabelledImages) -> LabelledImages:
        """Return these images and then `others`, which must lie alike."""
        items, labels = (np.concatenate(both) for both in ((self.items, others.items), (self.labels, others.labels)))
        return LabelledImages(items, labels, self.ids + others.ids)


def sha256_of(array: NDArray[Any]) -> str:
    """Hash an array's bytes without copying them."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


@dataclass(frozen=True)
class Square:
    """Both sides resized to `size` (bilinear with antialiasing), whatever the aspect ratio: the published rule.

    Its repr, as that of CentreCrop, is part of the key by which decoded images are found again.
    """

    size: int

    def __call__(self, image: Image.Image) -> Bytes:
        """Turn an image of any size and mode into RGB bytes (size, size, 3); the served model has a copy of this."""
        return np.asarray(to_rgb(image).resize((self.size, self.size), Image.Resampling.BILINEAR), dtype=np.uint8)


@dataclass(frozen=True)
class CentreCrop:
    """The shorter side resized to `resize`, then the central square of `size`: torchvision's preset, by its functions.

    `interpolation` is torchvision's name of it, as bilinear.
    """

    size: int
    resize: int
    interpolation: str

    def __call__(self, image: Image.Image) -> Bytes:
        """Turn an image of any size and mode into RGB bytes (size, size, 3)."""
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import functional as F

        resized = F.resize(to_rgb(image), [self.resize], InterpolationMode(self.interpolation))
        return np.asarray(F.center_crop(resized, [self.size]), dtype=np.uint8)


Preparation = Square | CentreCrop


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn an image of any mode into RGB."""
    if image.mode.startswith("I;16"):  # Pillow would clip 16-bit greys at 255
        image = Image.fromarray((np.asarray(image, dtype=np.uint16) >> 8).astype(np.uint8))
    return image.convert("RGB")
