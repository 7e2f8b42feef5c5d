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


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that it is seen whole or not at all, whoever else writes it; OSError."""
    unfinished = path.parent / f".{uuid.uuid4().hex}"  # not by tempfile, which would hide it from other users for good
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Write a table, its titles first, as CSV in UTF-8."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
