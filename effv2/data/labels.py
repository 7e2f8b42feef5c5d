"""Labels of images from a CSV with a column of files and one of labels, as on Kaggle."""

import csv
import io
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from effv2.core.errors import InputError
from effv2.core.paths import read_text
from effv2.data.folder_names import UNLABELLED, part_of, printable

# Names of the columns, without case, spaces and dashes. The most certain names are first.
FILE_COLUMNS = (
    "filename file filepath imagefile imagepath imagename image imageid img imgname imgid path photo id name "
    "filepaths filenames images imageindex"
)
LABEL_COLUMNS = (
    "label labels class classname category categoryname target species breed variety diagnosis dx type y "
    "classid findinglabels"
)
PART_COLUMNS = "split part subset set usage partition"
SHOWN, LARGEST = 5, 100_000_000  # files; characters of a table


def read_labels(
    path: Path, files: Mapping[str, tuple[Path, Sequence[Path]]], left_out: Counter[str]
) -> dict[str, dict[str, list[Path]]]:
    """Return the files of each part by label. `files` holds the existing files, by part, with the part's folder.

    The table may name a file with or without its extension, and with any folders except those of another part. A column
    of parts has priority over the folders. InputError for any other table, and for files that don't exist or are
    ambiguous.
    """
    known: dict[str, list[tuple[str, Path, PurePosixPath]]] = {}
    for part, (folder, paths) in files.items():
        for each in paths:
            inside = PurePosixPath(folder.name, each.relative_to(folder).as_posix())
            for name in {_folded(inside.name), _folded(inside.stem)}:
                known.setdefault(name, []).append((part, each, inside))
    labels: dict[Path, tuple[str, str]] = {}  # part and label by file
    missing: list[str] = []
    for file, label, named in _rows(path):
        wanted = PurePosixPath("/", file.replace("\\", "/"))
        of_folder = next(filter(None, map(_part, reversed(wanted.parts[1:-1]))), "")
        found = known.get(_folded(wanted.name), [])
        found = [each for each in found if each[0] == _part(named)] or found
        found = [each for each in found if _ends_with(each[2], wanted)] or [
            each for each in found if of_folder in ("", each[0])
        ]
        if not found or not label:
            missing += [] if found else [file]
            left_out["rows without a label"] += not label
            continue
        part, there = _part(named) or found[0][0], found[0][1]
        if len(found) > 1:
            problem = f"{file} may be {found[0][1]} or {found[1][1]}"
            remedy = "write it with its folder and its extension, or give only the folder that it labels"
            raise InputError("data.labels", path, problem, f"{remedy} as data.train_dir")
        if labels.setdefault(there, (part, label)) != (part, label):
            problem = f"{file} has the labels {labels[there][1]} and {label}"
            raise InputError("data.labels", path, problem, "keep one")
    if missing:
        problem = f"{len(missing)} of its files don't exist as images ({', '.join(missing[:SHOWN])})"
        remedy = "remove these rows, or give the folders that hold them as data.train_dir and data.test_dir"
        raise InputError("data.labels", path, problem, remedy)
    if without := sum(len(paths) for _, paths in files.values()) - len(labels):
        left_out["images without a label"] += without
    names = {label for _, label in labels.values()}
    if other := sum(there.parent.name in names - {label} for there, (_, label) in labels.items()):
        left_out["folder names that differ from the table's labels"] += other
    parts: dict[str, dict[str, list[Path]]] = {}
    for there, (part, label) in labels.items():
        parts.setdefault(part, {}).setdefault(label, []).append(there)
    return parts


def _part(name: str) -> str:
    """Return the part with labels that a word names; empty if it names none."""
    part = (part_of(name) or ("",))[0]
    return "" if part == UNLABELLED else part


def _ends_with(path: PurePosixPath, wanted: PurePosixPath) -> bool:
    """Say whether a path, with or without its extension, has the wanted end."""
    return any(_folded(f"/{each}").endswith(_folded(str(wanted))) for each in (path, path.with_suffix("")))


def _folded(name: str) -> str:
    """Return a name without capitals, in one of the forms of Unicode."""
    return unicodedata.normalize("NFC", name).casefold()


def _rows(path: Path) -> list[tuple[str, str, str]]:
    """Return the file, the label and, if there is a column for it, the part of each line."""
    header, rows = _read(path)
    keys = [re.sub(r"[\W_]+", "", name.casefold()) for name in header]

    def known(names: str) -> list[int]:
        return [at for each in names.split() for at, key in enumerate(keys) if key == each]

    def refusal(problem: str, remedy: str) -> InputError:
        return InputError("data.labels", path, problem, remedy)

    files, labels, parts = map(known, (FILE_COLUMNS, LABEL_COLUMNS, PART_COLUMNS))
    named = [at for at, name in enumerate(header) if name]
    if len(named) == 2 and (files or labels):  # the other column is the other one
        files, labels = (files or [at for at in named if at not in labels]), labels or [*{*named} - {*files}]
    if not (files and labels):
        shown = ", ".join(header[at] for at in named[:SHOWN]) or "it is empty"
        problem = f"its first line doesn't name a column of files and one of labels ({shown})"
        raise refusal(problem, "name them file and label, and separate them by commas")
    for other in labels[1:]:
        pairs = {(row[labels[0]], row[other]) for row in rows}
        alike = len({one for one, _ in pairs}) == len(pairs) == len({two for _, two in pairs})
        if not alike and (keys[labels[0]] != "label" or keys[other] == "label"):
            problem = f"its columns {header[labels[0]]} and {header[other]} hold different labels"
            raise refusal(problem, "name only the right one label")
    found = [(row[files[0]], row[labels[0]], row[parts[0]] if parts else "") for row in rows]
    found = [(file, "" if label.casefold() == "nan" else label, part) for file, label, part in found if file or label]
    if broken := next((label for _, label, _ in found if "\n" in label), ""):
        raise refusal(f"a label holds a line break ({broken[:40]!r})", "close its quote")
    unknown = [part for _, label, part in found if label and not _part(part)]
    if unknown and any(_part(part) for *_, part in found):  # without any part, the column means something else
        problem = f"its column {header[parts[0]]} names no part in {len(unknown)} lines ({unknown[0] or 'empty'})"
        raise refusal(problem, "write train, val or test, or remove these lines")
    return [(file, printable(label), part) for file, label, part in found]


def _read(path: Path) -> tuple[list[str], list[list[str]]]:
    """Return the titles of a table, and its rows, filled up to as many cells, without spaces around them."""
    if not path.is_file():
        raise InputError("data.labels", path, "no such file", "give a CSV with a column of files and one of labels")
    try:
        text = read_text(path, LARGEST).removeprefix("\ufeff").lstrip("\r\n")
        delimiter = max(",;\t|", key=text.partition("\n")[0].count)
        lines = [line for line in csv.reader(io.StringIO(text), delimiter=delimiter) if line]
    except OSError as error:
        raise InputError("data.labels", path, f"can't be read ({error.strerror})", "give another file") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError("data.labels", path, f"it is not a CSV in UTF-8 ({error})", "save it as one") from error
    cells = [[unicodedata.normalize("NFC", cell).strip("\0").strip() for cell in line] for line in lines]
    header = cells[0] if cells else []
    return header, [line + [""] * (len(header) - len(line)) for line in cells[1:]]
