"""Decode and prepare every image once.

An entry holds the pixels of a list of images after one preparation. Its key is a hash of the files' bytes and the
settings. A stamp leads from the files' names, sizes and modification times to that key, so that a second start neither
reads nor decodes a file. A finished entry appears by renaming a folder: a kill loses work, but leaves no half entry.

    <cache>/stamps/<hash of names, sizes, times and settings>    text: the key of the entry
    <cache>/entries/<key>/pixels.npy                             uint8 (N, size, size, 3)
    <cache>/entries/<key>/index.json                             {"rgb": [...], "sha256": "..."}
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

from effv2.core.errors import InputError
from effv2.core.paths import cache_folder, write_atomically
from effv2.core.provenance import VERSIONS
from effv2.data.images import Bytes, LabelledImages, Preparation, sha256_of

ABANDONED_SECONDS = 24 * 3600
CHUNK = 256  # images decoded at a time, which wait in memory
# What Pillow raises for a broken image, or one that is too large to be honest.
BROKEN = (OSError, ValueError, SyntaxError, Image.DecompressionBombWarning, Image.DecompressionBombError)
OnDecoded = Callable[[int, int], None]  # called with how many images are decoded, and of how many


@dataclass(frozen=True)
class Decoded:
    """Pixels (N, size, size, 3), a file mapped into memory; their SHA-256; which of the images were stored as RGB."""

    pixels: Bytes
    sha256: str
    rgb: NDArray[np.bool_]


def decode(images: LabelledImages, preparation: Preparation, on_decoded: OnDecoded | None = None) -> Decoded:
    """Return `images` as `preparation` makes them, from the cache where it has them; InputError names all broken."""
    settings = f"{VERSIONS['decoding']}/{preparation}/Pillow {PIL.__version__}"
    folder = cache_folder()

    def key(content: str) -> str:
        return hashlib.sha256(f"{content}/{settings}".encode()).hexdigest()

    pointer = folder / "stamps" / key(images.stamp())
    with suppress(OSError, ValueError):
        known = pointer.read_text("ascii")
        found = _read(folder / "entries" / known) if re.fullmatch("[0-9a-f]{64}", known) else None
        if found and len(found.rgb) == len(images):
            return found
    entry = folder / "entries" / key(images.digest())
    try:
        if (found := _read(entry)) is None:
            entry.parent.mkdir(parents=True, exist_ok=True)  # before the work, not after it
            shape = (len(images), preparation.size, preparation.size, 3)
            found = _write(entry, shape, _prepared(images, preparation, on_decoded))
    except OSError as error:
        problem = f"can't be written ({error.strerror or error})"
        remedy = "free space there or set EFFV2_CACHE to another folder"
        raise InputError("EFFV2_CACHE", folder, problem, remedy) from error
    with suppress(OSError):  # a cache that can only be read serves as well
        pointer.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(pointer, entry.name)
    return found


def _prepared(
    images: LabelledImages, preparation: Preparation, on_decoded: OnDecoded | None
) -> Generator[tuple[Bytes, bool]]:
    """Yield pixels, and whether they were stored as RGB, in order; every failure is collected for the end."""

    def one(index: int) -> tuple[Bytes, bool] | str:
        try:
            image = images.open(index)
            return preparation(image), image.mode == "RGB"
        except BROKEN as error:
            return f"{images.items[index]} ({type(error).__name__})"

    broken, count = list[str](), len(images)
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        pool = ThreadPoolExecutor(os.cpu_count())  # threads suffice: Pillow lets go of the interpreter lock
        stack.callback(pool.shutdown, cancel_futures=True)
        for start in range(0, count, CHUNK):
            for done, result in enumerate(pool.map(one, range(start, min(start + CHUNK, count))), start + 1):
                if isinstance(result, str):
                    broken.append(result)
                else:
                    yield result
                if on_decoded:
                    on_decoded(done, count)
    if broken:
        problem = f"{len(broken)} images can't be read ({', '.join(broken)})"
        raise InputError("data.dir", "", problem, "repair or remove them")


def _read(entry: Path) -> Decoded | None:
    """Return the entry if it is whole: its pixels must have the checksum that was written with them."""
    try:
        index = json.loads((entry / "index.json").read_text())
        rgb, sha256 = np.array(index["rgb"], dtype=bool), str(index["sha256"])
        pixels: Bytes = np.load(entry / "pixels.npy", mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError, KeyError, TypeError):
        return None
    return Decoded(pixels, sha256, rgb) if len(rgb) == len(pixels) and sha256_of(pixels) == sha256 else None


def _write(entry: Path, shape: tuple[int, ...], prepared: Generator[tuple[Bytes, bool]]) -> Decoded:
    """Build an entry, never all of it in memory; what a loss of power tears, the checksum tells."""
    for path in entry.parent.glob("building-*"):  # of processes that were killed
        with suppress(FileNotFoundError):  # finished by its process meanwhile
            if path.stat().st_mtime < time.time() - ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
    building = entry.with_name(f"building-{uuid.uuid4().hex}")
    building.mkdir()  # not by tempfile, which would hide it from other users for good
    try:
        digest, rgb = hashlib.sha256(), []
        with (building / "pixels.npy").open("wb") as file, closing(prepared):
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for pixels, is_rgb in prepared:
                content = np.ascontiguousarray(pixels).data
                file.write(content)
                digest.update(content)
                rgb.append(is_rgb)
        (building / "index.json").write_text(json.dumps({"rgb": rgb, "sha256": digest.hexdigest()}))
        # A file that is mapped stays, whatever becomes of its name.
        written: Bytes = np.load(building / "pixels.npy", mmap_mode="c", allow_pickle=False)
        shutil.rmtree(entry, ignore_errors=True)  # one that is broken, or of another process that was quicker
        with suppress(OSError):  # another process was quicker still
            building.rename(entry)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return Decoded(written, digest.hexdigest(), np.array(rgb, dtype=bool))
