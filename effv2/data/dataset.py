"""From a DataConfig to decoded, split, digested data. Which samples train, validate and test are pure functions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from effv2.config.schema import DataConfig
from effv2.core.errors import InputError
from effv2.core.randomness import stream_seed
from effv2.data.hashes import Hashes, image_hashes
from effv2.data.images import LabelledImages, Labels, OnDecoded, Square, decode
from effv2.data.sources import Source, open_source

Positions = NDArray[np.int64]
LoadData = Callable[[DataConfig], "Dataset"]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return `tensor` on `device`; CUDA takes its copy before this returns, and the step needn't wait for the rest."""
    return tensor.to(device, non_blocking=device.type == "cuda")


@dataclass(frozen=True)
class Split:
    """Samples of one use: rows of an array of decoded images.

    `pixels` is uint8 (M, H, W, 3) and may be a file mapped into memory, shared by several splits; sample i is
    pixels[rows[i]] with labels[i] (int64) and ids[i]. `hashes` are those of all pixels (data.hashes), where known.
    """

    pixels: Tensor
    rows: Tensor
    labels: Tensor
    ids: tuple[str, ...]
    hashes: Hashes | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, positions: Positions) -> Split:
        """Return the samples at `positions`."""
        at = torch.from_numpy(positions)
        ids = tuple(map(self.ids.__getitem__, positions))
        return Split(self.pixels, self.rows[at], self.labels[at], ids, self.hashes)

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
        """Hash pixels, labels and ids, in order; the same samples have the same digest wherever they lie."""
        digest = hashlib.sha256(b"".join(self.image_hashes) + self.labels.numpy().tobytes())
        digest.update("\0".join(self.ids).encode())
        return digest.hexdigest()[:16]

    def images_also_in(self, other: Split) -> int:
        """Count the samples whose pixels, at this size, are those of a sample of `other`."""
        return sum(map(set(other.image_hashes).__contains__, self.image_hashes))


@dataclass(frozen=True)
class Dataset:
    """Class names and the splits; `location` says where the images came from."""

    name: str
    location: str
    classes: tuple[str, ...]
    train: Split
    validation: Split | None
    test: Split

    @property
    def splits(self) -> dict[str, Split]:
        """Return the splits there are, by name."""
        named = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in named.items() if split is not None}

    @property
    def bytes(self) -> int:
        """Return the size of all pixels; an array that splits share counts once."""
        return sum({id(split.pixels): split.pixels.nbytes for split in self.splits.values()}.values())

    def on(self, device: torch.device) -> Dataset:
        """Return the data set with its pixels on `device`, still shared by its splits; labels stay on the CPU."""
        moved = {id(split.pixels): split.pixels.to(device) for split in self.splits.values()}
        there: dict[str, Any] = {name: replace(s, pixels=moved[id(s.pixels)]) for name, s in self.splits.items()}
        return replace(self, **there)

    def digest(self) -> str:
        """Hash everything that a run sees of the data."""
        text = "/".join([*self.classes, *(split.digest for split in self.splits.values())])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_once(on_decoded: OnDecoded) -> LoadData:
    """Return what loads data sets, each once a process."""
    return cache(lambda config: load_dataset(config, on_decoded))


def load_dataset(config: DataConfig, on_decoded: OnDecoded | None = None) -> Dataset:
    """Find, sample, decode and split; InputError for everything that is wrong with the folder."""
    source = open_source(config)
    load = _load_published if config.sampling == "published" else _load_standard
    splits = load(config, source, on_decoded)
    if len(splits["train"]) < 2:  # batch norm can't train on one
        raise InputError("data.dir", config.dir, "less than 2 images are left to train on", "add images")
    return Dataset(config.dataset, source.location, source.classes, validation=splits.pop("validation", None), **splits)


def _decoded(
    part: LabelledImages, positions: Positions, config: DataConfig, on_decoded: OnDecoded | None
) -> tuple[Split, NDArray[np.bool_]]:
    """Decode the images at `positions` of a part of a source; return them, and which were stored as RGB."""
    chosen = part.take(positions)
    found = decode(chosen, Square(config.image_size), on_decoded)
    labels, rows = torch.from_numpy(chosen.labels), torch.arange(len(positions))
    return Split(torch.from_numpy(found.pixels), rows, labels, chosen.ids, image_hashes(found.pixels)), found.rgb


def _load_standard(config: DataConfig, source: Source, on_decoded: OnDecoded | None) -> dict[str, Split]:
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
            kept, held = stratified_split(labels, fraction, source.classes, config.split_seed, name)
            left, chosen[name] = left[kept], (source.train, left[held])
    sampled = sample_per_class(source.train.labels[left], config.per_class, source.classes, config.split_seed)
    chosen["train"] = source.train, left[sampled]

    # What comes from one part shares one cache entry: without per_class, whatever the split seed.
    splits: dict[str, Split] = {}
    for part in {id(part): part for part, _ in chosen.values()}.values():
        positions = {name: at for name, (of, at) in chosen.items() if of is part}
        needed = np.unique(np.concatenate(list(positions.values())))
        whole, _ = _decoded(part, needed, config, on_decoded)
        splits |= {name: whole.take(np.searchsorted(needed, at)) for name, at in positions.items()}
    return splits


def _load_published(config: DataConfig, source: Source, on_decoded: OnDecoded | None) -> dict[str, Split]:
    """Take the first images of each class, drop what isn't RGB, and split 80/20, shuffled, as the notebooks did."""
    from sklearn.model_selection import train_test_split

    if config.validation_fraction:
        problem = "published sampling has no validation split"
        raise InputError("data.validation_fraction", config.validation_fraction, problem, "set it to 0")

    def halves(part: LabelledImages) -> list[Split]:
        positions = sample_per_class(part.labels, config.per_class, source.classes, None)
        whole, rgb = _decoded(part, positions, config, on_decoded)
        left = np.arange(len(whole)) if source.published_split_first else np.flatnonzero(rgb)
        sizes = {"test_size": config.test_fraction, "random_state": config.split_seed}
        parts = train_test_split(left, **sizes) if len(left) > 1 else (left, left)
        train, test = (at[rgb[at]] for at in parts)
        if len(train) < 2 or not len(test):
            problem = f"only {rgb.sum()} RGB images are left to split, and published sampling drops all others"
            raise InputError("data.sampling", "published", problem, "choose another set or sampling")
        return [whole.take(train), whole.take(test)]

    pairs = list(map(halves, source.published or (source.train,)))
    return {"train": pairs[0][0], "test": pairs[-1][1]}


def sample_per_class(labels: Labels, per_class: int, classes: tuple[str, ...], seed: int | None) -> Positions:
    """Return `per_class` positions of each class (0 = all), in the given order; the first ones where `seed` is None."""
    if not per_class:
        return np.arange(len(labels))
    counts = np.bincount(labels, minlength=len(classes))
    if counts.min() < per_class:
        problem = f"the class {classes[counts.argmin()]!r} has only {counts.min()} images to take from"
        raise InputError("data.per_class", per_class, problem, "lower data.per_class or add images")
    members = [np.flatnonzero(labels == label) for label in range(len(classes))]
    if seed is None:
        return np.sort(np.concatenate([each[:per_class] for each in members]))
    generator = np.random.default_rng(stream_seed(seed, "sample"))
    return np.sort(np.concatenate([generator.choice(each, per_class, replace=False) for each in members]))


def stratified_split(
    labels: Labels, fraction: float, classes: tuple[str, ...], split_seed: int, stream: str
) -> tuple[Positions, Positions]:
    """Split `fraction` of each class off (at least one sample); both parts keep the given order."""
    generator = np.random.default_rng(stream_seed(split_seed, stream))
    held = []
    for label, name in enumerate(classes):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            problem = f"the class {name!r} has only {len(members)} images to split for {stream}, 2 are needed"
            raise InputError("data.dir", "", problem, "add images or remove the class")
        count = min(len(members) - 1, max(1, round(fraction * len(members))))
        held.append(generator.choice(members, count, replace=False))
    second = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), second), second
