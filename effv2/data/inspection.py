"""Inspection of a data set before training: its content, broken files and duplicates."""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from effv2.core.errors import listed
from effv2.data.dataset import Dataset
from effv2.data.decoder import BROKEN, TOO_LARGE, allow, to_rgb
from effv2.data.folders import Source, left_out_note
from effv2.data.images import LabelledImages

NEAR_BITS = 4  # of 64: the perceptual hashes of nearly identical images differ in at most so many
BANDS = [(0, 13), (13, 13), (26, 13), (39, 13), (52, 12)]  # one more than NEAR_BITS, so that near hashes share a band
LARGEST_GROUP = 4_000  # images with an equal band that are compared with each other
LEAST_SIDE = 32  # pixels: the hashes of smaller images are not meaningful
MOST_NAMED = 5
ROWS, COLUMNS, LEAST_TILE, MOST_TILE, GAP = 40, 8, 48, 128, 2  # of a contact sheet: classes, images per class, pixels
WRONG = "wrong.jpg"  # artifact of a run: the gallery of its most confident mistakes
LINE, LONGEST_LINE = 13, 21  # of a caption: pixels, characters


class Alike(NamedTuple):
    """Two images by part and id. Their files are identical, or their pictures are nearly identical."""

    one: str
    other: str
    identical: bool
    across: bool  # whether they are in two parts
    classes: tuple[str, str]  # classes of the two


@dataclass(frozen=True)
class Inspection:
    """The content of a data set."""

    note: str  # the files that were left out
    classes: Sequence[str]
    counts: dict[str, list[int]]  # images per class, by part
    sizes: Counter[tuple[int, int]]  # width and height
    modes: Counter[str]  # Pillow's
    broken: Sequence[str]
    alike: Sequence[Alike]

    def table(self) -> list[tuple[str, ...]]:
        """Return the number of images per class and part, titles first."""
        rows = zip(*self.counts.values(), strict=True)
        counted = [(name, *(f"{n:,}" for n in row)) for name, row in zip(self.classes, rows, strict=True)]
        total = [f"{sum(each):,}" for each in self.counts.values()]
        return [("class", *self.counts), *counted, (f"{len(self.classes)} classes", *total)]

    def sentences(self) -> Iterator[str]:
        """Describe the images, and the problems with them."""
        if self.sizes:
            ends = [each(self.sizes, key=math.prod) for each in (min, max)]
            least, most, usual = (f"{w}x{h}" for w, h in (*ends, self.sizes.most_common(1)[0][0]))
            between = f"all {usual}" if len(self.sizes) == 1 else f"from {least} to {most}, most often {usual}"
            modes = ", ".join(f"{n:,} {mode}" for mode, n in self.modes.most_common())
            yield f"Sizes in pixels: {between}. Modes: {modes}."
        if self.note:
            yield self.note
        if self.broken:
            yield f"{len(self.broken):,} images can't be read: {listed(self.broken, MOST_NAMED)}."
        for identical, words in ((True, "identical"), (False, "nearly identical")):
            for across, where in ((True, "in two parts, so tests see training images"), (False, "in one part")):
                found = [f"{each.one} and {each.other}" for each in self.alike if each[2:4] == (identical, across)]
                if found:
                    yield f"{len(found):,} pairs are {words} {where}: {listed(found, MOST_NAMED)}."
        if torn := [f"{one} and {other}" for one, other, same, _, of in self.alike if same and of[0] != of[1]]:
            yield f"{len(torn):,} of these pairs are in two classes: {listed(torn, MOST_NAMED)}."
        if "test" not in self.counts and any(each.identical for each in self.alike):
            yield "A test part is split off the training part, so it will contain some of these."

    def harmful(self, skip_broken: bool) -> bool:
        """Say whether a training would fail, learn two labels for one image, or be tested on training images."""
        pairs = (each for each in self.alike if each.identical)
        same = any(each.across or each.classes[0] != each.classes[1] or "test" not in self.counts for each in pairs)
        return same or bool(self.broken and not skip_broken)


class _Seen(NamedTuple):
    name: str
    part: str
    label: str
    digest: bytes
    size: tuple[int, int]
    mode: str
    hash: int


def inspect(
    source: Source, megapixels: float, on_seen: Callable[[int, int], None] = lambda done, total: None
) -> Inspection:
    """Open every image once. An image of more than `megapixels` counts as broken."""
    allow(megapixels)
    named = {"train": source.train, "validation": source.validation, "test": source.test}
    parts = {part: images for part, images in named.items() if images is not None}
    places = [(part, images, index) for part, images in parts.items() for index in range(len(images))]
    seen, broken = list[_Seen](), list[str]()
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for done, found in enumerate(pool.map(lambda place: _look(source.classes, *place), places), 1):
            (broken if isinstance(found, str) else seen).append(found)  # type: ignore[arg-type]
            on_seen(done, len(places))
    counts = {
        part: np.bincount(images.labels, minlength=len(source.classes)).tolist() for part, images in parts.items()
    }
    sizes, modes = Counter(each.size for each in seen), Counter(each.mode for each in seen)
    note = left_out_note(source.location, source.left_out)
    return Inspection(note, source.classes, counts, sizes, modes, broken, list(_alike(seen)))


def _look(classes: Sequence[str], part: str, images: LabelledImages, index: int) -> _Seen | str:
    """Return the facts about an image, or the reason why it can't be read."""
    import imagehash

    name, item = images.ids[index], images.items[index]
    try:
        digest = hashlib.sha256(item.read_bytes() if images.items.dtype == object else item.tobytes()).digest()
        with images.open(index) as image:
            rgb, hashed = to_rgb(image), 0
            if min(rgb.size) >= LEAST_SIDE:
                hashed = int.from_bytes(np.packbits(imagehash.phash(rgb).hash).tobytes(), "big")
            return _Seen(name, part, classes[images.labels[index]], digest, rgb.size, image.mode, hashed)
    except TOO_LARGE:
        return f"{name} (too large, see data.max_megapixels)"
    except BROKEN as error:
        return f"{name} ({type(error).__name__})"


def _alike(seen: Sequence[_Seen]) -> Iterator[Alike]:
    """Yield pairs: each identical file with the first one, and nearly identical pictures."""
    first: dict[bytes, _Seen] = {}
    for each in seen:
        known = first.setdefault(each.digest, each)
        if known is not each:
            yield Alike(known.name, each.name, True, known.part != each.part, (known.label, each.label))
    single = [each for each in first.values() if each.hash]
    for one, other in ((single[i], single[j]) for i, j in near(np.array([each.hash for each in single], np.uint64))):
        yield Alike(one.name, other.name, False, one.part != other.part, (one.label, other.label))


def near(hashes: NDArray[np.uint64]) -> list[tuple[int, int]]:
    """Return the positions of all pairs of hashes (N) that differ in few bits."""
    pairs = set[tuple[int, int]]()
    for start, bits in BANDS:
        band = (hashes >> np.uint64(start)) & np.uint64((1 << bits) - 1)
        order = np.argsort(band, kind="stable")
        starts = np.flatnonzero(np.diff(band[order])) + 1
        for begin, end in pairwise([0, *starts, len(order)]):
            group = order[begin:end][:LARGEST_GROUP]
            if len(group) > 1:
                differing = np.bitwise_count(hashes[group][:, None] ^ hashes[group][None])
                for one, other in np.argwhere(np.triu(differing <= NEAR_BITS, 1)):
                    pairs.add((min(group[one], group[other]), max(group[one], group[other])))
    return sorted((int(one), int(other)) for one, other in pairs)


def contact_sheet(dataset: Dataset) -> Image.Image:
    """Return a few training images per class, one row per class, as they enter the network without augmentation.

    Small images are enlarged and large images are reduced.
    """
    labels, side = dataset.train.labels, dataset.train.pixels.shape[1]
    tile = min(side * max(1, -(-LEAST_TILE // side)), MOST_TILE)
    names, step = dataset.classes[:ROWS], tile + GAP
    left = 8 * min(24, max(map(len, names)))
    sheet = Image.new("RGB", (left + COLUMNS * step, len(names) * step), "white")
    for row, name in enumerate(names):
        _write(sheet, name[:24], (GAP, row * step + tile // 2 - 6))
        shown = torch.nonzero(labels == row).flatten()[:COLUMNS]
        for column, image in enumerate(dataset.train.images(shown)):
            sheet.paste(_scaled(image, tile), (left + column * step, row * step))
    return sheet


def of_each_class(places: Sequence[int], labels: Sequence[int], most: int) -> list[int]:
    """Return the first `places` of each class, equally many per class and at most `most` in total, class by class."""
    by_class: dict[int, list[int]] = {}
    for place in places:
        by_class.setdefault(labels[place], []).append(place)
    each = max(1, most // max(1, len(by_class)))
    return [place for label in sorted(by_class) for place in by_class[label][:each]][:most]


def gallery(images: torch.Tensor, captions: Sequence[Sequence[str]]) -> Image.Image:
    """Return images (N, 3, side, side) of bytes, each above the lines of its caption. Long lines show both ends."""
    width, height = MOST_TILE + 4 * GAP, MOST_TILE + LINE * len(captions[0]) + 4 * GAP
    columns = min(COLUMNS, len(images))
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for place, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = place % columns * width + GAP, place // columns * height + GAP
        sheet.paste(_scaled(image, MOST_TILE), (left, top))
        for number, line in enumerate(caption):
            text = line if len(line) <= LONGEST_LINE else f"{line[:8]}..{line[10 - LONGEST_LINE :]}"
            _write(sheet, text, (left, top + MOST_TILE + LINE * number))
    return sheet


def _scaled(image: torch.Tensor, tile: int) -> Image.Image:
    pixels = image.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels).resize((tile, tile), Image.Resampling.NEAREST)


def _write(sheet: Image.Image, text: str, at: tuple[int, int]) -> None:
    ImageDraw.Draw(sheet).text(at, text.encode("ascii", "replace").decode(), fill="black")
