"""Data sets by name: each a function from DataConfig to a Source. A new one is one function here and nothing else.

Nothing is decoded here; a missing or malformed folder is answered with an InputError. The command's help imports this
module, so what is heavy is imported inside the functions.
"""

from __future__ import annotations

import tarfile
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effv2.config.registry import DATASETS
from effv2.core.errors import InputError
from effv2.core.internals import imagenette_archive
from effv2.core.paths import expanded

if TYPE_CHECKING:
    from effv2.config.schema import DataConfig
    from effv2.data.images import LabelledImages

IMAGENETTE_NAMES = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
NUMERALS = tuple("0123456789")
BIRDS_PAGE = "https://www.kaggle.com/datasets/arjunbasandrai/25-indian-bird-species-with-226k-images"


@dataclass(frozen=True)
class PublishedSampling:
    """What the published notebooks took of a set before their 80/20 splits."""

    first: int | None = None  # only so many of the train part
    test_from_test: bool = False  # test images are the 20 % of the test part, not of the train part
    split_first: bool = False  # what isn't RGB is dropped after the split, not before


@dataclass(frozen=True)
class Source:
    """A data set: class names and its parts. Without a test part, one is split off the train part."""

    name: str
    location: str
    classes: tuple[str, ...]
    train: LabelledImages
    validation: LabelledImages | None = None
    test: LabelledImages | None = None
    published: PublishedSampling = PublishedSampling()


def open_source(config: DataConfig) -> Source:
    """Find the data set that `config` names; InputError where it isn't there or can't be read."""
    try:
        source: Source = DATASETS[config.dataset](config)
    except OSError as error:
        problem = f"{error.filename or 'it'} can't be read ({error.strerror or error})"
        remedy = "mend or remove it, or give yourself access"
        raise InputError("data.dir", config.dir, problem, remedy) from error
    return source


@DATASETS.register("digits")
def _digits(config: DataConfig) -> Source:
    import numpy as np
    from sklearn.datasets import load_digits

    if config.dir:
        problem = "digits come with scikit-learn and take no folder"
        raise InputError("data.dir", config.dir, problem, "give another data.dataset, or leave the folder out")
    found = load_digits()
    pixels = np.rint(found.images * (255 / 16)).astype(np.uint8)
    return Source("digits", "scikit-learn", NUMERALS, _from_arrays(pixels, found.target, "digits"))


@DATASETS.register("imagenette")
def _imagenette(config: DataConfig) -> Source:
    what = "a folder that holds imagenette2-160"
    root = _folder(config, what, downloads=True)
    below = root / "imagenette2-160"
    if config.download and not below.is_dir():
        try:  # unpacked beside its place, so that a kill leaves nothing that looks complete
            with tempfile.TemporaryDirectory(dir=root) as place:
                _fetch_imagenette(Path(place))
                Path(place, below.name).rename(below)
        except (RuntimeError, OSError, tarfile.TarError) as error:
            remedy = f"unpack imagenette2-160.tgz from https://github.com/fastai/imagenette into {root}"
            problem = f"Imagenette can't be fetched ({_first_line(error)})"
            raise InputError("data.download", "true", problem, remedy) from error
    folder = below if below.is_dir() else root
    if not all((folder / part).is_dir() for part in ("train", "val")):
        problem = "no imagenette2-160 with its folders train and val is there"
        remedy = "name the folder that holds it, or give data.download to fetch it"
        raise InputError("data.dir", config.dir, problem, remedy)
    source = _from_folders("imagenette", folder, what)
    if source.classes != tuple(IMAGENETTE_NAMES):
        problem = "these are not the ten classes of Imagenette"
        raise InputError("data.dir", config.dir, problem, "use data.dataset folder for another set")
    return replace(source, classes=tuple(IMAGENETTE_NAMES.values()))


def _fetch_imagenette(folder: Path) -> None:
    """Download, verify and unpack the archive that torchvision names; nothing in it may leave the folder."""
    from torchvision.datasets.utils import download_url

    if not hasattr(tarfile, "data_filter"):
        raise RuntimeError("this Python is too old to unpack archives safely, update it to 3.10.12, 3.11.4 or newer")
    url, md5 = imagenette_archive()
    download_url(url, folder, md5=md5)
    with tarfile.open(folder / url.rpartition("/")[2]) as archive:
        archive.extractall(folder, filter="data")


@DATASETS.register("mnist")
def _mnist(config: DataConfig) -> Source:
    from torchvision.datasets import MNIST

    root = _folder(config, "a folder that holds MNIST/raw with the four files of MNIST", downloads=True)
    parts = []
    for name in ("train", "test"):
        try:
            found = MNIST(root, train=name == "train", download=config.download)
        except (RuntimeError, OSError, ValueError, AssertionError, KeyError, EOFError) as error:
            problem = f"MNIST can't be read there ({_first_line(error)})"
            remedy = "name the folder that holds MNIST/raw/*-ubyte, or give data.download to fetch it"
            raise InputError("data.dir", config.dir, problem, remedy) from error
        parts.append(_from_arrays(found.data.numpy(), found.targets.numpy(), name))
    rule = PublishedSampling(first=20_000, test_from_test=True)
    return Source("mnist", str(root), NUMERALS, parts[0], None, parts[1], rule)


@DATASETS.register("birds")
def _birds(config: DataConfig) -> Source:
    what = f"the folder of the bird species, downloaded and unpacked from {BIRDS_PAGE}"
    return replace(_from_folders("birds", _folder(config, what), what), published=PublishedSampling(split_first=True))


@DATASETS.register("folder")
def _any_folder(config: DataConfig) -> Source:
    what = "a folder with one sub-folder of images per class"
    return _from_folders("folder", _folder(config, what), what)


def _folder(config: DataConfig, what: str, downloads: bool = False) -> Path:
    """Return the folder of a data set, made where the set can be downloaded into it; `what` it is to be."""
    if not config.dir:
        raise InputError("data.dir", "", f"the data set {config.dataset!r} needs {what}", "give its path")
    folder = expanded(config.dir)
    if downloads and config.download and not folder.exists():
        folder.mkdir(parents=True)
    if not folder.is_dir():
        raise InputError("data.dir", config.dir, "no such folder", f"give {what}")
    return folder.resolve()


def _from_folders(name: str, folder: Path, what: str) -> Source:
    from effv2.data.folders import read_folders

    return Source(name, str(folder), *read_folders(folder, what))


def _from_arrays(pixels: Any, labels: Any, name: str) -> LabelledImages:
    from effv2.data.images import LabelledImages

    return LabelledImages(pixels, labels.astype("int64"), tuple(f"{name}/{i:05d}" for i in range(len(labels))))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
