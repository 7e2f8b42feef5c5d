"""Data sets by name: each a function from DataConfig to a Source. A new one is one function here and nothing else.

Nothing is decoded here; a missing or malformed folder is answered with an InputError. The command's help imports this
module, so what is heavy is imported inside the functions.
"""

from __future__ import annotations

import errno
import os
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effv2.config.schema import DATASETS, DataConfig
from effv2.core.errors import InputError
from effv2.core.internals import imagenette_archive

if TYPE_CHECKING:
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


EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
# Names that the parts of a set go by, whatever their case, in order of preference.
TRAIN_NAMES = ("train", "training", "training_set", "train_set")
VALIDATION_NAMES = ("val", "valid", "validation", "validation_set", "val_set")
TEST_NAMES = ("test", "testing", "test_set", "testing_set")
PARTS = {*TRAIN_NAMES, *VALIDATION_NAMES, *TEST_NAMES}


@dataclass(frozen=True)
class Source:
    """A data set: class names and its parts. Without a test part, one is split off the train part.

    The last three say what the published notebooks took of it before their 80/20 splits.
    """

    name: str
    location: str
    classes: tuple[str, ...]
    train: LabelledImages
    validation: LabelledImages | None = None
    test: LabelledImages | None = None
    published_first: int | None = None  # images of the train part that are used; None: all
    published_test_from_test: bool = False  # test images are the 20 % of the test part, not of the train part
    published_split_first: bool = False  # what isn't RGB is dropped after the split, not before


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
    source = _read_folders("imagenette", folder, what)
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
    published: dict[str, Any] = {"published_first": 20_000, "published_test_from_test": True}
    return Source("mnist", str(root), NUMERALS, parts[0], test=parts[1], **published)


@DATASETS.register("birds")
def _birds(config: DataConfig) -> Source:
    what = f"the folder of the bird species, downloaded and unpacked from {BIRDS_PAGE}"
    return replace(_read_folders("birds", _folder(config, what), what), published_split_first=True)


@DATASETS.register("folder")
def _any_folder(config: DataConfig) -> Source:
    what = "a folder with one sub-folder of images per class"
    return _read_folders("folder", _folder(config, what), what)


def _folder(config: DataConfig, what: str, downloads: bool = False) -> Path:
    """Return the folder of a data set, made where the set can be downloaded into it; `what` it is to be."""
    if not config.dir:
        raise InputError("data.dir", "", f"the data set {config.dataset!r} needs {what}", "give its path")
    folder = Path(os.path.expanduser(config.dir))
    if downloads and config.download and not folder.exists():
        folder.mkdir(parents=True)
    if not folder.is_dir():
        raise InputError("data.dir", config.dir, "no such folder", f"give {what}")
    return folder.resolve()


def _from_arrays(pixels: Any, labels: Any, name: str) -> LabelledImages:
    from effv2.data.images import LabelledImages

    return LabelledImages(pixels, labels.astype("int64"), tuple(f"{name}/{i:05d}" for i in range(len(labels))))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__


def _read_folders(name: str, root: Path, what: str) -> Source:
    """Return the set at `root`: class folders, with or without a split into train, validation and test above them.

    InputError for what is no such tree, whose remedy is to give `what`; OSError for what can't be read.
    """
    train, validation, test = (_find(root, names) for names in (TRAIN_NAMES, VALIDATION_NAMES, TEST_NAMES))
    if train is None:
        if validation or test:
            problem = f"holds a part for testing but none named {TRAIN_NAMES[0]}"
            remedy = "rename the training part, or give the path of the part that is wanted"
            raise InputError("data.dir", root, problem, remedy)
        classes = _classes(root, what)
        return Source(name, str(root), tuple(map(_printable, classes)), _images(root, root, classes))
    if test is None:  # a set with train and val alone uses val for testing, as Imagenette does
        validation, test = None, validation
    classes = _classes(train, what)
    # A part under another name, or classes of which one is called train; not what just lies there, as MLflow's files.
    others = [other for other in _folders(root) if other.lower() not in PARTS]
    if others := [other for other in others if not set(classes).isdisjoint(_folders(root / other))]:
        problem = f"{train.name} is the training part by its name, but {', '.join(others)} beside it is no part"
        remedy = f"rename parts to {VALIDATION_NAMES[0]} or {TEST_NAMES[0]}, or the class {train.name} otherwise"
        raise InputError("data.dir", root, problem, remedy)
    for part in filter(None, (validation, test)):
        if differing := sorted({*classes} ^ {*_classes(part, what)}):
            problem = f"the folders {train.name} and {part.name} hold different classes ({', '.join(differing)})"
            raise InputError("data.dir", root, problem, "give both the same ones")
    of_val, of_test = (_images(root, part, classes) if part else None for part in (validation, test))
    return Source(name, str(root), tuple(map(_printable, classes)), _images(root, train, classes), of_val, of_test)


def _find(folder: Path, names: tuple[str, ...]) -> Path | None:
    """Return the first sub-folder of that name that has sub-folders itself, and so is no class."""
    with os.scandir(folder) as entries:
        found = {entry.name.lower(): Path(entry) for entry in entries if entry.is_dir() and _folders(entry)}
    return next((found[name] for name in names if name in found), None)


def _folders(place: str | os.PathLike[str]) -> list[str]:
    """Return the names of the folders in a folder. OSError for a link that leads back to a folder around it."""
    with os.scandir(place) as entries:
        found = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    for path in (Path(place, name) for name in found):
        if path.is_symlink() and path.parent.resolve().is_relative_to(path.resolve()):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return found


def _classes(folder: Path, what: str) -> list[str]:
    """Return the names of the class folders in `folder`."""
    classes = _folders(folder)
    if len(classes) < 2:
        problem = f"holds {len(classes)} class folders, but at least 2 are needed"
        raise InputError("data.dir", folder, problem, f"give {what}")
    for inside in classes:
        if any(inner.lower() in PARTS for inner in _folders(folder / inside)):
            problem = f"{inside} in it is a data set of its own, not a class"
            raise InputError("data.dir", folder, problem, "give the path of one set")
    return classes


def _images(root: Path, folder: Path, classes: list[str]) -> LabelledImages:
    """Return the images of the class folders in `folder`, with their paths below `root` as ids."""
    from effv2.data.images import LabelledImages

    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = sorted(_files(folder / name))
        if not files:
            problem = f"the class folder {folder / name} holds no images ({', '.join(EXTENSIONS)})"
            raise InputError("data.dir", root, problem, "fill or remove it")
        paths += files
        labels += [label] * len(files)
    return LabelledImages.of_files(paths, labels, [_printable(path.relative_to(root).as_posix()) for path in paths])


def _files(folder: Path) -> Iterator[Path]:
    """Walk one class folder at any depth for images, hidden files and links to folders left out."""
    for inner in map(folder.joinpath, _folders(folder)):
        if not inner.is_symlink():
            yield from _files(inner)
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith(".") and not entry.is_dir():
                path = Path(entry)
                if not entry.is_file() and path.exists():  # a pipe or a device, which might never end
                    raise OSError(errno.EINVAL, "not a regular file", str(path))
                yield path


def _printable(name: str) -> str:
    """Make a file name printable whatever its bytes are."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
