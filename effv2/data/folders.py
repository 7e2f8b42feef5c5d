"""Trees of class folders, with or without a split into train, validation and test above them."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from effv2.core.errors import InputError
from effv2.data.images import LabelledImages

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
# Names that the parts of a set go by, whatever their case, in order of preference.
TRAIN_NAMES = ("train", "training", "training_set", "train_set")
VALIDATION_NAMES = ("val", "valid", "validation", "validation_set", "val_set")
TEST_NAMES = ("test", "testing", "test_set", "testing_set")
PARTS = {*TRAIN_NAMES, *VALIDATION_NAMES, *TEST_NAMES}

Tree = tuple[tuple[str, ...], LabelledImages, LabelledImages | None, LabelledImages | None]


def read_folders(root: Path, what: str) -> Tree:
    """Return class names and the parts for training, validation and testing of the set at `root`.

    InputError for what is no such tree, whose remedy is to give `what`; OSError for what can't be read.
    """
    train, validation, test = (_find(root, names) for names in (TRAIN_NAMES, VALIDATION_NAMES, TEST_NAMES))
    if train is None:
        if validation or test:
            problem = f"holds a part for testing but none named {TRAIN_NAMES[0]}"
            remedy = "rename the training part, or give the path of the part that is wanted"
            raise InputError("data.dir", root, problem, remedy)
        classes = _classes(root, what)
        return tuple(map(_printable, classes)), _images(root, root, classes), None, None
    if test is None:  # a set with train and val alone uses val for testing, as Imagenette does
        validation, test = None, validation
    classes = _classes(train, what)
    # A part under another name, or classes of which one is called train; not what just lies there, as MLflow's files.
    others = [name for name in _folders(root) if name.lower() not in PARTS]
    if others := [name for name in others if not set(classes).isdisjoint(_folders(root / name))]:
        problem = f"{train.name} is the training part by its name, but {', '.join(others)} beside it is no part"
        remedy = f"rename parts to {VALIDATION_NAMES[0]} or {TEST_NAMES[0]}, or the class {train.name} otherwise"
        raise InputError("data.dir", root, problem, remedy)
    for part in filter(None, (validation, test)):
        if differing := sorted({*classes} ^ {*_classes(part, what)}):
            problem = f"the folders {train.name} and {part.name} hold different classes ({', '.join(differing)})"
            raise InputError("data.dir", root, problem, "give both the same ones")
    held = [_images(root, part, classes) if part else None for part in (validation, test)]
    return tuple(map(_printable, classes)), _images(root, train, classes), held[0], held[1]


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


def _printable(name: str) -> str:
    """Make a file name printable whatever its bytes are."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
