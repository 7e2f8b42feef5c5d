"""Data sets by name: each a registered function from DataConfig to a Source. A new one is such a function, no more.

Nothing is decoded here; a missing or malformed folder is answered with an InputError.
"""

from __future__ import annotations

import errno
import os
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from effv2.config.registry import DATASETS
from effv2.config.schema import DataConfig
from effv2.core.errors import InputError
from effv2.core.paths import expanded

if TYPE_CHECKING:
    import numpy as np

    from effv2.data.images import Part

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
# Names that the parts of a set go by, whatever their case, in order of preference.
TRAIN_NAMES = ("train", "training", "training_set", "train_set")
VALIDATION_NAMES = ("val", "valid", "validation", "validation_set", "val_set")
TEST_NAMES = ("test", "testing", "test_set", "testing_set")
PARTS = {*TRAIN_NAMES, *VALIDATION_NAMES, *TEST_NAMES}

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
    train: Part
    validation: Part | None = None
    test: Part | None = None
    published: PublishedSampling = PublishedSampling()


def open_source(config: DataConfig) -> Source:
    """Find the data set that `config` names; InputError where it isn't there or can't be read."""
    try:
        source: Source = DATASETS[config.dataset](config)
    except OSError as error:
        raise InputError(
            f"--data-dir {config.dir}: {error.filename} can't be read ({error.strerror}); give yourself access."
        ) from error
    return source


@DATASETS.register("digits")
def _digits(config: DataConfig) -> Source:
    if config.dir:
        raise InputError(
            f"--data-dir {config.dir}: digits come with scikit-learn and take no folder; give --dataset, or leave the "
            "folder out."
        )
    import numpy as np
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int64)
    return Source("digits", "scikit-learn", _numerals(), _array_part(pixels, labels, "digits"))


@DATASETS.register("mnist")
def _mnist(config: DataConfig) -> Source:
    import numpy as np
    from torchvision.datasets import MNIST

    root = _folder(config, "a folder that holds MNIST/raw with the four files of MNIST")
    parts = []
    for train in (True, False):
        try:
            found = MNIST(root, train=train, download=config.download)
        except (RuntimeError, OSError, ValueError, AssertionError, KeyError, EOFError) as error:
            raise InputError(
                f"--data-dir {config.dir}: MNIST can't be read there ({_first_line(error)}); name the folder that "
                "holds MNIST/raw/*-ubyte, or give --download to fetch it."
            ) from error
        name = "train" if train else "test"
        parts.append(_array_part(found.data.numpy(), found.targets.numpy().astype(np.int64), name))
    rule = PublishedSampling(first=20_000, test_from_test=True)
    return Source("mnist", str(root), _numerals(), parts[0], None, parts[1], rule)


@DATASETS.register("imagenette")
def _imagenette(config: DataConfig) -> Source:
    root = _folder(config, "a folder that holds imagenette2-160")
    below = root / "imagenette2-160"
    if config.download and not below.is_dir():
        try:  # unpacked beside its place, so that a kill leaves nothing that looks complete
            with tempfile.TemporaryDirectory(dir=root) as place:
                _fetch_imagenette(Path(place))
                Path(place, below.name).rename(below)
        except (RuntimeError, OSError, tarfile.TarError) as error:
            raise InputError(
                f"--download: Imagenette can't be fetched ({_first_line(error)}); unpack imagenette2-160.tgz "
                f"from https://github.com/fastai/imagenette into {root}."
            ) from error
    folder = below if below.is_dir() else root
    if not all((folder / part).is_dir() for part in ("train", "val")):
        raise InputError(
            f"--data-dir {config.dir}: no imagenette2-160 with its folders train and val is there; name the folder "
            "that holds it, or give --download to fetch it."
        )
    source = _from_folders("imagenette", folder)
    if source.classes != tuple(IMAGENETTE_NAMES):
        raise InputError(
            f"--data-dir {config.dir}: these are not the ten classes of Imagenette; use --dataset folder for another "
            "set."
        )
    return replace(source, classes=tuple(IMAGENETTE_NAMES.values()))


def _fetch_imagenette(folder: Path) -> None:
    """Download, verify and unpack the archive that torchvision names; nothing in it may leave the folder."""
    from torchvision.datasets import Imagenette
    from torchvision.datasets.utils import download_url

    if not hasattr(tarfile, "data_filter"):
        raise RuntimeError("this Python is too old to unpack archives safely, update it to 3.10.12, 3.11.4 or newer")
    url, md5 = Imagenette._ARCHIVES["160px"]
    download_url(url, folder, md5=md5)
    with tarfile.open(folder / url.rpartition("/")[2]) as archive:
        archive.extractall(folder, filter="data")


@DATASETS.register("birds")
def _birds(config: DataConfig) -> Source:
    folder = _folder(config, f"the folder of the bird species, downloaded and unpacked from {BIRDS_PAGE}")
    return replace(_from_folders("birds", folder), published=PublishedSampling(split_first=True))


@DATASETS.register("folder")
def _any_folder(config: DataConfig) -> Source:
    return _from_folders("folder", _folder(config, "a folder with one sub-folder of images per class"))


def _folder(config: DataConfig, what: str) -> Path:
    if not config.dir:
        raise InputError(f"--data-dir: the data set {config.dataset!r} needs {what}; give its path.")
    folder = expanded(config.dir)
    if config.download and config.dataset in ("imagenette", "mnist") and not folder.exists():
        folder.mkdir(parents=True)
    if not folder.is_dir():
        raise InputError(f"--data-dir {config.dir}: no such folder; give {what}.")
    return folder.resolve()


def _from_folders(name: str, folder: Path) -> Source:
    """Read a tree of class folders, with or without a split into train, validation and test above them."""
    try:
        return _read_tree(name, folder)
    except OSError as error:
        raise InputError(
            f"--data-dir {folder}: {error.filename or folder} can't be read ({error.strerror}); mend or remove it."
        ) from error


def _read_tree(name: str, folder: Path) -> Source:
    train = _find(folder, TRAIN_NAMES)
    if train is None:
        if _find(folder, (*VALIDATION_NAMES, *TEST_NAMES)):
            raise InputError(
                f"--data-dir {folder}: holds a part for testing but none named {TRAIN_NAMES[0]}; rename the training "
                "part, or give the path of the part that is wanted."
            )
        classes = _class_folders(folder, name)
        return Source(name, str(folder), tuple(map(_text, classes)), _file_part(folder, folder, classes))
    validation, test = _find(folder, VALIDATION_NAMES), _find(folder, TEST_NAMES)
    if test is None:  # a set with train and val alone uses val for testing, as Imagenette does
        validation, test = None, validation
    classes = _class_folders(train, name)
    # A part under another name, or classes of which one is called train; not what just lies there, as MLflow's files.
    others = [each for each in _folders(folder) if each.lower() not in PARTS]
    if others := [each for each in others if not set(classes).isdisjoint(_folders(folder / each))]:
        raise InputError(
            f"--data-dir {folder}: {train.name} is the training part by its name, but {', '.join(others)} beside it is "
            f"no part; rename parts to {VALIDATION_NAMES[0]} or {TEST_NAMES[0]}, or the class {train.name} otherwise."
        )
    for part in (validation, test):
        if part is not None and (other := _class_folders(part, name)) != classes:
            differing = ", ".join(sorted(set(classes) ^ set(other)))
            raise InputError(
                f"--data-dir {folder}: the folders {train.name} and {part.name} hold different classes "
                f"({differing}); give both the same ones."
            )
    parts = [_file_part(folder, part, classes) if part else None for part in (validation, test)]
    return Source(name, str(folder), tuple(map(_text, classes)), _file_part(folder, train, classes), parts[0], parts[1])


def _find(folder: Path, names: tuple[str, ...]) -> Path | None:
    """Return the first sub-folder of that name that has sub-folders itself, and so is no class."""
    with os.scandir(folder) as entries:
        found = {entry.name.lower(): Path(entry) for entry in entries if entry.is_dir() and _folders(entry)}
    return next((found[name] for name in names if name in found), None)


def _folders(place: str | os.PathLike[str]) -> list[str]:
    """Return the names of the folders in a folder. OSError for a link that leads back to a folder around it."""
    with os.scandir(place) as entries:
        found = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    for name in found:
        _refuse_loop(Path(place, name))
    return found


def _refuse_loop(path: Path) -> None:
    if path.is_symlink() and path.parent.resolve().is_relative_to(path.resolve()):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


def _class_folders(folder: Path, name: str) -> list[str]:
    classes = _folders(folder)
    hint = f" (they come from {BIRDS_PAGE})" if name == "birds" else ""
    if len(classes) < 2:
        raise InputError(
            f"--data-dir {folder}: holds {len(classes)} class folders, but at least 2 are needed; give a folder "
            f"with one sub-folder of images per class{hint}."
        )
    for inside in classes:
        if any(inner.lower() in PARTS for inner in _folders(folder / inside)):
            raise InputError(
                f"--data-dir {folder}: {inside} in it is a data set of its own, not a class; give the path of one set."
            )
    return classes


def _file_part(root: Path, folder: Path, classes: list[str]) -> Part:
    import numpy as np

    from effv2.data.images import FileImages, Part

    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = sorted(_image_files(folder / name))
        if not files:
            raise InputError(
                f"--data-dir {root}: the class folder {folder / name} holds no images "
                f"({', '.join(EXTENSIONS)}); fill or remove it."
            )
        paths += files
        labels += [label] * len(files)
    ids = tuple(_text(path.relative_to(root).as_posix()) for path in paths)
    return Part(FileImages(tuple(paths)), np.array(labels, dtype=np.int64), ids)


def _image_files(folder: Path) -> Iterator[Path]:
    """Walk one class folder at any depth, hidden files and links to folders left out."""

    def refuse(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            _refuse_loop(Path(place, name))
        for name in files:
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                path = Path(place, name)
                if path.exists() and not path.is_file():  # a pipe or a device, which might never end
                    raise OSError(errno.EINVAL, "not a regular file", str(path))
                yield path


def _text(name: str) -> str:
    """Make a file name printable whatever its bytes are."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _array_part(pixels: np.ndarray, labels: np.ndarray, name: str) -> Part:
    from effv2.data.images import ArrayImages, Part

    return Part(ArrayImages(pixels, name), labels, tuple(f"{name}/{i:05d}" for i in range(len(labels))))


def _numerals() -> tuple[str, ...]:
    return tuple(map(str, range(10)))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
