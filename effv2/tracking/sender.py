"""What a run logs, sent to the tracking store in order by a thread, so that training never waits for the store.

What waits is held in memory: names and numbers that the training holds anyway, and one checkpoint on the disk at most.
What a process can't deliver before it ends, the same command delivers from the run's last checkpoint.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice, takewhile
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from effv2.core.errors import RunError
from effv2.core.reporter import Message
from effv2.tracking.store import WAIT_SECONDS, TrackingAway, answers, is_refusal, reason, shown_uri
from effv2.tracking.tags import LONGEST_TAG

MOST_AT_ONCE = 200  # things logged
MOST_IN_A_CALL = {"params": 100, "metrics": 900, "tags": 100}  # the server refuses more
LOOK_SECONDS = 0.2  # between two looks at how long a store has been away
LAST_CALL = 1.0  # seconds that the call in progress has to come to an end
LONGEST_WAIT = 15.0  # seconds between two attempts


@dataclass(frozen=True)
class Values:
    """Params, metrics of one moment (`step` where they belong to an epoch) and tags, of which a call takes many."""

    params: Mapping[str, object] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    step: int = 0
    tags: Mapping[str, str] = field(default_factory=dict)
    timestamp: int = field(default_factory=lambda: int(time.time() * 1000))  # as MLflow counts


Item = Values | Callable[[], None]  # anything else is a call that may be repeated
KnownSteps = dict[str, set[int]]  # the steps of each metric that the run has


def send_values(run_id: str, items: Sequence[Values], known: KnownSteps | None = None) -> None:
    """Log values in as few calls as the server's limits allow; not what the run has, as far as `known` is given.

    `known` is filled from the store as it is needed: there is one value a metric and step.
    """
    client = MlflowClient()
    metrics = []
    for item in items:
        for name, value in item.metrics.items():
            if known is not None and name not in known:
                known[name] = {each.step for each in client.get_metric_history(run_id, name)}
            if known is None or item.step not in known[name]:
                metrics.append(Metric(name, float(value), item.timestamp, item.step))
    params = {name: str(value) for item in items for name, value in item.params.items()}
    tags = {name: value[:LONGEST_TAG] for item in items for name, value in item.tags.items()}
    waiting: dict[str, list[Any]] = {
        "params": [Param(*item) for item in params.items()],
        "tags": [RunTag(*item) for item in tags.items()],
        "metrics": metrics,
    }
    while any(waiting.values()):
        now = {kind: each[: MOST_IN_A_CALL[kind]] for kind, each in waiting.items()}
        client.log_batch(run_id, metrics=now["metrics"], params=now["params"], tags=now["tags"])
        waiting = {kind: each[MOST_IN_A_CALL[kind] :] for kind, each in waiting.items()}
    if known is not None:
        for metric in metrics:
            known[metric.key].add(metric.step)


class Sender:
    """Sends what one run logs, each thing once. `resumed` says that another process may have logged some of it."""

    def __init__(self, run_id: str, message: Message, resumed: bool) -> None:
        self.run_id, self._message = run_id, message
        self._known: KnownSteps | None = {} if resumed else None
        self._waiting: deque[Item] = deque()
        self._changed = threading.Condition()
        self.trouble: Exception | None = None  # why the last attempt failed
        self._refusal: Exception | None = None  # the first that was for good
        self._at_once = MOST_AT_ONCE
        self.checked = False
        self._since = 0.0  # when the trouble began
        self.closed = False
        self._thread = threading.Thread(target=self._send_all, name=f"sender {run_id}", daemon=True)
        self._thread.start()

    def put(self, item: Item) -> None:
        """Let something be sent soon; RunError where the store has refused something for good."""
        if self._refusal is not None:
            raise RunError(f"The tracking store refused what the run logged ({reason(self._refusal)}).")
        with self._changed:
            self._waiting.append(item)
            self._changed.notify_all()

    def check(self) -> None:
        """Wait until everything is delivered; RunError at the first failure: before a training begins."""
        self.flush(0)
        self.checked = True

    def flush(self, seconds: float) -> None:
        """Wait until everything is delivered, however long that takes while the store answers.

        TrackingAway where it has been away for so many seconds. RunError after a refusal and, until `check` has
        succeeded, at the first failure.
        """
        began = time.monotonic()
        with self._changed:
            while self._waiting and self.checked >= (self.trouble is not None):
                if self.trouble is not None and time.monotonic() - max(began, self._since) > seconds:
                    raise TrackingAway(
                        f"The tracking store {shown_uri()} is away, or takes nothing ({reason(self.trouble)}): some of "
                        f"what the run {self.run_id} logged isn't there yet; start it."
                    )
                self._changed.wait(LOOK_SECONDS)
            trouble = self._refusal or (None if self.checked else self.trouble)
        if trouble is not None:
            raise RunError(
                f"The tracking store {shown_uri()} doesn't take what the run logs ({reason(trouble)}); mend it.",
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
                batch = self._next()
            done = self._try(batch)
            with self._changed:
                for _ in batch if done else []:
                    self._waiting.popleft()
                self._changed.notify_all()
                if not done and self.trouble is not None:
                    self._changed.wait_for(lambda: self.closed, pause)
            pause = WAIT_SECONDS if done else min(2 * pause, LONGEST_WAIT)

    def _next(self) -> list[Item]:
        """Return the values that wait before the next call, or that call."""
        values = takewhile(lambda item: isinstance(item, Values), self._waiting)
        return list(islice(values, self._at_once)) or [self._waiting[0]]

    def _try(self, batch: list[Item]) -> bool:
        """Send a batch, say whether it is done with; tell of an outage at its begin and its end."""
        try:
            if self.trouble is not None and not answers():
                return False
            if isinstance(batch[0], Values):
                send_values(self.run_id, [item for item in batch if isinstance(item, Values)], self._known)
            else:
                batch[0]()
        except Exception as error:
            self._known = {}  # some of it may have arrived
            if is_refusal(error):
                if len(batch) > 1:  # to find out which of them it is
                    self._at_once = 1
                    return False
                self._refusal = self._refusal or error
                return True
            if self.trouble is None and self.checked:
                self._say(f"is away, or takes nothing ({reason(error)}): the run continues, what it logs waits.")
            self._since = self._since if self.trouble is not None else time.monotonic()
            self.trouble = error
            return False
        if self.trouble is not None and self.checked:
            self._say("is back.")
        self.trouble = None
        return True

    def _say(self, text: str) -> None:
        with suppress(Exception):  # a terminal that was closed must not end the thread
            self._message(f"The tracking store {shown_uri()} {text}")
