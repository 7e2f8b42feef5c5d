"""Labelled images, their preparation (to the square of bytes that a network gets), and the cache of the results.

An entry of the cache holds the pixels of a list of images after one preparation. Its key is a hash of the files' bytes
and the settings. A stamp maps the files' names, sizes and times to that key, so that a second start neither reads nor
decodes a file. A finished entry appears by renaming a folder: a kill loses work, but leaves no partial entry.

    <cache>/stamps/<hash of names, sizes, times and settings>    text: the key of the entry
    <cache>/entries/<key>/pixels.npy                             uint8 (N, size, size, 3)
    <cache>/entries/<key>/hashes.npy                             uint8 (N, 32): the SHA-256 of each image's pixels
    <cache>/entries/<key>/index.json                             {"stored": [...], "sha256": "...", "broken": {}}
    <cache>/entries/<key>/whole-<size and times of pixels.npy>   empty: in this state, that file had these hashes
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from effv2.core.errors import InputError
from effv2.core.paths import cache_folder, write_atomically
from effv2.core.provenance import VERSIONS
from effv2.core.words import counted
from effv2.data.decoder import BROKEN, MEGAPIXELS, TOO_LARGE, allow, open_image, prepare

ABANDONED_SECONDS = 24 * 3600
CHUNK = 256  # images decoded at a time, which are held in memory
LARGE = "more than"  # begins the reason for an image with too many pixels
UNKNOWN_FORMAT = "Pillow doesn't know its format"
OnDecoded = Callable[[int, int], None]  # called with the number of decoded images and their total
Labels = NDArray[np.int64]
Bytes = NDArray[np.uint8]
Result = tuple[Bytes, str] | str  # pixels, and how they were stored; or why an image can't be read


@dataclass(frozen=True)
class LabelledImages:
    """Images with labels and ids, in the order (class, file) of the published rule.

    `items` is an array of paths (N), or of bytes: greyscale (N, H, W) or RGB (N, H, W, 3). Files count as unchanged
    as long as their sizes and modification times are unchanged.
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

    def open(self, index: int) -> Image.Image:
        """Open one image, as open_image does. The caller closes it."""
        if self.items.dtype != object:  # the grey channel copied to three, as the published notebooks did
            return Image.fromarray(self.items[index]).convert("RGB")
        return open_image(self.items[index])

    def stamp(self) -> str:
        """Return, quickly, a string that changes whenever the content may have changed."""

        def state(path: Path) -> bytes:
            status = path.stat()
            return os.fsencode(path.absolute()) + f"\0{status.st_size} {status.st_mtime_ns}".encode()

        return self._hash(state)

    def digest(self) -> str:
        """Hash the content."""
        return self._hash(lambda path: hashlib.sha256(path.read_bytes()).digest())

    def _hash(self, of_file: Callable[[Path], bytes]) -> str:
        """Hash the bytes of the array, or the result of `of_file` for each file."""
        if self.items.dtype != object:
            return sha256_of(self.items)
        digest = hashlib.sha256()
        for path in self.items:
            try:
                digest.update(of_file(path))
            except OSError:  # reported when it is decoded
                digest.update(b"unreadable\0" + os.fsencode(path))
        return digest.hexdigest()

    def take(self, positions: Any) -> LabelledImages:
        """Return the images at `positions`."""
        at = np.asarray(positions, dtype=np.int64)
        return LabelledImages(self.items[at], self.labels[at], tuple(map(self.ids.__getitem__, at)))

    def join(self, others: LabelledImages) -> LabelledImages:
        """Return these images followed by `others`, which must be stored in the same form."""
        items, labels = (np.concatenate(both) for both in ((self.items, others.items), (self.labels, others.labels)))
        return LabelledImages(items, labels, self.ids + others.ids)


def sha256_of(array: NDArray[Any]) -> str:
    """Hash an array's bytes without copying them."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def image_hashes(pixels: Bytes) -> Bytes:
    """Return the SHA-256 (N, 32) of each image."""
    digests = b"".join(hashlib.sha256(image.data).digest() for image in np.asarray(pixels))
    return np.frombuffer(digests, dtype=np.uint8).reshape(-1, 32)


@dataclass(frozen=True)
class Square:
    """Both sides resized to `size` (bilinear with antialiasing), whatever the aspect ratio: the published rule.

    Its repr, like that of CentreCrop, is part of the key of the cached images.
    """

    size: int

    def __call__(self, image: Image.Image) -> Bytes:
        """Turn an image of any size and mode into RGB bytes (size, size, 3)."""
        return prepare(image, self.size)


@dataclass(frozen=True)
class CentreCrop:
    """The shorter side resized to `resize`, then the central square of `size`; `interpolation` as in torchvision."""

    size: int
    resize: int
    interpolation: str

    def __call__(self, image: Image.Image) -> Bytes:
        """Turn an image of any size and mode into RGB bytes (size, size, 3)."""
        return prepare(image, self.size, self.resize, self.interpolation.upper())


Preparation = Square | CentreCrop


@dataclass(frozen=True)
class Decoded:
    """Pixels (N, size, size, 3), a file mapped into memory; the hash of each image; the SHA-256 of all.

    `stored` says how images were stored, as in `RGB 500x375`. `broken` holds the reasons for unreadable images, by
    position. Their pixels are black, and their texts in `stored` are empty.
    """

    pixels: Bytes
    hashes: Bytes
    sha256: str
    stored: NDArray[np.str_]
    broken: Mapping[int, str]

    @property
    def sound(self) -> NDArray[np.bool_]:
        """Return which of the images could be read."""
        return np.not_equal(self.stored, "")

    @property
    def rgb(self) -> NDArray[np.bool_]:
        """Return which of the images were stored as RGB."""
        return np.strings.startswith(self.stored, "RGB ")


def decode(
    images: LabelledImages,
    preparation: Preparation,
    on_decoded: OnDecoded | None = None,
    megapixels: float = MEGAPIXELS,
    skip_broken: bool | None = None,
) -> Decoded:
    """Return `images` after `preparation`, from the cache if it has them.

    InputError names all that are broken or have too many pixels, unless they may be skipped (None: never).
    """
    settings = f"{VERSIONS['decoding']}/{preparation}/{megapixels:g}/Pillow {PIL.__version__}"
    folder = cache_folder()

    def key(content: str) -> str:
        return hashlib.sha256(f"{content}/{settings}".encode()).hexdigest()

    def sound(found: Decoded) -> Decoded:
        if found.broken and not skip_broken:
            raise _refusal(images, found.broken, skip_broken is not None)
        return found

    pointer = folder / "stamps" / key(images.stamp())
    with suppress(OSError, ValueError):
        known = _read(folder / "entries" / pointer.read_text("ascii"))
        if known and len(known.stored) == len(images):
            return sound(known)
    entry = folder / "entries" / key(images.digest())
    try:
        if (found := _read(entry)) is None:
            entry.parent.mkdir(parents=True, exist_ok=True)  # checked before the work
            shape = (len(images), preparation.size, preparation.size, 3)
            found = _write(entry, shape, _prepared(images, preparation, on_decoded, megapixels), sound)
    except OSError as error:
        problem = f"can't be written ({error.strerror or error})"
        remedy = "free space there or set EFFV2_CACHE to another folder"
        raise InputError("EFFV2_CACHE", folder, problem, remedy) from error
    with suppress(OSError):  # a read-only cache is also of use
        if all(os.access(images.items[at], os.R_OK) for at in found.broken):  # no stamp shows permissions
            pointer.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(pointer, entry.name)
    return sound(found)


def _refusal(images: LabelledImages, broken: Mapping[int, str], may_skip: bool) -> InputError:
    """Return the error that names the unreadable images and the remedy."""
    named = ", ".join(f"{images.items[at]} ({why})" for at, why in broken.items())
    large = [why.startswith(LARGE) for why in broken.values()]
    remedies = {"raise data.max_megapixels": any(large), "repair or remove them": not all(large)}
    chosen = [remedy for remedy, helps in (remedies | {"give data.skip_broken true": may_skip}).items() if helps]
    return InputError("data.dir", "", f"{counted(len(broken), 'image')} can't be read ({named})", ", or ".join(chosen))


def _prepared(
    images: LabelledImages, preparation: Preparation, on_decoded: OnDecoded | None, megapixels: float
) -> Generator[Result]:
    """Yield the result for each image, in order."""

    def one(index: int) -> Result:
        try:
            with images.open(index) as image:
                image.load()  # which, like later frames, may change the mode
                stored = f"{image.mode} {image.width}x{image.height}"
                return preparation(image), stored
        except TOO_LARGE:
            return f"{LARGE} {megapixels:g} megapixels"
        except BROKEN as error:
            return UNKNOWN_FORMAT if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__

    count = len(images)
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        allow(megapixels)
        pool = ThreadPoolExecutor(os.cpu_count())  # threads suffice: Pillow releases the interpreter lock
        stack.callback(pool.shutdown, cancel_futures=True)
        for start in range(0, count, CHUNK):
            for done, result in enumerate(pool.map(one, range(start, min(start + CHUNK, count))), start + 1):
                yield result
                if on_decoded:
                    on_decoded(done, count)


def _read(entry: Path) -> Decoded | None:
    """Return the entry if it is whole: its pixels have the hashes written with them, or had them when last compared."""
    try:
        index = json.loads((entry / "index.json").read_text())
        stored, sha256 = np.array(index["stored"], dtype=np.str_), str(index["sha256"])
        broken = {int(at): str(why) for at, why in index["broken"].items()}
        pixels: Bytes = np.load(entry / "pixels.npy", mmap_mode="c", allow_pickle=False)
        hashes: Bytes = np.load(entry / "hashes.npy", allow_pickle=False)
        if not _mark(entry).exists():
            if not np.array_equal(hashes, image_hashes(pixels)):
                return None
            _mark_whole(entry)
    except (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError):
        return None
    return Decoded(pixels, hashes, sha256, stored, broken) if len(stored) == len(pixels) == len(hashes) else None


def _mark(entry: Path) -> Path:
    """Return the file whose existence says that the pixels, in the current state of their file, are whole."""
    state = (entry / "pixels.npy").stat()
    return entry / f"whole-{state.st_size}-{state.st_mtime_ns}-{state.st_ctime_ns}"


def _mark_whole(entry: Path) -> None:
    with suppress(OSError):  # the cache may be read-only
        for name in ("pixels.npy", "hashes.npy"):
            with (entry / name).open("rb") as file:
                os.fsync(file.fileno())  # a loss of power must not leave the mark of lost pixels
        _mark(entry).touch()


def _write(
    entry: Path, shape: tuple[int, ...], prepared: Generator[Result], sound: Callable[[Decoded], Decoded]
) -> Decoded:
    """Build an entry, never all of it in memory. The hashes reveal damage by a loss of power.

    `sound` raises an error for content that must not be kept.
    """
    for path in entry.parent.glob("building-*"):  # left by killed processes
        with suppress(FileNotFoundError):  # meanwhile finished by its process
            if path.stat().st_mtime < time.time() - ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
    building = entry.with_name(f"building-{uuid.uuid4().hex}")
    building.mkdir()  # not by tempfile, whose files other users can't read
    black = np.zeros(shape[1:], dtype=np.uint8)
    try:
        digest, stored, broken = hashlib.sha256(), list[str](), dict[int, str]()
        with (building / "pixels.npy").open("wb") as file, closing(prepared):
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for at, result in enumerate(prepared):
                if isinstance(result, str):
                    broken[at] = result
                pixels, how = (black, "") if isinstance(result, str) else result
                content = np.ascontiguousarray(pixels).data
                file.write(content)
                digest.update(content)
                stored.append(how)
        # A mapped file remains usable, even after its name is gone.
        written: Bytes = np.load(building / "pixels.npy", mmap_mode="c", allow_pickle=False)
        sha256, kinds = digest.hexdigest(), np.array(stored, dtype=np.str_)
        found = sound(Decoded(written, image_hashes(written), sha256, kinds, broken))
        np.save(building / "hashes.npy", found.hashes)
        index = {"stored": stored, "sha256": sha256, "broken": broken}
        (building / "index.json").write_text(json.dumps(index))
        _mark_whole(building)
        shutil.rmtree(entry, ignore_errors=True)  # a broken one, or that of a faster process
        with suppress(OSError):  # another process was even faster
            building.rename(entry)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return found
