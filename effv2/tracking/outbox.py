"""Everything a run writes goes to a local journal first, and from a thread of its own to the tracking store.

Training never waits for the store. What it couldn't deliver is delivered by the next command (`tracking.recovery`).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice

from effv2.core.errors import RunError
from effv2.core.paths import outbox_folder
from effv2.core.processes import this_process
from effv2.core.reporter import Message
from effv2.tracking.entries import Entry, deliver, is_refusal
from effv2.tracking.journal import Busy, Journal
from effv2.tracking.store import WAIT_SECONDS, answers, reason, shown_uri, store_name

PATIENCE = 120.0  # seconds that the end of a run waits for a store that is away
MOST_AT_ONCE = 200  # entries
LAST_CALL = 1.0  # seconds that the call in progress has to come to an end
LONGEST_WAIT = 15.0  # seconds between two attempts
REFUSED = ".refused"  # suffix of a journal of which the store refused something


class TrackingAway(RunError):
    """The tracking store was away for longer than a run waits at its end; what it lacks is in the outbox."""


class Outbox:
    """Delivers the entries of one run, in order, each once.

    `patience` is how many seconds the end of a run waits for a store that is away; `continues` says that another
    process began the run. `put` raises RunError where the store has refused an entry for good.
    """

    def __init__(self, run_id: str, message: Message, patience: float, continues: bool = False) -> None:
        self.run_id, self.patience, self._remark = run_id, patience, message
        self.folder = outbox_folder() / run_id
        self._waiting: deque[Entry] = deque()
        self._only_in_memory = 0  # how many of those, the last ones, the disk had no room for
        self._changed = threading.Condition()
        self._trouble: Exception | None = None  # why the last attempt failed
        self._refusal: Exception | None = None  # the first that was for good
        self._at_once = MOST_AT_ONCE
        self._continues = continues
        self._checked = False
        self._closing = False
        self._told_of_disk = False
        self._journal = self._open_journal()
        self._thread = threading.Thread(target=self._deliver_all, name=f"outbox {run_id}", daemon=True)
        self._thread.start()

    def put(self, entry: Entry) -> None:
        """Write an entry to the journal; it is delivered soon."""
        self._raise_refusal()
        with self._changed:
            if self._take(entry):
                return
        # The disk is full: what has files can't wait for the thread, since they are gone when this returns.
        if not self.wait(self.patience):
            raise self._away()
        deliver(self.run_id, [entry])

    def holds(self, place: str) -> bool:
        """Say whether artifacts for a folder of theirs wait."""
        with self._changed:
            return any(entry.content.get("place") == place for entry in self._waiting)

    def check(self) -> None:
        """Wait until everything is delivered; RunError at the first failure: before a training begins."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting or self._trouble)
            trouble = self._refusal or self._trouble
        if trouble is not None:
            raise RunError(
                f"The tracking store {shown_uri()} doesn't take what the run logs ({reason(trouble)}); mend it and "
                "give the same command again."
            ) from trouble
        self._checked = True

    def wait(self, seconds: float) -> bool:
        """Wait for so long at most until everything is delivered; say whether it is. RunError after a refusal."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting, seconds)
            delivered = not self._waiting
        self._raise_refusal()
        return delivered

    def close(self, last: Sequence[Entry], patience: float) -> None:
        """Deliver the last entries and let go of the journal; TrackingAway if that takes more than so many seconds."""
        with self._changed:
            for entry in last:
                self._take(entry)
            try:
                delivered = self._changed.wait_for(lambda: not self._waiting, patience)
            finally:
                self._closing = True
                self._changed.notify_all()
        self._thread.join(None if delivered else LAST_CALL)
        if self._waiting:
            raise self._away()

    def _raise_refusal(self) -> None:
        if self._refusal is not None:
            raise RunError(f"The tracking store refused what the run logged ({reason(self._refusal)}).")

    def _away(self) -> TrackingAway:
        why = reason(self._trouble) if self._trouble else "no answer yet"
        what = f"The tracking store {shown_uri()} is away, or takes nothing ({why}): {len(self._waiting)} entries"
        if self._only_in_memory:
            return TrackingAway(
                f"{what} of the run {self.run_id} wait, but the disk had no room for all; free space and give the "
                "same command again, which goes on from the last checkpoint."
            )
        return TrackingAway(f"{what} of the run {self.run_id} wait in {self.folder}; `effv2 sync` sends them.")

    def _open_journal(self) -> Journal | None:
        try:
            return Journal.create(self.folder, {"store": store_name(), "process": this_process()})
        except Busy as error:
            raise RunError(f"The run {self.run_id} can't be worked on: {error}.") from error
        except OSError as error:
            self._tell_of_disk(error)
            return None

    def _take(self, entry: Entry) -> bool:
        """Let an entry wait, in the journal where the disk has room; False where it has none for its files.

        After one that waits in memory alone no other is written, so that the journal never has a gap.
        """
        if self._journal is not None and not self._only_in_memory:
            try:
                self._waiting.append(self._journal.append(entry))
            except OSError as error:
                self._tell_of_disk(error)
            else:
                self._changed.notify_all()
                return True
        if entry.folder is not None:
            return False
        self._only_in_memory += 1
        self._waiting.append(entry)
        self._changed.notify_all()
        return True

    def _tell_of_disk(self, error: OSError) -> None:
        if not self._told_of_disk:
            self._remark(
                f"The outbox {self.folder} can't be written ({error.strerror or error}): what is logged would not "
                "survive a kill while the tracking store is away. Free space there."
            )
        self._told_of_disk = True

    def _deliver_all(self) -> None:
        """Deliver what comes until the outbox is closed, then let go of the journal. Runs in the thread."""
        pause = WAIT_SECONDS
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if self._closing:  # all is delivered, or nobody waits any longer
                    break
                batch = list(islice(self._waiting, self._at_once))
            done = self._try(batch)
            if done and self._journal is not None and self._refusal is None:
                self._journal.delivered(batch)
            with self._changed:
                for _ in batch if done else []:
                    self._waiting.popleft()
                self._only_in_memory = min(self._only_in_memory, len(self._waiting))
                self._changed.notify_all()
                if not done and self._trouble is not None:
                    self._changed.wait_for(lambda: self._closing, pause)
            pause = WAIT_SECONDS if done else min(2 * pause, LONGEST_WAIT)
        self._let_go()

    def _let_go(self) -> None:
        """Leave the journal to the next command, or remove it, or put it aside, as what came of it asks."""
        if self._journal is None:
            return
        with suppress(OSError):
            if self._waiting:
                self._journal.close()
            elif self._refusal is None:
                self._journal.remove()
            else:
                self._journal.put_aside(REFUSED)

    def _try(self, batch: list[Entry]) -> bool:
        """Deliver a batch, say whether it is done with; tell of an outage at its begin and its end."""
        try:
            if self._trouble is not None and not answers():
                return False
            deliver(self.run_id, batch, again=self._may_be_there(batch))
        except Exception as error:
            if is_refusal(error):
                if len(batch) > 1:  # to find out which of them it is
                    self._at_once = 1
                    return False
                self._refusal = self._refusal or error
                return True
            if self._trouble is None and self._checked:
                self._say(
                    f"The tracking store {shown_uri()} is away, or takes nothing ({reason(error)}): the run goes on, "
                    f"what it logs waits in {self.folder}."
                )
            self._trouble = error
            return False
        if self._trouble is not None and self._checked:
            self._say(f"The tracking store {shown_uri()} is back.")
        self._trouble = None
        return True

    def _may_be_there(self, batch: list[Entry]) -> bool:
        """Say whether an earlier attempt, of this process or of one that it goes on for, may have delivered some."""
        if self._trouble is not None or self._at_once == 1:
            return True
        return self._continues and any(entry.kind == "model" or entry.content.get("step") == 0 for entry in batch)

    def _say(self, text: str) -> None:
        with suppress(Exception):  # a terminal that was closed must not end the thread
            self._remark(text)
