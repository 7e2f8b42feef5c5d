"""Hashes of decoded images, stored next to them in the cache, so that each image is hashed only once.

    <entry>/hashes-<size, times of the file of pixels>.npy    uint8 (N, 32): the SHA-256 of each image

They are written when the pixels are on the disk and known to be whole. They are valid while that file is unchanged.
"""

import hashlib
import io
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effv2.core.paths import write_atomically

Hashes = NDArray[np.uint8]


def known_hashes(pixels: NDArray[Any]) -> Hashes | None:
    """Return the stored hashes of pixels mapped from a file; None if there are none for the file's current state."""
    with suppress(OSError, ValueError, EOFError):
        found: Hashes = np.load(_path(pixels), allow_pickle=False)
        return found if found.shape == (len(pixels), 32) and found.dtype == np.uint8 else None
    return None


def image_hashes(pixels: NDArray[Any]) -> Hashes:
    """Return the hash of each image, and store them next to the file of pixels if possible."""
    if (found := known_hashes(pixels)) is not None:
        return found
    digests = b"".join(hashlib.sha256(image.data).digest() for image in np.asarray(pixels))
    hashes = np.frombuffer(digests, dtype=np.uint8).reshape(-1, 32)
    content = io.BytesIO()
    np.save(content, hashes)
    with suppress(OSError):
        with _file(pixels).open("rb") as file:
            os.fsync(file.fileno())  # a loss of power must not leave hashes of lost pixels
        write_atomically(_path(pixels), content.getvalue())
    return hashes


def _file(pixels: NDArray[Any]) -> Path:
    """Return the file that pixels are mapped from; OSError if there is none."""
    if (name := getattr(pixels, "filename", None)) is None:
        raise FileNotFoundError
    return Path(name)


def _path(pixels: NDArray[Any]) -> Path:
    file = _file(pixels)
    state = file.stat()
    return file.with_name(f"hashes-{state.st_size}-{state.st_mtime_ns}-{state.st_ctime_ns}.npy")
