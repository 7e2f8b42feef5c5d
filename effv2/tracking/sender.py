"""A thread that sends logged values to the tracking store in order, so that training never waits for the store.

Waiting values are in memory: names and numbers that the training holds anyway. At most one checkpoint is on the disk.
If a process can't deliver values before it ends, the same command delivers them from the run's last checkpoint.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice, takewhile

from effv2.core.errors import RunError
from effv2.core.processes import SENDER, stop_if_told
from effv2.core.reporter import Message
from effv2.tracking.addresses import shown_uri
from effv2.tracking.store import WAIT_SECONDS, TrackingAway, answers, is_refusal, reason
from effv2.tracking.writer import Item, LatestSteps, send

MOST_AT_ONCE = 1_000  # values per call: the maximum of the server
LOOK_SECONDS = 0.2  # seconds between two checks of how long the store has been away
LAST_CALL = 1.0  # seconds for the current call to end
MOST_FAILURES = 3  # consecutive failures, of a store that has accepted nothing yet
LONGEST_WAIT = 15.0  # seconds between two attempts


class Sender:
    """Sends the values of one run, each once. With `resumed`, another process may have logged some of them."""

    def __init__(self, run_id: str, message: Message, resumed: bool) -> None:
        self.run_id, self._message = run_id, message
        self._known: LatestSteps | None = {} if resumed else None
        self._waiting: deque[Item] = deque()
        self._changed = threading.Condition()
        self.trouble: Exception | None = None  # why the last attempt failed
        self._failures = 0  # of the last attempts
        self._refusal: Exception | None = None  # the first final refusal
        self.checked, self.closed, self._at_once = False, False, MOST_AT_ONCE
        self._thread = threading.Thread(target=self._send_all, name=f"{SENDER}{run_id}", daemon=True)
        self._thread.start()

    def put(self, *items: Item) -> None:
        """Queue values to be sent; RunError if the store has permanently refused something."""
        if self._refusal is not None:
            raise RunError(f"The tracking store refused values of the run ({reason(self._refusal)}).")
        with self._changed:
            self._waiting.extend(items)
            self._changed.notify_all()

    def check(self) -> None:
        """Wait, before a training begins, until everything is delivered; RunError after a few failures."""
        self.flush(math.inf)
        self.checked = True

    def flush(self, seconds: float) -> None:
        """Wait until everything is delivered, as long as the store answers.

        TrackingAway if there is no answer for `seconds`. RunError after a refusal and, until `check` has
        succeeded, after a few failures.
        """
        with self._changed:
            deadline = time.monotonic() + seconds
            while self._waiting and (self.checked or self._failures < MOST_FAILURES):
                if self.trouble is None:
                    deadline = time.monotonic() + seconds
                elif time.monotonic() > deadline:
                    raise TrackingAway(
                        f"The tracking store {shown_uri()} doesn't accept values ({reason(self.trouble)}): some values "
                        f"of the run {self.run_id} are not there yet; start it."
                    )
                self._changed.wait(LOOK_SECONDS)
                stop_if_told()
            trouble = self._refusal or (self.trouble if self._waiting else None)
        if trouble is not None:
            raise RunError(
                f"The tracking store {shown_uri()} doesn't accept values of the run ({reason(trouble)}); fix it.",
                resumes=True,
            ) from trouble

    def finish(self, items: Sequence[Item], seconds: float) -> bool:
        """Send the last values, even after a refusal. Return whether all arrived within `seconds`."""
        with self._changed:
            self._waiting.extend(items)
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not self._waiting, seconds)

    def close(self) -> None:
        """End the thread. Its last call may take a moment."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()
        self._thread.join(LAST_CALL)

    def _send_all(self) -> None:
        """Send values until the sender is closed. Runs in the thread."""
        pause = WAIT_SECONDS
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self.closed)
                if self.closed:
                    return
                values = takewhile(lambda item: not callable(item), self._waiting)
                batch = list(islice(values, self._at_once)) or [self._waiting[0]]
            done = self._try(batch)
            with self._changed:
                self._failures = 0 if done else self._failures + 1
                for _ in batch if done else []:
                    self._waiting.popleft()
                self._changed.notify_all()
                if self.trouble is not None:
                    self._changed.wait_for(lambda: self.closed, pause)
            pause = WAIT_SECONDS if self.trouble is None else min(2 * pause, LONGEST_WAIT)

    def _try(self, batch: Sequence[Item]) -> bool:
        """Send a batch and return whether it is done. Report the beginning and the end of an outage."""
        try:
            if self.trouble is not None and not answers():
                return False
            send(self.run_id, batch, self._known)
        except Exception as error:
            self._known = {}  # some of it may have arrived
            if not is_refusal(error):
                if self.trouble is None and self.checked:
                    self._say(f"doesn't accept values ({reason(error)}): the run continues, and its values wait.")
                self.trouble = error
                return False
            if len(batch) > 1:  # to find the refused value
                self._at_once = len(batch) // 2
                return False
            self._refusal = self._refusal or error
        self._at_once = min(2 * self._at_once, MOST_AT_ONCE)
        if self.trouble is not None and self.checked:
            self._say("answers again.")
        self.trouble = None
        return True

    def _say(self, text: str) -> None:
        with suppress(Exception):  # a closed terminal must not end the thread
            self._message(f"The tracking store {shown_uri()} {text}")
