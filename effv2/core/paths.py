"""Folders that outlive a command, and atomic writes of files."""

import csv
import errno
import os
import re
import stat
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

FORMULA = re.compile(r"'*[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")  # first characters of a formula, also in full width
LARGEST_TEXT = 1_000_000  # bytes of a file that a user names: a study, claims, a manifest


def cache_folder() -> Path:
    """Return EFFV2_CACHE, else the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(os.environ.get("EFFV2_CACHE") or f"{base}/effv2"))


def read_text(path: Path, most: int = LARGEST_TEXT) -> str:
    """Return the text of a user's regular file. OSError for a pipe, a device or too large a file; ValueError."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    with path.open(encoding="utf-8") as file:
        text = file.read(most + 1)
    if len(text) > most:
        raise OSError(errno.EFBIG, f"it is larger than {most // 1_000_000} MB", str(path))
    return text


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file atomically, also with respect to a loss of power. Text is written in UTF-8. OSError."""
    unfinished = path.parent / f".{uuid.uuid4().hex}"  # not by tempfile, whose files other users can't read
    try:
        with unfinished.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Write a table, titles first, as CSV in UTF-8. An apostrophe precedes text that spreadsheets would compute."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([_neutralised(value) for value in row] for row in rows)


def _neutralised(value: Any) -> Any:
    if not isinstance(value, str) or not FORMULA.match(value):
        return value
    with suppress(ValueError):
        float(value)
        return value
    return f"'{value}"


def from_cell(text: str) -> str:
    """Return the text from which `write_csv` made this one."""
    return text[1:] if text.startswith("'") and FORMULA.match(text) else text
