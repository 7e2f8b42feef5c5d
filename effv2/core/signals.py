"""Ctrl-C, SIGTERM and a lost terminal end a command once, in order."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from effv2.core.errors import Terminated

ENDING_SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]


class _Ending:
    """A signal handler that remembers the first signal, and raises it unless that must wait."""

    def __init__(self) -> None:
        self.deferred = False
        self._first: int | None = None

    def __call__(self, number: int, _frame: Any) -> None:
        if self._first is None:
            self._first = number
            if not self.deferred:
                self.raise_first()

    def raise_first(self) -> None:
        """Raise KeyboardInterrupt or Terminated if there was a signal."""
        if self._first is not None:
            raise KeyboardInterrupt if self._first == signal.SIGINT else Terminated


@contextmanager
def ending_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt or Terminated at the first ending signal, ignore further ones.

    Further ones would cut short the marking of runs. A signal that is ignored stays so: nohup and background jobs
    of a shell ask for it.
    """
    heard = [number for number in ENDING_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    ending = _Ending()
    before = {number: signal.signal(number, ending) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let what is done inside be done whole: an ending signal that arrives meanwhile is raised at the end.

    One that was raised before is raised again: in a destructor or a callback, Python swallows what a handler raises.
    Within another such block nothing is raised before the end of that one.
    """
    handlers = map(signal.getsignal, ENDING_SIGNALS)
    ending = next((handler for handler in handlers if isinstance(handler, _Ending)), None)
    if ending is None or ending.deferred:
        yield
        return
    ending.deferred = True
    try:
        yield
    finally:
        ending.deferred = False
    ending.raise_first()
