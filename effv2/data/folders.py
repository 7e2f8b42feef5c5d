"""Trees of image files: which folders are parts of a data set, which are classes, and which files are images.

An ambiguous tree is refused with an explanation and a remedy. Files that are left out are counted by kind.
"""

from __future__ import annotations

import errno
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from effv2.config.schema import DataConfig
from effv2.core.errors import InputError, joined, listed
from effv2.core.words import counted
from effv2.data import folder_names
from effv2.data.folder_names import TEST, TRAIN, UNLABELLED, VALIDATION, is_filler, part_of, printable
from effv2.data.labels import read_labels

if TYPE_CHECKING:
    from effv2.data.images import LabelledImages

# Formats that Pillow opens, but that are programs, films or containers.
NO_IMAGES = {"EPS", "IPTC", "WMF", "MPEG", "BUFR", "GRIB", "HDF5"}
SHOWN = 5
Classes = dict[str, list[Path]]  # files by class
OTHERWISE = "give the parts as data.train_dir and data.test_dir"
ALL_CLASSES = "this folder as data.train_dir if these are its classes"


@dataclass(frozen=True)
class Source:
    """A data set: class names and its parts. Without a test part, one is split off the train part.

    `left_out` counts unused files by kind. The last two are for published sampling: the parts that are split 80/20 if
    not the train part (train images are from the first, test images from the last), and whether images that aren't RGB
    are dropped after the split instead of before it.
    """

    location: str
    classes: tuple[str, ...]
    train: LabelledImages
    validation: LabelledImages | None = None
    test: LabelledImages | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)
    published: tuple[LabelledImages, ...] = ()
    published_split_first: bool = False


def left_out_note(location: str, left_out: Mapping[str, int]) -> str:
    """Return the sentence on the files that were left out; empty if there are none."""
    kinds = ", ".join(f"{kind} ({count})" for kind, count in sorted(left_out.items()))
    return f"Left out in {location}: {kinds}." * bool(kinds)


def unreadable_note(names: Sequence[str]) -> str:
    """Return the sentence on images that were left out because they can't be read."""
    return f"Left out because they can't be read: {counted(len(names), 'image')} ({listed(names, 1)})."


@cache
def extensions() -> frozenset[str]:
    """Return the extensions of the images that Pillow reads on this machine."""
    from PIL import Image

    known = Image.registered_extensions()
    return frozenset(ending for ending, kind in known.items() if kind in Image.OPEN and kind not in NO_IMAGES)


def read_folders(config: DataConfig, root: Path, what: str) -> Source:
    """Return the set at `root`: class folders or images with labels in a CSV, with or without folders of parts.

    InputError for any other tree, with the remedy to give `what`; OSError if it can't be read.
    """
    left_out: Counter[str] = Counter()
    named, explicit = bool(config.train_dir or config.test_dir), bool(config.labels)
    folders = _named_parts(config, root) if named else _find_parts(root, explicit, left_out)
    if explicit:
        files = {part: (folder, list(_files(folder, left_out))) for part, folder in folders.items()}
        labels = Path(os.path.expanduser(config.labels))
        path = labels if labels.exists() else root / labels
        if any(path.resolve().is_relative_to(folder) for folder in folders.values()):
            left_out[f"{path.suffix.lower()} files"] -= 1  # the table itself
        parts = read_labels(path, files, left_out)
        if TRAIN not in parts:
            remedy = "give the folder that it labels as data.train_dir"
            raise InputError("data.labels", path, "labels no training image", remedy)
        parts = {part: {} for part in (folders if named else ())} | parts  # a named part must not be empty
        folders = {part: folders.get(part, folders[TRAIN]) for part in parts}
    else:
        parts = {part: _classes(folder, what, named, left_out) for part, folder in folders.items()}
    classes = _checked_classes(root, folders, parts, config, left_out)
    made = {
        part: _images(root, (part, folders[part]) if named else None, found, classes)
        for part, found in parts.items()
        if any(found.values())
    }
    if TEST not in made and VALIDATION in made:  # a set with only train and val uses val for testing
        made[TEST] = made.pop(VALIDATION)
    return Source(str(root), tuple(classes), made[TRAIN], made.get(VALIDATION), made.get(TEST), dict(+left_out))


def _named_parts(config: DataConfig, root: Path) -> dict[str, Path]:
    """Return the parts that settings name, by paths below `root` or absolute ones."""
    if not config.train_dir:
        problem = "names the test part, but nothing names the training part"
        raise InputError("data.test_dir", config.test_dir, problem, "give data.train_dir as well")
    found = {}
    for part, value in ((TRAIN, config.train_dir), (TEST, config.test_dir)):
        if value:
            found[part] = (root / os.path.expanduser(value)).resolve()
            if not found[part].is_dir():
                raise InputError(f"data.{part}_dir", value, "no such folder", "give a folder, or its path in data.dir")
    if len(found) > 1 and (found[TRAIN].is_relative_to(found[TEST]) or found[TEST].is_relative_to(found[TRAIN])):
        raise InputError("data.test_dir", config.test_dir, "one part is inside the other", "give two separate folders")
    return found


def _find_parts(root: Path, labelled: bool, left_out: Counter[str]) -> dict[str, Path]:
    """Return the folders of the parts of the set at `root`. Without parts, `root` itself is the train part.

    With labels in a file, parts hold no class folders.
    """
    place = _unwrapped(root, is_part=False)
    names = _folders(place)
    parts = folder_names.parts_among(names)
    inside = {name: _unwrapped(place / name, is_part=True) for named in parts.values() for name in named}
    flat = [name for name, folder in inside.items() if not _folders(folder)]
    nested = [name for name in inside if name not in flat]
    train = parts.get(TRAIN, [])

    def refusal(problem: str, remedy: str) -> InputError:
        return InputError("data.dir", root, problem, remedy)

    if not labelled and not set(nested).intersection(train):
        if nested:
            problem = f"holds a part for testing but none named train ({', '.join(names)})"
            raise refusal(problem, f"rename the training part, or {OTHERWISE}")
        if flat:
            problem = f"no class folders in {joined(flat)} (parts by name)"
            raise refusal(
                problem, "give a CSV of labels as data.labels, or data.train_dir . if all folders are classes"
            )
    if not train:
        return {TRAIN: place}
    used = {part: named for part, named in parts.items() if part != UNLABELLED}
    for part, twice in used.items():
        if len(twice) > 1:
            raise refusal(f"{joined(twice)} are both the {part} part by their names", f"remove one, or {OTHERWISE}")
    found = {part: inside[named[0]] for part, named in used.items()}
    _count_images(place, [name for name in _folders(place, left_out) if [name] not in used.values()], left_out)
    if labelled:
        return found
    if without := [named[0] for named in used.values() if named[0] in flat]:
        problem = f"{joined(without)} next to {train[0]} holds no class folders"
        raise refusal(problem, "remove it, or give only data.train_dir, from which a test part is then split off")
    classes = set(_folders(found[TRAIN]))
    if others := [name for name in names if name not in inside and classes.intersection(_folders(place / name))]:
        problem = f"{train[0]} is the training part by its name, but {', '.join(others)} next to it is not a part"
        remedy = f"rename parts to val or test, or give the class {train[0]} another name, or {OTHERWISE}"
        raise refusal(problem, remedy)
    return found


def _unwrapped(folder: Path, is_part: bool) -> Path:
    """Return the folder in which the set, or the part, begins: the inner one while a folder holds just one folder."""
    while len(names := _folders(folder)) == 1 and not any(_files_in(folder, Counter())):
        inner, of_part = folder / names[0], part_of(names[0]) is not None
        if (of_part and not is_part) or not (_folders(inner) or of_part or is_filler(names[0])):
            break
        folder = inner
    return folder


def _folders(place: Path, left_out: Counter[str] | None = None) -> list[str]:
    """Return the names of the folders in a folder, except hidden ones and those that can't be classes.

    OSError for a link to a folder that contains it.
    """
    with os.scandir(place) as entries:
        found = sorted(entry.name for entry in entries if entry.is_dir())
    for path in (place / name for name in found):
        if path.name[0] != "." and path.is_symlink() and path.parent.resolve().is_relative_to(path.resolve()):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    others = list(filter(folder_names.is_no_class, found))
    if left_out is not None:
        _count_images(place, others, left_out)
    return [name for name in found if name not in others]


def _count_images(place: Path, names: Sequence[str], left_out: Counter[str]) -> None:
    """Count the images in folders that are left out because of their names."""
    for name in names:
        inside = sum(
            file.lower().endswith(tuple(extensions())) for *_, files in os.walk(place / name) for file in files
        )
        left_out[f"images in folders {printable(name)}"] += inside


def _classes(folder: Path, what: str, named: bool, left_out: Counter[str]) -> Classes:
    """Return the images of the class folders in `folder`. Unless `named`, possible parts or versions are refused."""
    names = _folders(folder, left_out)
    beside = len(list(_files_in(folder, left_out)))
    if len(names) < 2:
        others = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name not in names)
        known = f" (not counting {joined(others)}, which are no classes by their names)" * bool(others)
        known += f" next to {beside} images" * bool(beside)
        problem = f"holds {counted(len(names), 'class folder')}{known}, but at least 2 are needed"
        remedy = f"give {what}" + ", or a CSV of labels as data.labels" * bool(beside)
        raise InputError("data.dir", folder, problem, remedy)
    if beside:
        left_out["images outside the class folders"] += beside
    if not named:
        _refuse_versions(folder, names)
    found: Classes = {}
    for name in names:
        files = list(_files(folder / name, left_out))
        masks = folder_names.masks_among(files)
        left_out["masks of images"] += len(masks)
        found.setdefault(unicodedata.normalize("NFC", printable(name)), []).extend({*files} - masks)
    return found


def _refuse_versions(folder: Path, names: list[str]) -> None:
    """Raise InputError if folders are, or contain, parts or versions of one set instead of classes."""
    inner = {name: set(_folders(_unwrapped(folder / name, is_part=False))) for name in names}
    for name, inside in () if folder_names.are_pieces(names) else inner.items():
        parts = any((part := part_of(each)) and part[0] != UNLABELLED and not part[1] for each in inside)
        if parts and all(inner.values()) and len({frozenset(each) for each in inner.values()}) == 1:
            problem = f"each class in it holds parts ({', '.join(sorted(inside))})"
            remedy = f"move the parts above the classes, as {sorted(inside)[0]}/{name}"
            raise InputError("data.dir", folder, problem, remedy)
        if parts or len(inside.intersection(names)) > 1 or (len(inside) > 1 and is_filler(name)):
            problem = f"{name} in it is a data set of its own, not a class"
            raise InputError("data.dir", folder, problem, f"give the path of one set, or {ALL_CLASSES}")
    several = {name: inside for name, inside in inner.items() if len(inside) > 1}
    if name := next((name for name, inside in several.items() if folder_names.hold_masks([*inside])), ""):
        problem = f"{name} in it holds images and their masks ({', '.join(sorted(inner[name]))})"
        raise InputError("data.dir", folder, problem, "move the masks to another place")
    for name, inside in several.items():
        alike = [other for other, more in several.items() if len(inside & more) > 1]
        if len(alike) > 1:
            shared = ", ".join(sorted(inside & several[next(other for other in alike if other != name)])[:SHOWN])
            problem = f"{joined(alike)} hold the same folders ({shared}), like versions or parts of one set"
            break
    else:
        if not folder_names.are_versions(names):
            return
        problem = f"{joined(names)} are versions or pieces of one set by their names, not classes"
    remedy = f"give one of them, {OTHERWISE}, or {ALL_CLASSES}"
    raise InputError("data.dir", folder, problem, remedy)


def _files(folder: Path, left_out: Counter[str]) -> Iterator[Path]:
    """Yield the images in a folder at any depth. Hidden files are ignored, and links to folders are counted."""
    for inner in map(folder.joinpath, _folders(folder, left_out)):
        if inner.is_symlink():
            left_out["links to folders"] += 1
        else:
            yield from _files(inner, left_out)
    yield from _files_in(folder, left_out)


def _files_in(folder: Path, left_out: Counter[str]) -> Iterator[Path]:
    """Return the images directly in a folder. Other files are counted."""
    known = extensions()
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.is_dir():
                continue
            path, (stem, dot, tail) = Path(entry), entry.name.rpartition(".")
            ending = (dot + tail).lower() if stem else ""
            named = ending in known
            if named and not entry.is_file() and path.exists():  # a pipe or a device, which might never end
                raise OSError(errno.EINVAL, "not a regular file", str(path))
            if named or (not re.fullmatch(r"\.[a-z]\w{0,8}", ending) and entry.is_file() and _holds_image(path)):
                yield path
            elif not path.exists():
                left_out["broken links"] += 1
            else:
                left_out[f"{printable(ending)} files" if ending else "files without an extension"] += 1


def _holds_image(path: Path) -> bool:
    """Say whether a file without a known extension begins like an image."""
    from effv2.data.decoder import BROKEN, TOO_LARGE, open_image

    try:
        with open_image(path) as image:
            return image.format not in NO_IMAGES
    except TOO_LARGE:
        return True
    except BROKEN:
        return False


def _checked_classes(
    root: Path, folders: Mapping[str, Path], parts: Mapping[str, Classes], config: DataConfig, left_out: Counter[str]
) -> list[str]:
    """Return the classes, sorted. InputError if a part lacks one or has no image of it, unless that is allowed."""
    train, or_allow = parts[TRAIN], "or give data.allow_incomplete_classes true"
    for part, found in () if config.allow_incomplete_classes else parts.items():
        if differing := sorted({*train} ^ {*found}):
            names = f"{folders[TRAIN].name} and {folders[part].name}"
            problem = f"the folders {names} hold different classes ({', '.join(differing)})"
            raise InputError("data.dir", root, problem, f"give both the same ones, {or_allow}")
        for folder in (folders[part] / name for name, files in found.items() if not files):
            there = Counter(path.suffix or "files" for path in folder.rglob("*") if path.is_file())
            but = f", but {', '.join(f'{count} {kind}' for kind, count in there.most_common(SHOWN))}" * bool(there)
            problem = f"the class folder {folder} holds no images{but}"
            raise InputError("data.dir", root, problem, f"fill or remove it, {or_allow}")
    classes = sorted({name for found in parts.values() for name, files in found.items() if files})
    if twins := folder_names.twins(classes):
        problem = f"the classes {' and '.join(map(repr, twins))} look like two spellings of one name"
        raise InputError("data.dir", root, problem, "write them in the same way, or rename one")
    for part, found in parts.items():
        if lacking := [name for name in classes if not found.get(name)]:
            left_out[f"classes that {part} lacks, such as {lacking[0]}"] = len(lacking)
    if len(classes) < 2 or not any(train.values()):
        raise InputError("data.dir", root, "fewer than 2 classes with images are left", "add images")
    return classes


def _images(root: Path, named: tuple[str, Path] | None, found: Classes, classes: Sequence[str]) -> LabelledImages:
    """Return images. Their ids are their paths below `root`, or below a named part, after the name of the part."""
    from effv2.data.images import LabelledImages

    files = [(path, label) for label, name in enumerate(classes) for path in sorted(found.get(name, []))]
    ids = [path.relative_to(named[1] if named else root).as_posix() for path, _ in files]
    paths, labels = [path for path, _ in files], [label for _, label in files]
    return LabelledImages.of_files(paths, labels, [printable(f"{named[0]}/{id_}" if named else id_) for id_ in ids])
