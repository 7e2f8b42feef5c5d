"""Labels of images from a CSV with a column of files and one of labels, as on Kaggle."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from effv2.core.errors import InputError
from effv2.core.paths import read_text
from effv2.data.part_names import part_of

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
            for name in {inside.name.casefold(), inside.stem.casefold()}:
                known.setdefault(name, []).append((part, each, inside))
    labels: dict[Path, tuple[str, str]] = {}  # part and label by file
    missing: list[str] = []
    for file, label, named in _rows(path):
        wanted = PurePosixPath("/", file.replace("\\", "/"))
        of_folder = next(filter(None, map(_part, reversed(wanted.parts[1:-1]))), "")
        found = known.get(wanted.name.casefold(), [])
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
    """Return the part that a word names; empty if it names none."""
    return (part_of(name) or ("",))[0]


def _ends_with(path: PurePosixPath, wanted: PurePosixPath) -> bool:
    """Say whether a path, with or without its extension, has the wanted end."""
    return any(f"/{each}".casefold().endswith(str(wanted).casefold()) for each in (path, path.with_suffix("")))


def _rows(path: Path) -> list[tuple[str, str, str]]:
    """Return the file, the label and, if there is a column for it, the part of each line."""
    if not path.is_file():
        raise InputError("data.labels", path, "no such file", "give a CSV with a column of files and one of labels")
    try:
        text = read_text(path, LARGEST).removeprefix("\ufeff")
        delimiter = max(",;\t", key=text.partition("\n")[0].count)
        rows = list(csv.DictReader(io.StringIO(text), delimiter=delimiter))
    except OSError as error:
        raise InputError("data.labels", path, f"can't be read ({error.strerror})", "give another file") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError("data.labels", path, f"it is not a CSV in UTF-8 ({error})", "correct it") from error
    names = [name for name in (rows[0] if rows else {}) if name]
    plain = {re.sub(r"[\W_]+", "", name.casefold()): name for name in reversed(names)}
    columns = [
        next((plain[each] for each in known.split() if each in plain), "") for known in (FILE_COLUMNS, LABEL_COLUMNS)
    ]
    if len(names) == 2 and any(columns):  # the other column is the other one
        columns = [column or next(name for name in names if name not in columns) for column in columns]
    if not all(columns) or columns[0] == columns[1]:
        shown = ", ".join(names[:SHOWN]) or "it is empty"
        problem = f"its first line doesn't name a column of files and one of labels ({shown})"
        raise InputError("data.labels", path, problem, "name them file and label")
    columns.append(next((plain[each] for each in PART_COLUMNS.split() if each in plain), ""))
    of_file, of_label, part = columns
    found = [
        ((row[of_file] or "").strip("\0 "), (row[of_label] or "").strip("\0 "), row.get(part) or "") for row in rows
    ]
    found = [(file, "" if label.casefold() == "nan" else label, part) for file, label, part in found if file or label]
    if broken := next((label for _, label, _ in found if "\n" in label), ""):
        raise InputError("data.labels", path, f"a label holds a line break ({broken[:40]!r})", "close its quote")
    return found
