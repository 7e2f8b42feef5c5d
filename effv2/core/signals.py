"""Ctrl-C, SIGTERM and a lost terminal end a command once, in order."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from effv2.core.errors import Terminated

ENDING_SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]


@contextmanager
def ending_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt or Terminated at the first ending signal, ignore further ones.

    Further ones would cut short the marking of runs. A signal that is ignored stays so: nohup and background jobs
    of a shell ask for it.
    """
    heard = [number for number in ENDING_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _end) for number in heard}
    try:
        yield
    finally:
        _Heard.deferred, _Heard.number = False, None
        for number, handler in before.items():
            signal.signal(number, handler)


class _Heard:
    """The ending signal that was heard, and whether it must wait."""

    deferred = False
    number: int | None = None


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let what is done inside be done whole: an ending signal that arrives meanwhile is raised at the end.

    One that was raised before is raised again: in a destructor or a callback, Python swallows what a handler raises.
    Within another such block nothing is raised before the end of that one.
    """
    within, _Heard.deferred = _Heard.deferred, True
    try:
        yield
    finally:
        _Heard.deferred = within
    if not within:
        _raise_heard()


def _end(number: int, _frame: Any) -> None:
    for other in ENDING_SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    _Heard.number = number
    if not _Heard.deferred:
        _raise_heard()


def _raise_heard() -> None:
    if _Heard.number is not None:
        raise KeyboardInterrupt if _Heard.number == signal.SIGINT else Terminated
