"""The process: its memory, the signals that end it, its name, and whether another process is still alive."""

import ctypes
import os
import re
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from effv2.core.errors import Terminated

PROC = Path("/proc")
# mallopt's parameters (malloc.h) and the values that keep large blocks. By default, glibc returns each of them to the
# system and faults it in again.
ALLOCATOR = {
    -4: 0,  # M_MMAP_MAX: no block has a mapping of its own
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD: hardly anything is given back
    -2: 64 * 2**20,  # M_TOP_PAD: what the heap grows by
}
ENDING_SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
# Two signals within this many seconds count as one: Ctrl-C under `mlflow run` is followed by a SIGTERM.
TOGETHER_SECONDS = 0.5
SHELLS = ("bash", "sh", "dash")  # between `mlflow run` and the command
SENDER = "sender "  # prefix of the names of threads that send to the tracking store


def tune_allocator() -> None:
    """Set glibc's allocator. Call it before torch's first tensor. EFFV2_ALLOCATOR=system turns this off."""
    if os.environ.get("EFFV2_ALLOCATOR") != "system" and sys.platform.startswith("linux"):
        if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
            for parameter, value in ALLOCATOR.items():
                mallopt(parameter, value)


def work_where_typed() -> None:
    """Change to the folder where the user typed `mlflow run`, which starts commands in a copy of the project.

    Relative paths then mean what the user expects, and the same command finds its files again.
    """
    if sys.argv[0].startswith("entry_points") and "MLFLOW_RUN_ID" in os.environ:
        with suppress(OSError, StopIteration):
            os.chdir(next(folders_above()))


def folders_above() -> Iterator[Path]:
    """Yield the folders of the programs that started this one, without shells: under `mlflow run`, first its folder."""
    import psutil

    with suppress(psutil.Error):
        for above in psutil.Process().parents():
            if above.name() not in SHELLS:
                yield Path(above.cwd())


class _Ending:
    """Remembers and raises the first signal, unless that must wait. If `repeated`, a later one ends the process."""

    deferred, first, came = False, 0, 0.0

    def __init__(self, repeated: bool) -> None:
        self.repeated = repeated

    def __call__(self, number: int, _frame: Any) -> None:
        if not self.first:
            self.first, self.came = number, time.monotonic()
            self.raise_first()
        elif self.repeated and time.monotonic() - self.came > TOGETHER_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def raise_first(self) -> None:
        """Raise KeyboardInterrupt or Terminated if there was a signal."""
        if self.first and not self.deferred:
            raise KeyboardInterrupt if self.first == signal.SIGINT else Terminated


@contextmanager
def handlers(wanted: Mapping[int, Any]) -> Iterator[None]:
    """Set handlers of signals while inside. Nothing changes outside the main thread, where Python allows none."""
    before = {number: signal.signal(number, wanted[number]) for number in wanted if _in_main_thread()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ending_signals(repeated: bool = True) -> AbstractContextManager[None]:
    """Raise KeyboardInterrupt or Terminated at the first of Ctrl-C, SIGTERM and a lost terminal.

    If `repeated`, a second one ends the process at once. Otherwise it is ignored, because it would interrupt the
    marking of runs. A signal that was ignored before remains ignored, as nohup and background jobs require. Nothing
    changes if a caller already raises them, or outside the main thread.
    """
    heard = [number for number in ENDING_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    return handlers({} if _ending() else dict.fromkeys(heard, _Ending(repeated)))


def _in_main_thread() -> bool:
    """Say whether this is the main thread: the only one that may set handlers of signals, and that they interrupt."""
    return threading.current_thread() is threading.main_thread()


def _ending() -> _Ending | None:
    if not _in_main_thread():
        return None
    return next((each for each in map(signal.getsignal, ENDING_SIGNALS) if isinstance(each, _Ending)), None)


def stop_if_told() -> None:
    """Raise again the ending signal that arrived, if any; not while the process ends, nor outside the main thread.

    In a destructor or a weak reference's callback, Python drops what a handler raises. So long work calls this.
    """
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, (KeyboardInterrupt, Terminated)):
        error = error.__context__
    if error is None and (ending := _ending()) is not None:
        ending.raise_first()


def leave(code: int) -> NoReturn:
    """End with this code, at once if a thread still talks to the tracking store, for example in a long call.

    A regular exit of Python would wait for that thread, or unload torch's libraries while the thread uses them. A
    caller that replaced the outputs, as tests do, continues instead.
    """
    sending = any(thread.name.startswith(SENDER) for thread in threading.enumerate())
    if sys.stderr is sys.__stderr__ and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # another Ctrl-C needs no traceback of how Python ends
    if sending and sys.stderr is sys.__stderr__:
        with suppress(OSError, AttributeError):
            sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay ending signals, also one that arrived before: they are raised at the end of the outermost block."""
    ending = _ending()
    if ending is None or ending.deferred:
        yield
        return
    ending.deferred = True
    try:
        yield
    finally:
        ending.deferred = False
    stop_if_told()


@cache
def this_process() -> str:
    """Name this process uniquely: boot of the machine, process namespace, pid, start time, a random part.

    If the system doesn't provide these, only the random part remains, and is_alive knows nothing.
    """
    unique = uuid.uuid4().hex
    where, started = _where(), _started(os.getpid())
    return f"{where}/{os.getpid()}/{started}/{unique}" if where and started else unique


def is_gone(process: str) -> bool:
    """Say whether a process has certainly ended; False if that can't be known from here."""
    return is_alive(process) is False


def is_alive(process: str) -> bool | None:
    """Say whether a process is alive; None if that can't be known from here, for example on another machine."""
    *where, pid, started, _ = process.split("/") if process.count("/") == 4 else ("", "", "", "")
    if not re.fullmatch("[0-9]{1,9}", pid) or "/".join(where) != _where():  # the former where somebody wrote it
        return None
    if _started(int(pid)) == started:
        return True
    if not (PROC / pid).exists():
        try:
            os.kill(int(pid), 0)
        except PermissionError:
            return None  # the process of another user may be hidden
        except OSError:
            pass
    return False


@cache
def _where() -> str:
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{(PROC / 'self/ns/pid').readlink()}"
    except OSError:  # not Linux: only start times distinguish processes
        return "" if PROC.exists() else f"{uuid.getnode():x}/{sys.platform}"


def _started(pid: int) -> str:
    """Return the start time of a process, on Linux in ticks; empty if it has ended (as a zombie has)."""
    if not PROC.exists():
        import psutil

        with suppress(psutil.Error):
            process = psutil.Process(pid)
            return "" if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.2f}"
        return ""
    try:
        # The name, in parentheses, may hold anything. The 1st field after it is the state, the 20th the start time.
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
