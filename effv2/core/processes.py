"""Is the process that took a piece of work still there? Answered at once for processes of this machine."""

from __future__ import annotations

import os
import uuid
from functools import cache
from pathlib import Path

PROC = Path("/proc")


@cache
def this_process() -> str:
    """Name this process for good: machine since its start, process namespace, pid, start time, a random part.

    Where the system doesn't tell (anything but Linux) only the random part remains, and is_gone knows nothing.
    """
    unique = uuid.uuid4().hex
    where, started = _where(), _started(os.getpid())
    return f"{where}/{os.getpid()}/{started}/{unique}" if where and started else unique


def is_gone(process: str) -> bool:
    """Say whether a process of this machine has ended; False for those that can't be seen from here."""
    pid, started = _here(process)
    return pid is not None and _started(pid) != started and not _hidden(pid)


def is_alive(process: str) -> bool:
    """Say whether a process of this machine lives; False for those that can't be seen from here."""
    pid, started = _here(process)
    return pid is not None and _started(pid) == started


def _here(process: str) -> tuple[int | None, str]:
    """Return pid and start time of a process of this machine; None for another's."""
    *where, pid, started, _ = process.split("/") if process.count("/") == 4 else ("", "", "", "")
    return (int(pid), started) if pid and "/".join(where) == _where() else (None, "")


def _hidden(pid: int) -> bool:
    """Say whether a process lives that another user's rules keep from our sight."""
    if (PROC / str(pid)).exists():
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return False


@cache
def _where() -> str:
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{(PROC / 'self/ns/pid').readlink()}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """Return the start time of a process in ticks, empty where it has ended (a zombie has)."""
    try:
        # The name, in parentheses, may hold anything; state is the first field after it, start time the twentieth.
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
