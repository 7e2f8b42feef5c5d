"""Data sets by the names of torchvision's classes, which find, verify and, on request, download them.

Their own train, validation and test parts are used. A new one is a line of SETS.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from effv2.config.schema import DATASETS, DataConfig
from effv2.core.errors import InputError
from effv2.core.internals import pet_files
from effv2.data.folder_names import printable
from effv2.data.folders import Source
from effv2.data.sources import NUMERALS, folder_of, from_arrays, refuse_layout

if TYPE_CHECKING:
    from effv2.data.images import LabelledImages

PUBLISHED_IMAGES = 20_000  # images of MNIST's training part in the post's protocol


class Parts(NamedTuple):
    """A class of torchvision, with its arguments for each part. Without a test part, one is split off.

    `images` is the number of images, for a class that doesn't notice missing files, as after a killed download.
    """

    name: str
    arguments: Mapping[str, Mapping[str, Any]]
    images: int = 0


FLAG = {"train": {"train": True}, "test": {"train": False}}
SPLIT = {"train": {"split": "train"}, "test": {"split": "test"}}
VALIDATION = {"validation": {"split": "val"}}
SETS = {
    "mnist": Parts("MNIST", FLAG),
    "fashion_mnist": Parts("FashionMNIST", FLAG),
    "kmnist": Parts("KMNIST", FLAG),
    "cifar10": Parts("CIFAR10", FLAG),
    "cifar100": Parts("CIFAR100", FLAG),
    "svhn": Parts("SVHN", SPLIT),
    "stl10": Parts("STL10", SPLIT),
    "food101": Parts("Food101", SPLIT),
    "stanford_cars": Parts("StanfordCars", SPLIT),
    "oxford_pets": Parts("OxfordIIITPet", {"train": {"split": "trainval"}, "test": {"split": "test"}}),
    "flowers102": Parts("Flowers102", SPLIT | VALIDATION),
    "dtd": Parts("DTD", SPLIT | VALIDATION),
    "fgvc_aircraft": Parts("FGVCAircraft", SPLIT | VALIDATION),
    "eurosat": Parts("EuroSAT", {"train": {}}, 27_000),
}


def _read(name: str, config: DataConfig) -> Source:
    """Return a data set of torchvision; InputError if it is missing and not to be downloaded."""
    refuse_layout(config)
    parts = SETS[name]
    root = folder_of(config, f"the folder in which torchvision keeps {parts.name}", downloads=True)
    import torchvision

    kind = getattr(torchvision.datasets, parts.name)
    how = {"loader": str} if "loader" in kind.__init__.__annotations__ else {}  # paths in place of images
    try:
        found = {part: kind(root, download=config.download, **how, **own) for part, own in parts.arguments.items()}
        images: dict[str, Any] = {part: _images(each, root, part) for part, each in found.items()}
        if parts.images and (count := sum(map(len, images.values()))) != parts.images:
            raise RuntimeError(f"it has {count:,} of {parts.images:,} images; remove it first")
    except (RuntimeError, OSError, ValueError, AssertionError, KeyError, EOFError) as error:
        problem = f"{parts.name} can't be read there ({str(error).strip() or type(error).__name__})"
        remedy = f"give the folder with the files that torchvision.datasets.{parts.name} needs, or data.download"
        raise InputError("data.dir", config.dir, problem, remedy) from error
    if name == "mnist":
        published = images["train"].take(range(len(images["train"]))[:PUBLISHED_IMAGES]), images["test"]
        return Source(str(root), NUMERALS, **images, published=published)
    return Source(str(root), tuple(map(str, getattr(found["train"], "classes", NUMERALS))), **images)


for _name in SETS:
    DATASETS.register(_name)(partial(_read, _name))


def _images(found: Any, root: Path, label: str) -> LabelledImages:
    """Return the images of a part, from its arrays or its files."""
    import numpy as np

    from effv2.data.images import LabelledImages

    if hasattr(found, "data"):
        pixels = np.asarray(found.data)
        if pixels.ndim == 4 and pixels.shape[1] == 3:  # channels first
            pixels = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
        return from_arrays(pixels, np.asarray(found.targets if hasattr(found, "targets") else found.labels), label)
    pairs = pet_files(found) if type(found).__name__ == "OxfordIIITPet" else [found[i] for i in range(len(found))]
    paths, labels = [Path(path) for path, _ in pairs], [int(number) for _, number in pairs]
    return LabelledImages.of_files(paths, labels, [printable(path.relative_to(root).as_posix()) for path in paths])
