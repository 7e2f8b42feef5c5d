"""Folders that outlive a command, and files written whole."""

import csv
import os
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """Return EFFV2_CACHE, else the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(os.environ.get("EFFV2_CACHE") or f"{base}/effv2"))


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that it is seen whole or not at all, whoever else writes it, after a loss of power too; OSError.

    A text is written in UTF-8.
    """
    unfinished = path.parent / f".{uuid.uuid4().hex}"  # not by tempfile, which would hide it from other users for good
    try:
        with unfinished.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Write a table, its titles first, as CSV in UTF-8."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
