"""A list of labelled images that can be opened one by one, from files or from an array."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

RunSpec = NDArray[np.int64]
Bytes = NDArray[np.uint8]


def sha256_of(pixels: Bytes) -> str:
    """Hash an array's bytes without copying them."""
    return hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()


class Images(Protocol):
    """What the cache needs to know of images."""

    def __len__(self) -> int:
        """Count the images."""

    def open(self, index: int) -> Image.Image:
        """Return one image, whole; OSError, ValueError or SyntaxError (Pillow) for a broken one."""

    def where(self, index: int) -> str:
        """Say where one image lies, for error messages."""

    def stamp(self) -> str:
        """Return a string that changes whenever the content may have changed, quickly."""

    def digest(self) -> str:
        """Hash the content."""

    def take(self, positions: NDArray[np.int64]) -> Images:
        """Return the images at `positions`."""

    def join(self, others: Any) -> Images:
        """Return these images and then `others`, which must be of the same kind."""


@dataclass(frozen=True)
class FileImages:
    """Images in files; trusted to be unchanged while size and modification time are."""

    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, index: int) -> Image.Image:
        """Decode one file."""
        with Image.open(self.paths[index]) as image:
            if image.format in ("EPS", "IPTC"):
                raise ValueError("PostScript, or what may hold it, is a program that Pillow would have run")
            image.load()
            return image

    def where(self, index: int) -> str:
        """Return the path."""
        return str(self.paths[index])

    def stamp(self) -> str:
        """Hash paths, sizes and modification times."""
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(os.fsencode(path.absolute()) + b"\0")
            with suppress(OSError):  # what can't be read is reported when it is decoded
                status = path.stat()
                digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
        return digest.hexdigest()

    def digest(self) -> str:
        """Hash the bytes of the files, one after the other; one that can't be read has a hash of its own."""
        digest = hashlib.sha256()
        for path in self.paths:
            try:
                content = path.read_bytes()
            except OSError:  # reported when it is decoded
                content = b"unreadable\0" + os.fsencode(path)
            digest.update(hashlib.sha256(content).digest())
        return digest.hexdigest()

    def take(self, positions: NDArray[np.int64]) -> FileImages:
        """Return the files at `positions`."""
        return FileImages(tuple(self.paths[i] for i in positions))

    def join(self, others: FileImages) -> FileImages:
        """Return these files and then `others`."""
        return FileImages(self.paths + others.paths)


@dataclass(frozen=True)
class ArrayImages:
    """Greyscale images in an array (N, H, W) of bytes."""

    pixels: Bytes
    name: str

    def __len__(self) -> int:
        return len(self.pixels)

    def open(self, index: int) -> Image.Image:
        """Return one image with its grey channel copied to three, as the published notebooks did."""
        return Image.fromarray(self.pixels[index]).convert("RGB")

    def where(self, index: int) -> str:
        """Return the position in the set."""
        return f"{self.name} image {index}"

    def stamp(self) -> str:
        """Hash the pixels."""
        return self.digest()

    def digest(self) -> str:
        """Hash the pixels."""
        return sha256_of(self.pixels)

    def take(self, positions: NDArray[np.int64]) -> ArrayImages:
        """Return the images at `positions`."""
        return ArrayImages(self.pixels[positions], self.name)

    def join(self, others: ArrayImages) -> ArrayImages:
        """Return these images and then `others`."""
        return ArrayImages(np.concatenate([self.pixels, others.pixels]), self.name)


@dataclass(frozen=True)
class Part:
    """A labelled part of a source, in the order (class, file) of the published rule."""

    images: Images
    labels: RunSpec
    ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, positions: Any) -> Part:
        """Return the samples at `positions`."""
        positions = np.asarray(positions, dtype=np.int64)
        return Part(self.images.take(positions), self.labels[positions], tuple(self.ids[i] for i in positions))

    def join(self, other: Part) -> Part:
        """Return these samples and then those of `other`."""
        labels = np.concatenate([self.labels, other.labels])
        return Part(self.images.join(other.images), labels, self.ids + other.ids)
