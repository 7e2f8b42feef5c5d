"""From a DataConfig to decoded data with splits and a digest. The splits are pure functions of config and source."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from effv2.config.schema import DataConfig
from effv2.core.errors import InputError
from effv2.core.randomness import stream_seed
from effv2.core.reporter import Reporter
from effv2.data.folders import Source, left_out_note, unreadable_note
from effv2.data.images import Bytes, Decoded, LabelledImages, Labels, OnDecoded, Square, decode, image_hashes
from effv2.data.sources import open_source

Positions = NDArray[np.int64]
LoadData = Callable[[DataConfig], "Dataset"]
Decode = Callable[[LabelledImages, Positions], "tuple[Split, Decoded]"]  # of positions in a part of a source


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return `tensor` on `device`. CUDA reads it before this returns, and the step need not wait for the transfer."""
    return tensor.to(device, non_blocking=device.type == "cuda")


@dataclass(frozen=True)
class Split:
    """The samples of one split: rows of an array of decoded images.

    `pixels` is uint8 (M, H, W, 3). It may be a file mapped into memory, and several splits may share it. Sample i is
    pixels[rows[i]] with labels[i] (int64) and ids[i]. `hashes` and `stored` are about all pixels, as in
    images.Decoded, if known.
    """

    pixels: Tensor
    rows: Tensor
    labels: Tensor
    ids: tuple[str, ...]
    hashes: Bytes | None = None
    stored: NDArray[np.str_] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, positions: Positions) -> Split:
        """Return the samples at `positions`."""
        at = torch.from_numpy(positions)
        ids = tuple(map(self.ids.__getitem__, positions))
        return replace(self, rows=self.rows[at], labels=self.labels[at], ids=ids)

    def on(self, device: torch.device) -> Split:
        """Return the samples with the pixels on `device`; labels stay on the CPU."""
        return replace(self, pixels=self.pixels.to(device))

    def images(self, positions: Tensor) -> Tensor:
        """Return uint8 (B, 3, H, W) of the samples at `positions`, channels last in memory."""
        return self.pixels[to_device(self.rows[positions], self.pixels.device)].permute(0, 3, 1, 2)

    @cached_property
    def image_hashes(self) -> list[bytes]:
        """Return a hash of each sample's pixels."""
        hashes = image_hashes(self.pixels.numpy()) if self.hashes is None else self.hashes
        return [each.tobytes() for each in hashes[self.rows.numpy()]]

    @cached_property
    def digest(self) -> str:
        """Hash pixels, labels and ids, in order. The same samples have the same digest wherever they are stored."""
        digest = hashlib.sha256(b"".join(self.image_hashes) + self.labels.numpy().tobytes())
        digest.update("\0".join(self.ids).encode())
        return digest.hexdigest()[:16]

    def also_in(self, other: Split) -> dict[str, str]:
        """Return the samples whose pixels, at this size, equal those of a sample of `other`, mapped to that sample."""
        theirs = dict(zip(other.image_hashes, other.ids, strict=True))
        return {id_: theirs[image] for id_, image in zip(self.ids, self.image_hashes, strict=True) if image in theirs}


@dataclass(frozen=True)
class Dataset:
    """Class names and the splits. `location` is the place of the images.

    `left_out` counts files there that were not used, by kind. `broken` holds the reasons for images, by their ids.
    """

    name: str
    location: str
    classes: tuple[str, ...]
    train: Split
    validation: Split | None
    test: Split
    left_out: Mapping[str, int] = field(default_factory=dict)
    broken: Mapping[str, str] = field(default_factory=dict)
    resized: Callable[[int], Dataset] | None = None  # loads the data at another size, for at_size

    @cached_property
    def notes(self) -> list[str]:
        """Return warnings about the data, one sentence each, to read before trusting results."""
        found = [note] if (note := left_out_note(self.location, self.left_out)) else []
        if self.broken:
            found.append(unreadable_note([*self.broken]))
        for (first, one), (second, other) in combinations(self.splits.items(), 2):
            if shared := other.also_in(one):
                example = " is ".join(next(iter(shared.items())))
                pixels = f"the same pixels, at this size, as images of {first}"
                found.append(f"{len(shared)} images of {second} have {pixels}: {example}.")
        return found

    @property
    def summary(self) -> str:
        """Describe the number of images per split, and the smallest and the largest class of the training split."""
        counts = np.bincount(self.train.labels.numpy(), minlength=len(self.classes))
        ends = [f"{counts[at]:,} ({self.classes[at]})" for at in (counts.argmin(), counts.argmax())]
        between = f"{counts[0]:,}" if counts.min() == counts.max() else " to ".join(ends)
        held = ", ".join(f"{name} {len(split):,}" for name, split in self.splits.items())
        return f"Data: {len(self.classes)} classes; {held} images. Training images per class: {between}."

    @property
    def splits(self) -> dict[str, Split]:
        """Return the existing splits, by name."""
        named = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in named.items() if split is not None}

    @property
    def bytes(self) -> int:
        """Return the size of all pixels in bytes. An array that splits share counts once."""
        return sum({id(split.pixels): split.pixels.nbytes for split in self.splits.values()}.values())

    def at_size(self, size: int) -> Dataset:
        """Return the same images with sides of `size` pixels, decoded at that size."""
        return self if self.resized is None or size == self.train.pixels.shape[1] else self.resized(size)

    def on(self, device: torch.device) -> Dataset:
        """Return the data set with its pixels on `device`, still shared by its splits; labels stay on the CPU."""
        moved = {id(split.pixels): split.pixels.to(device) for split in self.splits.values()}
        there: dict[str, Any] = {name: replace(s, pixels=moved[id(s.pixels)]) for name, s in self.splits.items()}
        return replace(self, **there)

    def digest(self) -> str:
        """Hash everything in the data that a run depends on."""
        text = "/".join([*self.classes, *(split.digest for split in self.splits.values())])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_once(reporter: Reporter) -> LoadData:
    """Return a function that loads data sets, each once per process, and reports the warnings about each."""

    @cache
    def once(config: DataConfig) -> Dataset:
        reporter.progress("reading the data")
        dataset = load_dataset(config, partial(reporter.progress, "decoding images"))
        for note in dataset.notes:
            reporter.message(note)
        return dataset

    return lambda config: once(config.model_copy(update={"normalise": "none"}))  # which doesn't change the data


def load_dataset(config: DataConfig, on_decoded: OnDecoded | None = None) -> Dataset:
    """Find, sample, decode and split the images; InputError for any problem with the folder."""
    source, broken = open_source(config), dict[str, str]()

    def decoded(part: LabelledImages, positions: Positions) -> tuple[Split, Decoded]:
        split, found = decoded_split(part.take(positions), config, on_decoded)
        broken.update((split.ids[at], why) for at, why in found.broken.items())
        return split, found

    load = _load_published if config.sampling == "published" else _load_standard
    splits = load(config, source, decoded)
    if len(splits["train"]) < 2:  # batch norm can't train on one
        raise InputError("data.dir", config.dir, "fewer than 2 images are left to train on", "add images")
    if empty := [name for name, split in splits.items() if not len(split)]:
        raise InputError("data.dir", config.dir, f"no image of the {empty[0]} part can be read", "add images")
    learned = set(splits["train"].labels.tolist())
    if broken and not config.allow_incomplete_classes and len(learned) < len(source.classes):
        lacking = next(name for label, name in enumerate(source.classes) if label not in learned)
        remedy = "add images, or give data.allow_incomplete_classes true"
        raise InputError("data.dir", config.dir, f"no training image of the class {lacking!r} can be read", remedy)

    @cache
    def resized(size: int) -> Dataset:
        return load_dataset(config.model_copy(update={"image_size": size}), on_decoded)

    about = config.dataset, source.location, source.classes
    parts = splits["train"], splits.get("validation"), splits["test"]
    return Dataset(*about, *parts, source.left_out, broken, resized)


def decoded_split(images: LabelledImages, config: DataConfig, on_decoded: OnDecoded | None) -> tuple[Split, Decoded]:
    """Return images as the network gets them, and the facts about them; InputError as in `decode`."""
    found = decode(images, Square(config.image_size), on_decoded, config.max_megapixels, config.skip_broken)
    pixels, rows, labels = torch.from_numpy(found.pixels), torch.arange(len(images)), torch.from_numpy(images.labels)
    return Split(pixels, rows, labels, images.ids, found.hashes, found.stored), found


def _load_standard(config: DataConfig, source: Source, decoded: Decode) -> dict[str, Split]:
    """Hold out the test and validation images first, so that `per_class` never changes them."""
    left = np.arange(len(source.train))
    chosen: dict[str, tuple[LabelledImages, Positions]] = {}
    for name, part, fraction in (
        ("test", source.test, config.test_fraction),
        ("validation", source.validation, config.validation_fraction),
    ):
        if part is not None and fraction:
            chosen[name] = part, np.arange(len(part))
        elif fraction:
            labels = source.train.labels[left]
            few = config.allow_incomplete_classes
            kept, held = stratified_split(labels, fraction, source.classes, config.split_seed, name, allow_few=few)
            left, chosen[name] = left[kept], (source.train, left[held])
    labels, few = source.train.labels[left], config.allow_incomplete_classes
    sampled = sample_per_class(labels, config.per_class, source.classes, config.split_seed, few)
    chosen["train"] = source.train, left[sampled]

    # All splits of one part share one cache entry. Without per_class, it is the same for every split seed.
    splits: dict[str, Split] = {}
    for part in {id(part): part for part, _ in chosen.values()}.values():
        positions = {name: at for name, (of, at) in chosen.items() if of is part}
        needed = np.unique(np.concatenate(list(positions.values())))
        whole, found = decoded(part, needed)
        rows = {name: np.searchsorted(needed, at) for name, at in positions.items()}
        splits |= {name: whole.take(at[found.sound[at]]) for name, at in rows.items()}
    return splits


def _load_published(config: DataConfig, source: Source, decoded: Decode) -> dict[str, Split]:
    """Take the first images of each class, drop others than RGB, and split 80/20, shuffled, as the notebooks do."""
    from sklearn.model_selection import train_test_split

    if config.validation_fraction:
        problem = "published sampling has no validation split"
        raise InputError("data.validation_fraction", config.validation_fraction, problem, "set it to 0")

    def halves(part: LabelledImages) -> list[Split]:
        few = config.allow_incomplete_classes
        positions = sample_per_class(part.labels, config.per_class, source.classes, None, few)
        whole, found = decoded(part, positions)
        rgb = found.rgb
        left = np.flatnonzero(found.sound if source.published_split_first else rgb)
        sizes = {"test_size": config.test_fraction, "random_state": config.split_seed}
        try:
            train, test = (at[rgb[at]] for at in train_test_split(left, **sizes))
        except ValueError:  # one of the two would be empty
            train = test = left[:0]
        if len(train) < 2 or not len(test):
            problem = f"only {rgb.sum()} RGB images are left to split, and published sampling drops all others"
            raise InputError("data.sampling", "published", problem, "choose another data set or sampling")
        return [whole.take(train), whole.take(test)]

    pairs = list(map(halves, source.published or (source.train,)))
    return {"train": pairs[0][0], "test": pairs[-1][1]}


def sample_per_class(
    labels: Labels, per_class: int, classes: tuple[str, ...], seed: int | None, allow_few: bool = False
) -> Positions:
    """Return `per_class` positions of each class (0 = all), in the given order; the first ones if `seed` is None.

    InputError for a class with fewer images, unless that is allowed.
    """
    if not per_class:
        return np.arange(len(labels))
    counts = np.bincount(labels, minlength=len(classes))
    if counts.min() < per_class and not allow_few:
        problem = f"the class {classes[counts.argmin()]!r} has only {counts.min()} images"
        raise InputError("data.per_class", per_class, problem, "lower data.per_class or add images")
    members = [np.flatnonzero(labels == label) for label in range(len(classes))]
    if seed is None:
        return np.sort(np.concatenate([each[:per_class] for each in members]))
    generator = np.random.default_rng(stream_seed(seed, "sample"))
    return np.sort(
        np.concatenate([generator.choice(each, min(per_class, len(each)), replace=False) for each in members])
    )


def stratified_split(
    labels: Labels, fraction: float, classes: tuple[str, ...], split_seed: int, stream: str, *, allow_few: bool = False
) -> tuple[Positions, Positions]:
    """Split off `fraction` of each class (at least one sample). Both parts keep the given order.

    InputError for a class of less than two images, unless that is allowed: such a class then remains whole. It isn't
    allowed for all classes.
    """
    members = [np.flatnonzero(labels == label) for label in range(len(classes))]
    enough = [each for each in members if len(each) > 1]
    if len(enough) < len(members) and not (allow_few and enough):
        name, count = next((name, len(each)) for name, each in zip(classes, members, strict=True) if len(each) < 2)
        problem = f"the class {name!r} has only {count} images to split for {stream}, but 2 are needed"
        remedy = "add images" + ", remove the class, or give data.allow_incomplete_classes true" * (not allow_few)
        raise InputError("data.dir", "", problem, remedy)
    generator = np.random.default_rng(stream_seed(split_seed, stream))
    counts = [min(len(each) - 1, max(1, round(fraction * len(each)))) for each in enough]
    held = [generator.choice(each, count, replace=False) for each, count in zip(enough, counts, strict=True)]
    second = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), second), second
