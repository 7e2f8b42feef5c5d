"""From a DataConfig to decoded, split, digested data. Which samples train, validate and test are pure functions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from effv2.config.schema import DataConfig
from effv2.core.errors import InputError
from effv2.core.randomness import stream_seed
from effv2.data.cache import OnDecoded, decode
from effv2.data.images import LabelledImages, Labels, Square
from effv2.data.sources import Source, open_source

Positions = NDArray[np.int64]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return `tensor` on `device`; CUDA takes its copy before this returns, and the step needn't wait for the rest."""
    return tensor.to(device, non_blocking=device.type == "cuda")


@dataclass(frozen=True)
class Split:
    """Samples of one use: rows of an array of decoded images.

    `pixels` is uint8 (M, H, W, 3) and may be a file mapped into memory, shared by several splits; sample i is
    pixels[rows[i]] with labels[i] (int64) and ids[i].
    """

    pixels: Tensor
    rows: Tensor
    labels: Tensor
    ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def images(self, positions: Tensor) -> Tensor:
        """Return uint8 (B, 3, H, W) of the samples at `positions`, channels last in memory."""
        return self.pixels[to_device(self.rows[positions], self.pixels.device)].permute(0, 3, 1, 2)

    @cached_property
    def image_hashes(self) -> list[bytes]:
        """Return a hash of each sample's pixels."""
        pixels = self.pixels.numpy()
        return [hashlib.sha256(pixels[row].data).digest() for row in self.rows.tolist()]

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
        there: dict[str, Any] = {
            name: replace(each, pixels=moved[id(each.pixels)]) for name, each in self.splits.items()
        }
        return replace(self, **there)

    def digest(self) -> str:
        """Hash everything that a run sees of the data."""
        text = "/".join([*self.classes, *(split.digest for split in self.splits.values())])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_dataset(config: DataConfig, on_decoded: OnDecoded | None = None) -> Dataset:
    """Find, sample, decode and split; InputError for everything that is wrong with the folder."""
    source = open_source(config)
    load = _load_published if config.sampling == "published" else _load_standard
    splits = load(config, source, on_decoded)
    for name, least in (("train", 2), ("test", 1)):
        if len(splits[name]) < least:
            problem = f"{len(splits[name])} images are left to {name} on, {least} are needed"
            raise InputError("data.dir", config.dir, problem, "add images")
    ordered = splits["train"], splits.get("validation"), splits["test"]
    return Dataset(source.name, source.location, source.classes, *ordered)


class _Decoded:
    """The images at `positions` of a part of a source, decoded, from which splits are cut."""

    def __init__(
        self, part: LabelledImages, positions: Positions, config: DataConfig, on_decoded: OnDecoded | None
    ) -> None:
        self._part, self._positions = part, positions
        decoded = decode(part.take(positions), Square(config.image_size), on_decoded)
        self._pixels, self.rgb = torch.from_numpy(decoded.pixels), decoded.rgb

    def split(self, positions: Positions) -> Split:
        """Return the split of the images at these positions of the part."""
        chosen = self._part.take(positions)
        rows = torch.from_numpy(np.searchsorted(self._positions, positions))
        return Split(self._pixels, rows, torch.from_numpy(chosen.labels), chosen.ids)


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
    decoded = {}
    for part in {id(part): part for part, _ in chosen.values()}.values():
        needed = np.unique(np.concatenate([at for of, at in chosen.values() if of is part]))
        decoded[id(part)] = _Decoded(part, needed, config, on_decoded)
    return {name: decoded[id(part)].split(positions) for name, (part, positions) in chosen.items()}


def _load_published(config: DataConfig, source: Source, on_decoded: OnDecoded | None) -> dict[str, Split]:
    """Take the first images a class of the train folder and split 80/20, what isn't RGB dropped before or after."""
    if config.validation_fraction:
        problem = "published sampling has no validation split"
        raise InputError("data.validation_fraction", config.validation_fraction, problem, "set it to 0")

    def halves(part: LabelledImages, first: int | None) -> tuple[Split, Split]:
        positions = first_per_class(part.labels[:first], config.per_class, source.classes)
        decoded = _Decoded(part, positions, config, on_decoded)
        split = np.arange(len(positions)) if source.published.split_first else np.flatnonzero(decoded.rgb)
        parts = published_split(len(split), config.test_fraction, config.split_seed)
        kept, held = (positions[at[decoded.rgb[at]]] for at in (split[part] for part in parts))
        return decoded.split(kept), decoded.split(held)

    train, test = halves(source.train, source.published.first)
    if source.published.test_from_test and source.test is not None:
        _, test = halves(source.test, None)
    return {"train": train, "test": test}


def first_per_class(labels: Labels, per_class: int, classes: tuple[str, ...]) -> Positions:
    """Return the positions of the first `per_class` samples of each class (0 = all), in the given order."""
    return _per_class(labels, per_class, classes, lambda members: members[:per_class])


def sample_per_class(labels: Labels, per_class: int, classes: tuple[str, ...], split_seed: int) -> Positions:
    """Return `per_class` positions of each class at random (0 = all), in the given order."""
    generator = np.random.default_rng(stream_seed(split_seed, "sample"))
    return _per_class(labels, per_class, classes, lambda members: generator.choice(members, per_class, replace=False))


def _per_class(
    labels: Labels, per_class: int, classes: tuple[str, ...], choose: Callable[[Positions], Positions]
) -> Positions:
    if not per_class:
        return np.arange(len(labels))
    counts = np.bincount(labels, minlength=len(classes))
    if counts.min() < per_class:
        problem = f"the class {classes[counts.argmin()]!r} has only {counts.min()} images to take from"
        raise InputError("data.per_class", per_class, problem, "lower data.per_class or add images")
    return np.sort(np.concatenate([choose(np.flatnonzero(labels == label)) for label in range(len(classes))]))


def published_split(count: int, fraction: float, split_seed: int) -> tuple[Positions, Positions]:
    """Split as the published notebooks did: scikit-learn's train_test_split, shuffled, not stratified."""
    from sklearn.model_selection import train_test_split

    if count < 2:
        problem = f"{count} RGB images are left to split, 2 are needed, and published sampling drops all others"
        raise InputError("data.sampling", "published", problem, "choose another set or sampling")
    first, second = train_test_split(np.arange(count), test_size=fraction, random_state=split_seed)
    return first, second


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
