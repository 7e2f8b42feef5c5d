"""A log in a shared folder, its locks, and heartbeats: the parts of a storage without a database.

Its only requirement is that the file system lets just one process create a new file exclusively, as NFS 3 and later do.
A lock is such a file. Its owner touches it during the work, and removes it at the end. Others remove it if the owner is
gone: a process of this machine that has ended, or one that has not touched it for long. If such an owner wakes up, it
notices the lost lock before it writes.
"""

import json
import os
import tempfile
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend

from effv2.core.errors import StoreAway
from effv2.core.processes import is_gone, stop_if_told, this_process, uninterrupted

TOUCH_SECONDS = 10.0
CHECKED_BYTES = 2**16  # at the end of a log, before it is opened
LONGEST_PAUSE = 0.2  # seconds between two attempts to take a lock
ENTRY = b'{"op_code"'  # prefix of each line
THREADS: dict[Path, threading.Lock] = defaultdict(threading.Lock)  # of this process, one for each thread in turn


class LogAway(Exception):
    """The log can't be read or written now. It is `lost` if it is damaged or no longer the file that was opened."""

    def __init__(self, problem: object, lost: bool = False) -> None:
        self.lost = lost
        super().__init__(str(problem))


def clock(folder: Path) -> float:
    """Return the time in seconds by the clock of a folder's file system, from a file written to it."""
    with tempfile.TemporaryFile(dir=folder) as probe:
        return os.fstat(probe.fileno()).st_mtime


def check_log(path: Path) -> None:
    """Raise LogAway if the first or last lines of the file are not those of a log, or if no log can be written."""
    with faults():
        clock(path.parent)
        if path.exists():
            with path.open("r+b") as file:
                first = file.readline()
                if not ENTRY.startswith(first[: len(ENTRY)]):
                    raise ValueError("the file is not the log of a study")
                file.seek(max(0, len(first) - 1, file.seek(0, os.SEEK_END) - CHECKED_BYTES))
                for line in [first, *file.read().split(b"\n")[1:]][:-1]:  # the last may be half a line
                    json.loads(line)


class LockFile:
    """A lock. It expires after `grace` seconds without a touch, followed by `longer` seconds of observation."""

    def __init__(self, path: Path, grace: float, longer: float) -> None:
        self.path, self.grace, self.longer = path, grace, longer
        self._threads, self._token = THREADS[path], ""

    @contextmanager
    def held(self, patience: float) -> Iterator[None]:
        """Hold the lock, and touch it meanwhile; StoreAway if others hold it for longer than `patience` seconds."""
        ended = threading.Event()
        if not self._threads.acquire(timeout=min(patience, threading.TIMEOUT_MAX)):
            raise StoreAway(f"Another thread holds the lock {self.path}.")

        def touch() -> None:
            while not ended.wait(TOUCH_SECONDS):
                with suppress(OSError):
                    os.utime(self.path)

        try:
            with faults():
                self._take(time.monotonic() + patience)
            threading.Thread(target=touch, daemon=True).start()
            yield
        finally:
            ended.set()
            with suppress(OSError):
                if self.is_held():
                    self.path.unlink()
            self._token = ""
            self._threads.release()

    def is_held(self) -> bool:
        """Say whether this process holds the lock."""
        return bool(self._token) and self.path.exists() and self.path.read_text("utf-8") == self._token

    def is_lost(self) -> bool:
        """Say whether this process held the lock and lost it."""
        return bool(self._token) and not self.is_held()

    def _take(self, deadline: float) -> None:
        self._token = f"{this_process()} {uuid.uuid4().hex}"
        before, behind, pause, since = ("", 0.0), None, 0.001, 0.0
        while True:
            with suppress(FileExistsError), uninterrupted():  # a lock without its owner's name would stay
                with self.path.open("x", encoding="utf-8") as file:
                    file.write(self._token)
                return
            with suppress(FileNotFoundError):  # it was given back
                with self.path.open(encoding="utf-8") as file:  # NFS then asks its server
                    seen, now = (file.read(), os.fstat(file.fileno()).st_mtime), time.monotonic()
                behind = clock(self.path.parent) - now if behind is None else behind
                if now + behind - seen[1] < self.grace or seen != before:
                    before, since = seen, now
                process = seen[0].partition(" ")[0]
                # A lock of this process is left from an interruption: another thread would still hold its turn.
                if is_gone(process) or process == this_process() or now - since > self.longer:
                    self._break(seen[0])
                    continue
            stop_if_told()
            if time.monotonic() > deadline:
                raise StoreAway(f"Another process holds the lock {self.path}; end that process.")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _break(self, owner: str) -> None:
        """Remove the lock of an owner. Put it back if another process has taken it in the meantime."""
        aside = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}")
        self.path.rename(aside)
        if aside.read_text("utf-8") != owner:
            with suppress(FileExistsError):
                self.path.hardlink_to(aside)
        aside.unlink()


class Log(JournalFileBackend):
    """Optuna's log as a file. Whole lines are appended under the last of `locks`, unless one of these was lost."""

    def __init__(self, path: Path, locks: list[LockFile], patience: Callable[[], float]) -> None:
        super().__init__(str(path))
        self.path, self.locks, self.patience, self.number = path, locks, patience, path.stat().st_ino

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """Yield the entries, beginning with this number."""
        with faults():
            yield from super().read_logs(log_number_from)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append entries, after cutting off the partial entry of a dead process."""
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        with self.locks[-1].held(self.patience()), faults(), self.path.open("r+b") as file:
            if os.fstat(file.fileno()).st_ino != self.number:
                raise FileNotFoundError(f"{self.path} was replaced")
            end, left = file.seek(0, os.SEEK_END), b""
            file.seek(max(0, end - 1))
            if file.read() not in (b"", b"\n"):
                file.seek(0)
                left = file.read().rpartition(b"\n")[2]
            if not ENTRY.startswith(left[: len(ENTRY)]):
                raise ValueError(f"{self.path} does not end with an entry")
            if any(lock.is_lost() for lock in self.locks):
                raise LogAway("this process did not answer for so long that another one took its lock")
            if left:
                file.truncate(end - len(left))
            with self.path.open("ab") as file_end:  # at the current end, so that no entry of others is overwritten
                file_end.write(lines)
                file_end.flush()
                os.fsync(file_end.fileno())


@contextmanager
def faults() -> Iterator[None]:
    """Turn errors of the file system or of a damaged log into LogAway."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise LogAway(error, lost=isinstance(error, (FileNotFoundError, ValueError))) from error
