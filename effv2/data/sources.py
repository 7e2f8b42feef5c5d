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
from effv2.core.internals import imagenette

if TYPE_CHECKING:
    from effv2.data.images import LabelledImages

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

    The last two are for published sampling: what is split 80/20 where that isn't the train part (train images are of
    the first, test images of the last), and whether what isn't RGB is dropped after the split, not before.
    """

    location: str
    classes: tuple[str, ...]
    train: LabelledImages
    validation: LabelledImages | None = None
    test: LabelledImages | None = None
    published: tuple[LabelledImages, ...] = ()
    published_split_first: bool = False


def open_source(config: DataConfig) -> Source:
    """Find the data set that `config` names; InputError where it isn't there, can't be read or is malformed."""
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


def _check(source: Source) -> None:
    """Raise ValueError for what the function of a data set must not return."""
    count = len(source.classes)
    for part in (source.train, source.validation, source.test):
        if part is None:
            continue
        if not len(part.items) == len(part.labels) == len(part.ids) > 0:
            raise ValueError(f"it returned {len(part.items)} images, {len(part.labels)} labels, {len(part.ids)} ids")
        if part.items.dtype not in ("object", "uint8"):
            raise ValueError("images must be paths or bytes (uint8)")
        if part.labels.dtype != "int64" or not 0 <= part.labels.min() <= part.labels.max() < count:
            raise ValueError(f"labels must be whole numbers (int64) from 0 to {count - 1}")


@DATASETS.register("digits")
def _digits(config: DataConfig) -> Source:
    import numpy as np
    from sklearn.datasets import load_digits

    if config.dir:
        problem = "digits come with scikit-learn and take no folder"
        raise InputError("data.dir", config.dir, problem, "give another data.dataset, or leave the folder out")
    found = load_digits()
    pixels = np.rint(found.images * (255 / 16)).astype(np.uint8)
    return Source("scikit-learn", NUMERALS, from_arrays(pixels, found.target, "digits"))


@DATASETS.register("imagenette")
def _imagenette(config: DataConfig) -> Source:
    from torchvision.datasets.utils import download_url

    url, md5, names = imagenette()
    what = "a folder that holds imagenette2-160, or data.download to fetch it"
    root = folder_of(config, what, downloads=True)
    folder = root / "imagenette2-160"
    if config.download and not folder.is_dir():
        try:  # unpacked beside its place, so that a kill leaves nothing that looks complete
            with tempfile.TemporaryDirectory(dir=root) as place:
                download_url(url, place, md5=md5)
                with tarfile.open(Path(place, url.rpartition("/")[2])) as archive:
                    archive.extractall(place, filter="data")  # nothing in it may leave the folder
                Path(place, folder.name).rename(folder)
        except (RuntimeError, OSError, TypeError, tarfile.TarError) as error:  # TypeError: Python without filters
            problem = f"Imagenette can't be fetched ({str(error) or type(error).__name__})"
            remedy = f"unpack imagenette2-160.tgz from https://github.com/fastai/imagenette into {root}"
            raise InputError("data.download", "true", problem, remedy) from error
    source = _read_folders(folder if folder.is_dir() else root, what)
    if source.test is None or source.classes != tuple(names):
        problem = "this is no imagenette2-160, whose folders train and val hold ten classes"
        raise InputError("data.dir", config.dir, problem, f"give {what}, or data.dataset folder for another set")
    return replace(source, classes=tuple(names.values()))


@DATASETS.register("birds")
def _birds(config: DataConfig) -> Source:
    what = f"the folder of the bird species, downloaded and unpacked from {BIRDS_PAGE}"
    return replace(_read_folders(folder_of(config, what), what), published_split_first=True)


@DATASETS.register("folder")
def _any_folder(config: DataConfig) -> Source:
    what = "a folder with one sub-folder of images per class"
    return _read_folders(folder_of(config, what), what)


def folder_of(config: DataConfig, what: str, downloads: bool = False) -> Path:
    """Return the folder of a data set, made where the set can be downloaded into it; `what` it is to be."""
    if not config.dir:
        raise InputError("data.dir", "", f"the data set {config.dataset!r} needs {what}", "give its path")
    folder = Path(os.path.expanduser(config.dir))
    if downloads and config.download and not folder.exists():
        folder.mkdir(parents=True)
    if not folder.is_dir():
        raise InputError("data.dir", config.dir, "no such folder", f"give {what}")
    return folder.resolve()


def from_arrays(pixels: Any, labels: Any, name: str) -> LabelledImages:
    """Return images in an array of bytes, named by part and position."""
    from effv2.data.images import LabelledImages

    return LabelledImages(pixels, labels.astype("int64"), tuple(f"{name}/{i:05d}" for i in range(len(labels))))


def _read_folders(root: Path, what: str) -> Source:
    """Return the set at `root`: class folders, with or without a split into train, validation and test above them.

    InputError for what is no such tree, whose remedy is to give `what`; OSError for what can't be read.
    """
    parts = {name.lower(): root / name for name in _folders(root) if _folders(root / name)}  # others are classes
    found, validation, test = (
        next((parts[name] for name in names if name in parts), None)
        for names in (TRAIN_NAMES, VALIDATION_NAMES, TEST_NAMES)
    )
    if found is None and (validation or test):
        problem = f"holds a part for testing but none named {TRAIN_NAMES[0]}"
        remedy = "rename the training part, or give the path of the part that is wanted"
        raise InputError("data.dir", root, problem, remedy)
    if test is None:  # a set with train and val alone uses val for testing, as Imagenette does
        validation, test = None, validation
    train = found or root
    classes = _classes(train, what)
    # A part under another name, or classes of which one is called train; not what just lies there, as MLflow's files.
    others = [other for other in _folders(root) if found and other.lower() not in PARTS]
    if others := [other for other in others if not set(classes).isdisjoint(_folders(root / other))]:
        problem = f"{train.name} is the training part by its name, but {', '.join(others)} beside it is no part"
        remedy = f"rename parts to {VALIDATION_NAMES[0]} or {TEST_NAMES[0]}, or the class {train.name} otherwise"
        raise InputError("data.dir", root, problem, remedy)
    for part in filter(None, (validation, test)):
        if differing := sorted({*classes} ^ {*_classes(part, what)}):
            problem = f"the folders {train.name} and {part.name} hold different classes ({', '.join(differing)})"
            raise InputError("data.dir", root, problem, "give both the same ones")
    of_val, of_test = (_images(root, part, classes) if part else None for part in (validation, test))
    return Source(str(root), tuple(map(printable, classes)), _images(root, train, classes), of_val, of_test)


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
    return LabelledImages.of_files(paths, labels, [printable(path.relative_to(root).as_posix()) for path in paths])


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


def printable(name: str) -> str:
    """Make a file name printable whatever its bytes are."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
