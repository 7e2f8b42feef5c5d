"""From a DataConfig to decoded, split, digested data."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from effv2.config.schema import DataConfig
from effv2.core.errors import InputError
from effv2.data import cache
from effv2.data.images import Part
from effv2.data.preparation import Square
from effv2.data.sources import Source, open_source
from effv2.data.splits import (
    Positions,
    first_per_class,
    published_split,
    sample_per_class,
    stratified_split,
)
from effv2.data.transfer import send


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
        return self.pixels[send(self.rows[positions], self.pixels.device)].permute(0, 3, 1, 2)

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

        def there(split: Split) -> Split:
            return replace(split, pixels=moved[id(split.pixels)])

        validation = there(self.validation) if self.validation is not None else None
        return replace(self, train=there(self.train), validation=validation, test=there(self.test))

    def digest(self) -> str:
        """Hash everything that a run sees of the data."""
        text = "/".join([*self.classes, *(split.digest for split in self.splits.values())])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_dataset(config: DataConfig, progress: cache.Progress | None = None) -> Dataset:
    """Find, sample, decode and split; InputError for everything that is wrong with the folder."""
    source = open_source(config)
    load = _load_published if config.sampling == "published" else _load_standard
    train, validation, test = load(config, source, progress)
    if len(train) < 2:
        raise InputError(f"--data-dir {config.dir}: fewer than 2 images are left to train on; add images.")
    if not test:
        raise InputError(f"--data-dir {config.dir}: no image is left to test on; add images.")
    return Dataset(source.name, source.location, source.classes, train, validation, test)


Splits = tuple[Split, Split | None, Split]


class _DecodedPart:
    """The samples at `positions` of a part, decoded, from which splits are cut."""

    def __init__(self, part: Part, positions: Positions, config: DataConfig, progress: cache.Progress | None) -> None:
        self.part, self.positions = part, positions
        self.decoded = cache.decode(part.take(positions).images, Square(config.image_size), progress)
        self.pixels = torch.from_numpy(self.decoded.pixels)

    def split(self, positions: Positions) -> Split:
        """Return the split of the samples at these positions of the part."""
        chosen = self.part.take(positions)
        rows = torch.from_numpy(np.searchsorted(self.positions, positions))
        return Split(self.pixels, rows, torch.from_numpy(chosen.labels), chosen.ids)


def _load_standard(config: DataConfig, source: Source, progress: cache.Progress | None) -> Splits:
    """Hold out the test and validation images first, so that `per_class` never changes them."""

    def carve(part: Part, positions: Positions, fraction: float, stream: str) -> tuple[Positions, Positions]:
        labels = part.labels[positions]
        kept, held = stratified_split(labels, fraction, source.classes, config.split_seed, stream)
        return positions[kept], positions[held]

    train = np.arange(len(source.train))
    chosen: dict[str, tuple[Part, Positions]] = {}
    if source.test is None:
        train, test = carve(source.train, train, config.test_fraction, "test")
        chosen["test"] = (source.train, test)
    else:
        chosen["test"] = (source.test, np.arange(len(source.test)))
    if config.validation_fraction and source.validation is None:
        train, validation = carve(source.train, train, config.validation_fraction, "validation")
        chosen["validation"] = (source.train, validation)
    elif config.validation_fraction and source.validation is not None:
        chosen["validation"] = (source.validation, np.arange(len(source.validation)))
    sampled = sample_per_class(source.train.labels[train], config.per_class, source.classes, config.split_seed)
    chosen["train"] = (source.train, train[sampled])

    # What comes from one part shares one cache entry: without per_class, whatever the split seed.
    decoded = {}
    for part in {id(part): part for part, _ in chosen.values()}.values():
        needed = np.unique(np.concatenate([at for of, at in chosen.values() if of is part]))
        decoded[id(part)] = _DecodedPart(part, needed, config, progress)
    splits = {name: decoded[id(part)].split(positions) for name, (part, positions) in chosen.items()}
    return splits["train"], splits.get("validation"), splits["test"]


def _load_published(config: DataConfig, source: Source, progress: cache.Progress | None) -> Splits:
    """Take the first images a class of the train folder and split 80/20, what isn't RGB dropped before or after."""
    if config.validation_fraction:
        raise InputError(
            f"data.validation_fraction {config.validation_fraction}: published sampling has no validation split; "
            "set it to 0."
        )

    def halves(part: Part, first: int | None) -> tuple[Split, Split]:
        positions = first_per_class(part.labels[:first], config.per_class, source.classes)
        decoded = _DecodedPart(part, positions, config, progress)
        rgb = decoded.decoded.rgb
        split = np.arange(len(positions)) if source.published.split_first else np.flatnonzero(rgb)
        parts = published_split(len(split), config.test_fraction, config.split_seed)
        kept, held = (positions[at[rgb[at]]] for at in (split[part] for part in parts))
        return decoded.split(kept), decoded.split(held)

    train, test = halves(source.train, source.published.first)
    if source.published.test_from_test and source.test is not None:
        _, test = halves(source.test, None)
    return train, None, test
