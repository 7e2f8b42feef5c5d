"""Decode and resize every image once.

An entry holds the pixels of a list of images at one size, and is found by content: the hash of the files'
bytes and of the settings. A second, quicker table leads from the files' names, sizes and modification times
to that hash, so that a second start neither reads nor decodes a file. Entries appear by renaming a finished
folder, so that several processes and a kill can only lose work, never leave half an entry.

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
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

from effv2.data.images import Bytes, Images, sha256_of
from effv2.errors import InputError

FORMAT = 1  # raise it when the decoding below changes
ABANDONED_SECONDS = 24 * 3600
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
    """Pixels (N, size, size, 3), and which of the images were stored as RGB."""

    pixels: Bytes
    rgb: NDArray[np.bool_]


def cache_folder() -> Path:
    """Return EFFV2_CACHE, else the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(os.environ.get("EFFV2_CACHE") or f"{base}/effv2"))  # noqa: PTH111 (never raises)


def decode(images: Images, size: int, progress: Progress | None = None) -> Decoded:
    """Return `images` as RGB of size x size, from the cache where they are there.

    Both sides are resized to `size` (bilinear with antialiasing), whatever the aspect ratio: the published
    rule. InputError names every broken image at once.
    """
    settings = f"{FORMAT}/{size}/Pillow {PIL.__version__}"
    stamp = _sha256(f"{images.stamp()}/{settings}".encode())
    pointer = cache_folder() / "stamps" / stamp
    if found := _follow(pointer):
        return found
    content = _sha256(f"{images.digest()}/{settings}".encode())
    found = _read(content)
    try:
        if found is None:
            (cache_folder() / "entries").mkdir(parents=True, exist_ok=True)  # before the work, not after it
            found = _write(content, _decode_all(images, size, progress))
    except OSError as error:
        raise InputError(
            f"EFFV2_CACHE {cache_folder()}: can't be written ({error.strerror or error}); free space there or set "
            "EFFV2_CACHE to another folder."
        ) from error
    with suppress(OSError):  # a cache that can only be read serves as well
        pointer.parent.mkdir(parents=True, exist_ok=True)
        _replace_file(pointer, content)
    return found


def to_pixels(image: Image.Image, size: int) -> Bytes:
    """Turn an image of any mode into RGB bytes (size, size, 3).

    The served model repeats these lines (it must not need this package); a test holds the two together.
    """
    if image.mode.startswith("I;16"):  # Pillow would clip 16-bit greys at 255
        image = Image.fromarray((np.asarray(image, dtype=np.uint16) >> 8).astype(np.uint8))
    image = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image, dtype=np.uint8)


def _decode_all(images: Images, size: int, progress: Progress | None) -> list[tuple[Bytes, bool]]:
    """Decode in threads (Pillow lets go of the interpreter lock) and collect every failure."""

    def one(index: int) -> tuple[Bytes, bool] | str:
        try:
            image = images.open(index)
            return to_pixels(image, size), image.mode == "RGB"
        except BROKEN as error:
            return f"{images.where(index)} ({type(error).__name__})"

    results: list[tuple[Bytes, bool]] = []
    broken: list[str] = []
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for done, result in enumerate(pool.map(one, range(len(images))), 1):
            if isinstance(result, str):
                broken.append(result)
            else:
                results.append(result)
            if progress:
                progress(done, len(images))
    if broken:
        raise InputError(f"--data-dir: {len(broken)} images can't be read; repair or remove them: {', '.join(broken)}.")
    return results


def _follow(pointer: Path) -> Decoded | None:
    """Return the entry that a stamp leads to; a damaged stamp leads nowhere."""
    try:
        key = pointer.read_text("ascii")
    except (OSError, ValueError):
        return None
    return _read(key) if re.fullmatch("[0-9a-f]{64}", key) else None


def _read(key: str) -> Decoded | None:
    """Return the entry if it is whole: its pixels must have the checksum that was written with them."""
    entry = cache_folder() / "entries" / key
    try:
        index = json.loads((entry / "index.json").read_text())
        rgb, sha256 = np.array(index["rgb"], dtype=bool), index["sha256"]
        pixels = cast(Bytes, np.load(entry / "pixels.npy", mmap_mode="c", allow_pickle=False))
    except (OSError, ValueError, EOFError, KeyError, TypeError):
        return None
    return Decoded(pixels, rgb) if len(rgb) == len(pixels) and sha256_of(pixels) == sha256 else None


def _write(key: str, results: list[tuple[Bytes, bool]]) -> Decoded:
    entries = cache_folder() / "entries"
    _sweep(entries)
    pixels = np.stack([pixels for pixels, _ in results])
    rgb = [is_rgb for _, is_rgb in results]
    building = Path(tempfile.mkdtemp(prefix="building-", dir=entries))
    try:
        with (building / "pixels.npy").open("wb") as file:
            np.save(file, pixels, allow_pickle=False)
            _to_disk(file)
        with (building / "index.json").open("w") as index:
            json.dump({"rgb": rgb, "sha256": sha256_of(pixels)}, index)
            _to_disk(index)
        if (entries / key).exists():  # the caller found that one broken, or another process was quicker
            shutil.rmtree(entries / key, ignore_errors=True)
        building.rename(entries / key)
    except OSError:
        shutil.rmtree(building, ignore_errors=True)
        if not (entries / key).exists():
            raise
    return Decoded(pixels, np.array(rgb, dtype=bool))


def _sweep(entries: Path) -> None:
    """Remove what killed processes left half-built."""
    for path in entries.glob("building-*"):
        with suppress(FileNotFoundError):  # finished by its process meanwhile
            if path.stat().st_mtime < time.time() - ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _to_disk(file: IO[Any]) -> None:
    """Make sure that the content is on the disk before the folder is renamed."""
    file.flush()
    os.fsync(file.fileno())


def _replace_file(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w") as file:
        file.write(text)
    Path(name).replace(path)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
