"""Inspection of a data set before training: its content, broken files and duplicates."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, repeat
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from effv2.config.schema import DataConfig
from effv2.core.errors import listed
from effv2.core.words import counted
from effv2.data.dataset import Dataset, Split, decoded_split
from effv2.data.folders import left_out_note
from effv2.data.images import OnDecoded
from effv2.data.sources import open_source

NEAR_BITS = 4  # of 64: the most in which the perceptual hashes of nearly identical images differ
BANDS = [(0, 13), (13, 13), (26, 13), (39, 13), (52, 12)]  # one more than NEAR_BITS, so that near hashes share a band
LARGEST_GROUP = 4_000  # images with an equal band that are compared with each other
LEAST_SIDE = 32  # pixels: the hashes of smaller images are not meaningful
MOST_HASHED = 20_000  # images that the start of a training hashes: a few seconds
MOST_NAMED = 5
ROWS, COLUMNS, TILE, GAP = 40, 8, 128, 2  # at most, of a sheet of images; the last two in pixels
WRONG = "wrong.jpg"  # artifact of a run: the gallery of its most confident mistakes
LINE, LONGEST_LINE = 13, 21  # of a caption: pixels, characters


class Alike(NamedTuple):
    """Two images by id. Their pixels are identical at the decoded size, or their pictures are nearly identical."""

    one: str
    other: str
    identical: bool
    across: bool  # whether they are in two parts
    classes: tuple[str, str]  # classes of the two


@dataclass(frozen=True)
class Inspection:
    """The content of a data set."""

    note: str  # the files that were left out, and suspicious folders
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

    @property
    def kinds(self) -> str:
        """Describe the sizes and modes of the images; empty if unknown."""
        if not self.sizes:
            return ""
        ends = [each(self.sizes, key=math.prod) for each in (min, max)]
        least, most, usual = (f"{w}x{h}" for w, h in (*ends, self.sizes.most_common(1)[0][0]))
        between = f"all {usual}" if len(self.sizes) == 1 else f"from {least} to {most}, most often {usual}"
        modes = ", ".join(f"{n:,} {mode}" for mode, n in self.modes.most_common())
        return f"Sizes in pixels: {between}. Modes: {modes}."

    def pairs(self, identical: bool, across: bool, most: int = MOST_NAMED) -> str:
        """Name the first pairs that are identical or nearly so, in two parts or in one; empty if there are none."""
        found = [f"{each.one} and {each.other}" for each in self.alike if each[2:4] == (identical, across)]
        words = "identical" if identical else "nearly identical"
        where = "in two parts, so tests see training images" if across else "in one part"
        return f"{counted(len(found), f'{words} pair')} {where}: {listed(found, most)}." if found else ""

    def sentences(self) -> Iterator[str]:
        """Describe the images, and the problems with them."""
        yield from filter(None, (self.kinds, self.note))
        if self.broken:
            yield f"{counted(len(self.broken), 'image')} can't be read: {listed(self.broken, MOST_NAMED)}."
        yield from filter(None, (self.pairs(same, across) for same in (True, False) for across in (True, False)))
        if torn := [f"{one} and {other}" for one, other, same, _, of in self.alike if same and of[0] != of[1]]:
            yield f"Of these pairs, {len(torn):,} in two classes: {listed(torn, MOST_NAMED)}."
        if "test" not in self.counts and self.alike:
            yield "A test part is split off the training part, so it may contain some of these."

    def remedy(self, skip_broken: bool) -> str:
        """Say what to do before a training that would fail, learn two labels for one image, or test on training images.

        Empty if there is nothing to do.
        """
        pairs = (each for each in self.alike if each.identical)
        same = any(each.across or each.classes[0] != each.classes[1] or "test" not in self.counts for each in pairs)
        broken = "repair or remove the broken images, or give data.skip_broken true" * bool(
            self.broken and not skip_broken
        )
        return "; ".join(filter(None, (broken, "keep one image of each identical pair" * same)))


class _Seen(NamedTuple):
    name: str
    part: str
    label: str
    digest: bytes
    hash: int


def check(config: DataConfig, on_decoded: OnDecoded | None = None) -> Inspection:
    """Decode all images of a data set into the cache, and inspect them; InputError if there is none."""
    source, parts, broken = open_source(config), dict[str, Split](), list[str]()
    wanted = config.model_copy(update={"image_size": max(config.image_size, LEAST_SIDE), "skip_broken": True})
    for part, images in {"train": source.train, "validation": source.validation, "test": source.test}.items():
        if images is not None:
            split, found = decoded_split(images, wanted, on_decoded)
            parts[part] = split.take(np.setdiff1d(np.arange(len(split)), [*found.broken]))
            broken += [f"{images.ids[at]} ({why})" for at, why in found.broken.items()]
    notes = filter(None, (left_out_note(source.location, source.left_out), _nested(source.classes, parts)))
    return inspect(source.classes, parts, " ".join(notes), broken)


def _nested(classes: Sequence[str], parts: Mapping[str, Split]) -> str:
    """Warn if every class holds several folders and no image of its own: perhaps the folders are the classes."""
    inner: dict[str, set[str]] = {name: set() for name in classes}
    for split in parts.values():
        for place, label in zip(map(str.split, split.ids, repeat("/")), split.labels.tolist(), strict=True):
            if classes[label] not in place[:-2]:  # the image is in its class folder, or has its label from a table
                return ""
            inner[classes[label]].add(place[place.index(classes[label]) + 1])
    if min(map(len, inner.values())) < 2:
        return ""
    example = f"{classes[0]}/{min(inner[classes[0]])}"
    return f"Every class holds folders, such as {example}. If these are the classes, remove the level above them."


def in_short(dataset: Dataset) -> list[str]:
    """Describe the images of a training in at most three lines, besides the notes of the data set."""
    few = sum(map(len, dataset.splits.values())) <= MOST_HASHED
    found = inspect(dataset.classes, dataset.splits, hashed=few)
    near = "" if few else f"`data check` also looks for nearly identical images among more than {MOST_HASHED:,}."
    return [dataset.summary, *filter(None, (found.kinds, near or found.pairs(False, True, most=1)))]


def inspect(
    classes: Sequence[str], parts: Mapping[str, Split], note: str = "", broken: Sequence[str] = (), hashed: bool = True
) -> Inspection:
    """Inspect decoded images by part, if it is known how they were stored; for near ones only if `hashed`."""
    counts = {part: np.bincount(each.labels.numpy(), minlength=len(classes)).tolist() for part, each in parts.items()}
    sizes, modes, seen = Counter[tuple[int, int]](), Counter[str](), list[_Seen]()
    for part, split in parts.items():
        stored = [] if split.stored is None else split.stored[split.rows.numpy()].tolist()
        hashes = perceptual_hashes(split) if hashed and stored else [0] * len(split)
        columns = split.ids, split.labels.tolist(), split.image_hashes, hashes, stored
        for name, label, digest, phash, text in zip(*columns, strict=False):
            if text:
                mode, _, size = text.partition(" ")
                width, height = map(int, size.split("x"))
                sizes[width, height] += 1
                modes[mode] += 1
                large = min(width, height, split.pixels.shape[1]) >= LEAST_SIDE
                seen.append(_Seen(name, part, classes[label], digest, phash * large))
    return Inspection(note, classes, counts, sizes, modes, broken, list(_alike(seen)))


def perceptual_hashes(split: Split) -> list[int]:
    """Return imagehash's phash of each image, 64 bits."""
    import imagehash

    pixels = (split.pixels[row].numpy() for row in split.rows.tolist())
    found = (imagehash.phash(Image.fromarray(each)).hash for each in pixels)
    return [int.from_bytes(np.packbits(each).tobytes(), "big") for each in found]


def _alike(seen: Sequence[_Seen]) -> Iterator[Alike]:
    """Yield pairs: each identical image with the first one, and nearly identical pictures."""
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
    """Return training images of each class, 320 at most, as they enter the network without augmentation."""
    labels = dataset.train.labels.tolist()
    chosen = of_each_class(range(len(labels)), labels, COLUMNS * min(ROWS, len(dataset.classes)))
    return gallery(dataset.train.images(torch.tensor(chosen)), [[dataset.classes[labels[at]]] for at in chosen])


def of_each_class(places: Sequence[int], labels: Sequence[int], most: int) -> list[int]:
    """Return the first `places` of each class, equally many per class and at most `most` in total, class by class."""
    by_class: dict[int, list[int]] = {}
    for place in places:
        by_class.setdefault(labels[place], []).append(place)
    each = max(1, most // max(1, len(by_class)))
    return [place for label in sorted(by_class) for place in by_class[label][:each]][:most]


def gallery(images: torch.Tensor, captions: Sequence[Sequence[str]]) -> Image.Image:
    """Return images (N, 3, side, side) of bytes, each above the lines of its caption. Long lines show both ends."""
    width, height = TILE + 4 * GAP, TILE + LINE * len(captions[0]) + 4 * GAP
    columns = min(COLUMNS, len(images))
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for place, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = place % columns * width + GAP, place // columns * height + GAP
        tile = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
        sheet.paste(tile.resize((TILE, TILE), Image.Resampling.NEAREST), (left, top))
        for number, line in enumerate(caption):
            text = line if len(line) <= LONGEST_LINE else f"{line[:8]}..{line[10 - LONGEST_LINE :]}"
            text = text.encode("ascii", "replace").decode()
            ImageDraw.Draw(sheet).text((left, top + TILE + LINE * number), text, fill="black")
    return sheet
