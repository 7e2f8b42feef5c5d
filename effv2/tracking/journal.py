"""What a run has written and the tracking store may not have yet, on this disk, so that a kill loses nothing.

<cache>/outbox/<run id>/
    journal    a line an entry: CRC-32 of the JSON, a space, the JSON; the first one names store and process
    files/<n>  the files of an entry
    lock       held by the process that writes

A line that is damaged, or that a kill cut short, is left out when the journal is read.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from effv2.tracking.entries import Entry

HEADER = "run"


class Busy(Exception):
    """The journal of a run is in use."""


class Journal:
    """The journal of one run, held by this process until it is closed."""

    def __init__(self, folder: Path, lock: BaseFileLock) -> None:
        self.folder, self._lock = folder, lock
        self._file = (folder / "journal").open("ab", buffering=0)
        self._files = 0

    @classmethod
    def create(cls, folder: Path, header: Mapping[str, str]) -> Journal:
        """Begin the journal of a run, its first line `header`; OSError if the disk refuses, Busy if there is one."""
        folder.mkdir(parents=True, exist_ok=True)
        lock = _acquire(folder)
        if lock is None:
            raise Busy("another process works on it; wait for that one")
        if (folder / "journal").exists() and (folder / "journal").stat().st_size:
            lock.release()
            raise Busy(f"what it logged before waits in {folder}; try `effv2 sync`")
        shutil.rmtree(folder / "files", ignore_errors=True)
        journal = cls(folder, lock)
        try:
            journal.append(Entry(HEADER, header))
        except OSError:
            journal.close()
            raise
        return journal

    @classmethod
    def take_over(cls, folder: Path) -> Journal | None:
        """Return the journal that a dead process left; None while its process lives; FileNotFoundError for none."""
        if not (folder / "journal").exists():
            raise FileNotFoundError(folder / "journal")
        lock = _acquire(folder)
        if lock is not None and not (folder / "journal").exists():  # removed meanwhile, and the lock made anew
            shutil.rmtree(folder, ignore_errors=True)
            lock.release()
            raise FileNotFoundError(folder / "journal")
        return None if lock is None else cls(folder, lock)

    def append(self, entry: Entry) -> Entry:
        """Add an entry at the end; return it with the copies of its files. OSError leaves what there was."""
        files: dict[str, int] = {}
        if entry.folder is not None:
            kept = self.folder / "files" / str(self._files)
            self._files += 1
            try:
                _copy(entry.folder, kept)
            except OSError:
                shutil.rmtree(kept, ignore_errors=True)
                raise
            files = _checksums(kept)
            entry = Entry(entry.kind, entry.content, kept)
        folder = entry.folder.name if entry.folder else ""
        text = json.dumps({"kind": entry.kind, "content": entry.content, "folder": folder, "files": files})
        end = os.fstat(self._file.fileno()).st_size
        try:
            line = f"{zlib.crc32(text.encode()):08x} {text}\n".encode()
            if self._file.write(line) != len(line):
                raise OSError("the line was cut short")
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._file.fileno(), end)
            raise
        return entry

    def read(self) -> tuple[dict[str, Any], list[Entry], int]:
        """Return what the first line names (empty where it is damaged), the entries, and how many were damaged."""
        header: dict[str, Any] = {}
        entries: list[Entry] = []
        damaged = 0
        for found in self._read_lines():
            if found is None:
                damaged += 1
            elif found["kind"] == HEADER:
                header = found["content"]
            elif not found["folder"]:
                entries.append(Entry(found["kind"], found["content"]))
            elif (folder := self.folder / "files" / Path(found["folder"]).name).exists():  # else it was delivered
                if _checksums(folder) == found["files"]:
                    entries.append(Entry(found["kind"], found["content"], folder))
                else:
                    damaged += 1
        return header, entries, damaged

    def _read_lines(self) -> Iterator[dict[str, Any] | None]:
        *lines, _ = (self.folder / "journal").read_bytes().split(b"\n")  # the last is empty, or was cut short
        for line in lines:
            crc, _, text = line.partition(b" ")
            yield json.loads(text) if crc == b"%08x" % zlib.crc32(text) else None

    def delivered(self, entries: Iterable[Entry]) -> None:
        """Remove the files of entries that the store has now."""
        for entry in entries:
            if entry.folder is not None:
                shutil.rmtree(entry.folder, ignore_errors=True)

    def remove(self) -> None:
        """Remove the journal, when all of it was delivered."""
        self._file.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()

    def put_aside(self, suffix: str) -> Path:
        """Keep the journal where nobody sends it, under a name that ends in `suffix`; return it."""
        self._file.close()
        number = 0
        while (aside := self.folder.with_name(f"{self.folder.name}-{number}{suffix}")).exists():
            number += 1
        try:
            self.folder.rename(aside)
        finally:
            self._lock.release()
        return aside

    def close(self) -> None:
        """Let go of the journal, for whoever delivers it."""
        self._file.close()
        self._lock.release()


def _acquire(folder: Path) -> BaseFileLock | None:
    lock = FileLock(folder / "lock", thread_local=False)  # the outbox lets go of it in its thread
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    return lock


def _copy(folder: Path, target: Path) -> None:
    """Copy a folder of files; unlike shutil.copytree, OSError says which one and why."""
    for source in sorted(folder.rglob("*")):
        place = target / source.relative_to(folder)
        if source.is_dir():
            place.mkdir(parents=True)
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, place)


def _checksums(folder: Path) -> dict[str, int]:
    """Return the CRC-32 of every file below a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            crc = 0
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    crc = zlib.crc32(block, crc)
            found[path.relative_to(folder).as_posix()] = crc
    return found
