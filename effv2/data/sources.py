"""Data sets by name: each a function from DataConfig to a Source. A new one is one function here and nothing else.

Nothing is decoded here. A missing or malformed folder raises InputError. The commands' help imports this module, so
large packages are imported inside the functions.
"""

from __future__ import annotations

import os
import tarfile
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effv2.config.schema import DATASETS, DataConfig
from effv2.core.errors import InputError
from effv2.core.internals import imagenette
from effv2.data.folders import Source, read_folders

if TYPE_CHECKING:
    from effv2.data.images import LabelledImages

IN_FOLDERS = {"birds", "folder", "imagenette", "mnist"}  # need a folder
NUMERALS = tuple("0123456789")
BIRDS_PAGE = "https://www.kaggle.com/datasets/arjunbasandrai/25-indian-bird-species-with-226k-images"


def open_source(config: DataConfig) -> Source:
    """Find the data set that `config` names; InputError if it is missing, unreadable or malformed."""
    try:
        source: Source = DATASETS[config.dataset](config)
        _check(source)
    except (InputError, MemoryError):
        raise
    except OSError as error:
        problem = f"{error.filename or f'the data set {config.dataset!r}'} can't be read ({error.strerror or error})"
        remedy = "fix or remove it, or give yourself access"
        raise InputError("data.dir", config.dir, problem, remedy) from error
    except Exception as error:
        problem = f"the function of this data set failed ({type(error).__name__}: {error})"
        raise InputError("data.dataset", config.dataset, problem, "correct it") from error
    return source


def refuse_missing(config: DataConfig) -> None:
    """Refuse a folder that isn't there, or wasn't given, before anything is imported that takes seconds."""
    unnamed = not (config.dir or config.train_dir) and config.dataset in IN_FOLDERS
    gone = config.dir and not config.download and not os.path.isdir(os.path.expanduser(config.dir))  # noqa: PTH112
    if unnamed or gone:
        open_source(config)  # which says what should be there


def _check(source: Source) -> None:
    """Raise ValueError for an invalid result of the function of a data set."""
    count = len(source.classes)
    for part in (source.train, source.validation, source.test):
        if part is None:
            continue
        if not len(part.items) == len(part.labels) == len(part.ids) > 0:
            raise ValueError(f"it returned {len(part.items)} images, {len(part.labels)} labels, {len(part.ids)} ids")
        shaped = part.items.ndim == 3 or (part.items.ndim == 4 and part.items.shape[3] == 3)
        if part.items.dtype != "object" and not (part.items.dtype == "uint8" and shaped):
            raise ValueError("images must be paths or bytes (uint8): (N, height, width), or (N, height, width, 3)")
        if part.labels.dtype != "int64" or not 0 <= part.labels.min() <= part.labels.max() < count:
            raise ValueError(f"labels must be whole numbers (int64) from 0 to {count - 1}")


@DATASETS.register("digits")
def _digits(config: DataConfig) -> Source:
    import numpy as np
    from sklearn.datasets import load_digits

    refuse_layout(config)
    if config.dir:
        problem = "digits come with scikit-learn and take no folder"
        raise InputError("data.dir", config.dir, problem, "for your own images, set data.dataset to folder")
    found = load_digits()
    pixels = np.rint(found.images * (255 / 16)).astype(np.uint8)
    return Source("scikit-learn", NUMERALS, from_arrays(pixels, found.target, "digits"))


@DATASETS.register("imagenette")
def _imagenette(config: DataConfig) -> Source:
    refuse_layout(config)
    what = "a folder that holds imagenette2-160, or data.download to download it"
    root = folder_of(config, what, downloads=True)
    from torchvision.datasets.utils import download_url

    url, md5, names = imagenette()
    folder = root / "imagenette2-160"
    if config.download and not folder.is_dir():
        try:  # unpacked next to its place, so that a kill leaves nothing that looks complete
            with tempfile.TemporaryDirectory(dir=root) as place:
                download_url(url, place, md5=md5)
                with tarfile.open(Path(place, url.rpartition("/")[2])) as archive:
                    archive.extractall(place, filter="data")  # no member may leave the folder
                Path(place, folder.name).rename(folder)
        except (RuntimeError, OSError, TypeError, tarfile.TarError) as error:  # TypeError: Python without filters
            problem = f"Imagenette can't be downloaded ({str(error) or type(error).__name__})"
            remedy = f"unpack imagenette2-160.tgz from https://github.com/fastai/imagenette into {root}"
            raise InputError("data.download", "true", problem, remedy) from error
    source = read_folders(config, folder if folder.is_dir() else root, what)
    if source.test is None or source.classes != tuple(names):
        problem = "this is not imagenette2-160, whose folders train and val hold ten classes"
        raise InputError("data.dir", config.dir, problem, f"give {what}, or data.dataset folder for another set")
    return replace(source, classes=tuple(names.values()))


@DATASETS.register("birds")
def _birds(config: DataConfig) -> Source:
    what = f"the folder of the bird species, downloaded and unpacked from {BIRDS_PAGE}"
    return replace(read_folders(config, folder_of(config, what), what), published_split_first=True)


@DATASETS.register("folder")
def _any_folder(config: DataConfig) -> Source:
    what = "a folder with one sub-folder of images per class"
    return read_folders(config, folder_of(config, what), what)


def refuse_layout(config: DataConfig) -> None:
    """Refuse settings of parts and labels for a data set that has its own."""
    for name in ("train_dir", "test_dir", "labels"):
        if value := getattr(config, name):
            problem = f"the data set {config.dataset!r} has its own parts and labels"
            raise InputError(f"data.{name}", value, problem, "leave it out, or give data.dataset folder")


def folder_of(config: DataConfig, what: str, downloads: bool = False) -> Path:
    """Return the folder of a data set, created if the set can be downloaded. `what` describes it in errors."""
    if config.train_dir and not config.dir:
        return Path.cwd()
    if not config.dir:
        raise InputError("data.dir", "", f"the data set {config.dataset!r} needs {what}", "give its path")
    folder = Path(os.path.expanduser(config.dir))
    if downloads and config.download and not folder.exists():
        folder.mkdir(parents=True)
    if not folder.is_dir():
        raise InputError("data.dir", config.dir, "is a file" if folder.exists() else "no such folder", f"give {what}")
    return folder.resolve()


def from_arrays(pixels: Any, labels: Any, name: str) -> LabelledImages:
    """Return images in an array of bytes, named by part and position."""
    from effv2.data.images import LabelledImages

    return LabelledImages(pixels, labels.astype("int64"), tuple(f"{name}/{i:05d}" for i in range(len(labels))))
