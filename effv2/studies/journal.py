"""A log in a folder that machines share, its locks, and signs of life: what a storage without a database is made of.

All that it asks of the file system is that one process alone creates a file that must be new, as on NFS 3 and later. A
lock is such a file, which its owner touches while it works, and removes at the end. Others remove it where the owner is
gone: a process of this machine that has ended, or one that has long touched nothing. If that one wakes up, it finds the
lock lost before it writes.
"""

import json
import math
import os
import tempfile
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend

from effv2.core.processes import is_gone, stop_if_told, this_process

TOUCH_SECONDS = 10.0
LONGEST_PAUSE = 0.2  # seconds between two attempts to take a lock
THREADS: dict[Path, threading.Lock] = defaultdict(threading.Lock)  # of this process, which take turns


class LogAway(Exception):
    """The log can't be read or written now; `lost` if it is no longer the file that was opened, or is damaged."""

    def __init__(self, problem: object, lost: bool = False) -> None:
        self.lost = lost
        super().__init__(str(problem))


def silence(path: Path) -> float:
    """Return how long ago a file was touched, in seconds by the clock of its file system; infinity where it is gone."""
    with tempfile.TemporaryFile(dir=path.parent) as probe:
        now = os.fstat(probe.fileno()).st_mtime
    with suppress(FileNotFoundError), path.open("rb") as file:  # opened: NFS then asks its server
        return now - os.fstat(file.fileno()).st_mtime
    return math.inf


class LockFile:
    """A lock; one that was silent for `grace` seconds, and is so for `longer` more, belongs to nobody."""

    def __init__(self, path: Path, grace: float, longer: float) -> None:
        self.path, self.grace, self.longer = path, grace, longer
        self._threads, self._token = THREADS[path], ""

    @contextmanager
    def held(self, patience: float) -> Iterator[None]:
        """Hold the lock, and touch it meanwhile; LogAway where others keep it for longer than `patience` seconds."""
        ended = threading.Event()
        if not self._threads.acquire(timeout=min(patience, threading.TIMEOUT_MAX)):
            raise LogAway(f"another thread keeps {self.path} locked")

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
        """Say whether the lock is ours."""
        return bool(self._token) and self.path.exists() and self.path.read_text("utf-8") == self._token

    def is_lost(self) -> bool:
        """Say whether the lock was ours, and was taken away."""
        return bool(self._token) and not self.is_held()

    def _take(self, deadline: float) -> None:
        self._token = f"{this_process()} {uuid.uuid4().hex}"
        silent: str | None = None
        pause, since = 0.001, 0.0
        while True:
            with suppress(FileExistsError):
                with self.path.open("x", encoding="utf-8") as file:
                    file.write(self._token)
                return
            with suppress(FileNotFoundError):  # it was given back
                owner, now = self.path.read_text("utf-8"), time.monotonic()
                if silence(self.path) < self.grace or owner != silent:
                    silent, since = owner, now
                process = owner.partition(" ")[0]
                # Where it is of this process, what had taken it was interrupted: another thread would still hold it.
                if is_gone(process) or process == this_process() or now - since > self.longer:
                    self._break(owner)
                    continue
            stop_if_told()
            if time.monotonic() > deadline:
                raise LogAway(f"another process keeps {self.path} locked; end it")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _break(self, owner: str) -> None:
        """Remove the lock of an owner; put back what another process has taken in the meantime."""
        aside = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}")
        self.path.rename(aside)
        if aside.read_text("utf-8") != owner:
            with suppress(FileExistsError):
                self.path.hardlink_to(aside)
        aside.unlink()


class Log(JournalFileBackend):
    """Optuna's log as a file: whole lines are appended, by one process at a time, under locks that weren't lost."""

    def __init__(self, path: Path, appending: LockFile, above: list[LockFile]) -> None:
        super().__init__(str(path))
        self.path, self.appending, self.above = path, appending, above
        self.number, self.patience = path.stat().st_ino, math.inf

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """Yield the entries from that number on."""
        with faults():
            yield from super().read_logs(log_number_from)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append entries, after cutting off what a dead process left of one."""
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        with self.appending.held(self.patience), faults(), self.path.open("r+b") as file:
            if os.fstat(file.fileno()).st_ino != self.number:
                raise FileNotFoundError(f"{self.path} was replaced")
            if any(lock.is_lost() for lock in self.above):
                raise LogAway("this process was silent for so long that others took its lock")
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            if file.read() not in (b"", b"\n"):
                file.seek(0)
                end = file.read().rfind(b"\n") + 1
                file.truncate(end)
            file.seek(end)
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def faults() -> Iterator[None]:
    """Raise LogAway for what a file system, or a damaged log, raises."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise LogAway(error, lost=isinstance(error, (FileNotFoundError, ValueError))) from error
