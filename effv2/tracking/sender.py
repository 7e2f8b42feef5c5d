"""What a run logs, sent to the tracking store in order by a thread, so that training never waits for the store.

What waits is held in memory: names and numbers that the training holds anyway, and one checkpoint on the disk at most.
What a process can't deliver before it ends, the same command delivers from the run's last checkpoint.
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

MOST_AT_ONCE = 1_000  # values: as many as the server takes
LOOK_SECONDS = 0.2  # between two looks at how long a store has been away
LAST_CALL = 1.0  # seconds that the call in progress has to come to an end
MOST_FAILURES = 3  # in a row, of a store that has taken nothing yet
LONGEST_WAIT = 15.0  # seconds between two attempts


class Sender:
    """Sends what one run logs, each thing once. `resumed` says that another process may have logged some of it."""

    def __init__(self, run_id: str, message: Message, resumed: bool) -> None:
        self.run_id, self._message = run_id, message
        self._known: LatestSteps | None = {} if resumed else None
        self._waiting: deque[Item] = deque()
        self._changed = threading.Condition()
        self.trouble: Exception | None = None  # why the last attempt failed
        self._failures = 0  # of the last attempts
        self._refusal: Exception | None = None  # the first that was for good
        self.checked, self.closed, self._at_once = False, False, MOST_AT_ONCE
        self._thread = threading.Thread(target=self._send_all, name=f"{SENDER}{run_id}", daemon=True)
        self._thread.start()

    def put(self, *items: Item) -> None:
        """Let things be sent soon; RunError where the store has refused something for good."""
        if self._refusal is not None:
            raise RunError(f"The tracking store refused what the run logged ({reason(self._refusal)}).")
        with self._changed:
            self._waiting.extend(items)
            self._changed.notify_all()

    def check(self) -> None:
        """Wait until everything is delivered; RunError after a few failures: before a training begins."""
        self.flush(math.inf)
        self.checked = True

    def flush(self, seconds: float) -> None:
        """Wait until everything is delivered, however long that takes while the store answers.

        TrackingAway where it has been away for so many seconds. RunError after a refusal and, until `check` has
        succeeded, after a few failures.
        """
        with self._changed:
            deadline = time.monotonic() + seconds
            while self._waiting and (self.checked or self._failures < MOST_FAILURES):
                if self.trouble is None:
                    deadline = time.monotonic() + seconds
                elif time.monotonic() > deadline:
                    raise TrackingAway(
                        f"The tracking store {shown_uri()} is away, or takes nothing ({reason(self.trouble)}): some of "
                        f"what the run {self.run_id} logged isn't there yet; start it."
                    )
                self._changed.wait(LOOK_SECONDS)
                stop_if_told()
            trouble = self._refusal or (self.trouble if self._waiting else None)
        if trouble is not None:
            raise RunError(
                f"The tracking store {shown_uri()} doesn't take what the run logs ({reason(trouble)}); fix it.",
                resumes=True,
            ) from trouble

    def finish(self, items: Sequence[Item], seconds: float) -> bool:
        """Send the last things, whatever was refused before; say whether all arrived within so many seconds."""
        with self._changed:
            self._waiting.extend(items)
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not self._waiting, seconds)

    def close(self) -> None:
        """End the thread, which may take a moment to end its last call."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()
        self._thread.join(LAST_CALL)

    def _send_all(self) -> None:
        """Send what comes until the sender is closed. Runs in the thread."""
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
        """Send a batch, say whether it is done with; tell of an outage at its begin and its end."""
        try:
            if self.trouble is not None and not answers():
                return False
            send(self.run_id, batch, self._known)
        except Exception as error:
            self._known = {}  # some of it may have arrived
            if not is_refusal(error):
                if self.trouble is None and self.checked:
                    self._say(f"is away, or takes nothing ({reason(error)}): the run continues, what it logs waits.")
                self.trouble = error
                return False
            if len(batch) > 1:  # to find out which of them it is
                self._at_once = len(batch) // 2
                return False
            self._refusal = self._refusal or error
        self._at_once = min(2 * self._at_once, MOST_AT_ONCE)
        if self.trouble is not None and self.checked:
            self._say("is back.")
        self.trouble = None
        return True

    def _say(self, text: str) -> None:
        with suppress(Exception):  # a terminal that was closed must not end the thread
            self._message(f"The tracking store {shown_uri()} {text}")
