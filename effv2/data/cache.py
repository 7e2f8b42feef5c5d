"""Decode and prepare every image once.

An entry holds the pixels of a list of images after one preparation, and is found by content: the hash of the files'
bytes and of the settings. A second, quicker table leads from the files' names, sizes and modification times
to that hash, so that a second start neither reads nor decodes a file. Entries appear by renaming a finished
folder, so that several processes and a kill can only lose work, never leave half an entry.

    <cache>/stamps/<hash of names, sizes, times and settings>    text: the key of the entry
    <cache>/entries/<key>/pixels.npy                             uint8 (N, size, size, 3)
    <cache>/entries/<key>/index.json                             {"rgb": [...], "sha256": "..."}
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

from effv2.core.errors import InputError
from effv2.core.paths import cache_folder, write_atomically
from effv2.core.provenance import VERSIONS
from effv2.data.images import Bytes, Images, sha256_of
from effv2.data.preparation import Preparation

ABANDONED_SECONDS = 24 * 3600
AHEAD = 256  # images
# What Pillow raises for a broken image, or one that is too large to be honest.
BROKEN = (
    OSError,
    ValueError,
    SyntaxError,
    Image.DecompressionBombWarning,
    Image.DecompressionBombError,
)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Decoded:
    """Pixels (N, size, size, 3), a file mapped into memory; their SHA-256; which of the images were stored as RGB."""

    pixels: Bytes
    sha256: str
    rgb: NDArray[np.bool_]


def decode(images: Images, preparation: Preparation, progress: Progress | None = None) -> Decoded:
    """Return `images` as `preparation` makes them, from the cache where they are there.

    InputError names every broken image at once.
    """
    settings = f"{VERSIONS['decoding']}/{preparation}/Pillow {PIL.__version__}"
    stamp = _sha256(f"{images.stamp()}/{settings}".encode())
    pointer = cache_folder() / "stamps" / stamp
    if (found := _follow(pointer)) and len(found.rgb) == len(images):
        return found
    content = _sha256(f"{images.digest()}/{settings}".encode())
    found = _read(content)
    try:
        if found is None:
            (cache_folder() / "entries").mkdir(parents=True, exist_ok=True)  # before the work, not after it
            found = _write(content, images, preparation, progress)
    except OSError as error:
        raise InputError(
            f"EFFV2_CACHE {cache_folder()}: can't be written ({error.strerror or error}); free space there or set "
            "EFFV2_CACHE to another folder."
        ) from error
    with suppress(OSError):  # a cache that can only be read serves as well
        pointer.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(pointer, content)
    return found


def _prepared(images: Images, preparation: Preparation, progress: Progress | None) -> Generator[tuple[Bytes, bool]]:
    """Yield pixels, and whether they were stored as RGB, in order; every failure is collected for the end.

    Threads do it: Pillow lets go of the interpreter lock.
    """

    def one(index: int) -> tuple[Bytes, bool] | str:
        try:
            image = images.open(index)
            return preparation(image), image.mode == "RGB"
        except BROKEN as error:
            return f"{images.where(index)} ({type(error).__name__})"

    broken: list[str] = []
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for done, result in enumerate(_mapped(pool, one, len(images)), 1):
            if isinstance(result, str):
                broken.append(result)
            else:
                yield result
            if progress:
                progress(done, len(images))
    if broken:
        raise InputError(f"--data-dir: {len(broken)} images can't be read; repair or remove them: {', '.join(broken)}.")


Result = TypeVar("Result")


def _mapped(pool: ThreadPoolExecutor, function: Callable[[int], Result], count: int) -> Iterator[Result]:
    """Yield function(0), function(1) ... in order, never more than AHEAD of them waiting in memory."""
    waiting: deque[Future[Result]] = deque()
    try:
        for index in range(count):
            waiting.append(pool.submit(function, index))
            if len(waiting) == AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _follow(pointer: Path) -> Decoded | None:
    """Return the entry that a stamp leads to; a damaged stamp leads nowhere."""
    try:
        key = pointer.read_text("ascii")
    except (OSError, ValueError):
        return None
    return _read(key) if re.fullmatch("[0-9a-f]{64}", key) else None


def _read(key: str) -> Decoded | None:
    """Return the entry if it is whole: its pixels must have the checksum that was written with them."""
    found = _open(cache_folder() / "entries" / key)
    return found if found is not None and sha256_of(found.pixels) == found.sha256 else None


def _open(entry: Path) -> Decoded | None:
    try:
        index = json.loads((entry / "index.json").read_text())
        rgb, sha256 = np.array(index["rgb"], dtype=bool), str(index["sha256"])
        pixels = cast(Bytes, np.load(entry / "pixels.npy", mmap_mode="c", allow_pickle=False))
    except (OSError, ValueError, EOFError, KeyError, TypeError):
        return None
    return Decoded(pixels, sha256, rgb) if len(rgb) == len(pixels) else None


def _write(key: str, images: Images, preparation: Preparation, progress: Progress | None) -> Decoded:
    """Build an entry, never all of it in memory; what a loss of power tears, the checksum tells."""
    entries = cache_folder() / "entries"
    _sweep(entries)
    building = entries / f"building-{uuid.uuid4().hex}"
    building.mkdir()  # not by tempfile, which would hide it from other users for good
    try:
        digest, rgb = hashlib.sha256(), []
        shape = (len(images), preparation.size, preparation.size, 3)
        with (
            (building / "pixels.npy").open("wb") as file,
            closing(_prepared(images, preparation, progress)) as prepared,
        ):
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for pixels, is_rgb in prepared:
                content = np.ascontiguousarray(pixels).data
                file.write(content)
                digest.update(content)
                rgb.append(is_rgb)
        (building / "index.json").write_text(json.dumps({"rgb": rgb, "sha256": digest.hexdigest()}))
        found = _open(building)  # a file that is mapped stays, whatever becomes of its name
        if (entries / key).exists():  # the caller found that one broken, or another process was quicker
            shutil.rmtree(entries / key, ignore_errors=True)
        with suppress(OSError):  # another process was quicker still
            building.rename(entries / key)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    if found is None:
        raise OSError(errno.EIO, "what was just written can't be read")
    return found


def _sweep(entries: Path) -> None:
    """Remove what killed processes left half-built."""
    for path in entries.glob("building-*"):
        with suppress(FileNotFoundError):  # finished by its process meanwhile
            if path.stat().st_mtime < time.time() - ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
