"""Checkpoints on disk: written atomically, verified before they are read. The last two are kept.

    <folder>/<run id>/step-<step>-<head of the SHA-256 of the content>.pt

The content is {"format", "identity", "state"}, only tensors and plain values, loadable with weights_only. The state
holds the metrics of every epoch so far, so a checkpoint is also the journal of what its run logs.
"""

import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from filelock import FileLock, Timeout

from effv2.config.options import CheckpointOptions
from effv2.core.errors import InputError, RunError, Terminated
from effv2.core.provenance import sha256_of_file
from effv2.core.reporter import Message
from effv2.core.words import differences
from effv2.training.loop import TrainState

FORMAT = 1  # raise it when the content of a state changes
KEPT = 2
BUILDING, LOCK = ".building", ".lock"
NAME = re.compile(r"step-(\d+)-([0-9a-f]{16})\.pt")
# Seconds between checkpoints, as a multiple of the seconds that the last one took: at most 2 % of the time.
LEAST_COSTS_BETWEEN = 50


class Checkpointer:
    """The checkpoints of one run. `identity` holds what decides the run. A checkpoint of another identity is refused.

    If `upload` is set, it gets a checkpoint every `checkpoint_upload_minutes`, and the last one at the end.
    """

    upload: Callable[[Path], None] | None = None

    def __init__(self, run_id: str, options: CheckpointOptions, identity: Mapping[str, str], message: Message) -> None:
        self.folder = Path(os.path.expanduser(options.checkpoint_dir)) / run_id
        self._longest, self._between_uploads = 60 * options.checkpoint_minutes, 60 * options.checkpoint_upload_minutes
        self._identity, self._message = dict(identity), message
        self._cost, self._disk_refused = 0.0, False
        self._last = (-1, -1)  # step and epoch of the last checkpoint
        self._written = self._uploaded = monotonic()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the run; RunError if another process works on it. Without a lock if the disk refuses it."""
        lock = FileLock(self.folder / LOCK)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=False)
            for left in (path for path in self.folder.glob(".*") if path.is_dir()):  # to be uploaded once
                shutil.rmtree(left, ignore_errors=True)
        except Timeout:
            raise RunError(f"The run {self.folder.name} is locked: another process works on it.") from None
        except OSError as error:
            self._say_disk_refused(error)
        try:
            yield
        finally:
            lock.release()

    def is_locked(self) -> bool:
        """Say whether another process works on the run."""
        if not (self.folder / LOCK).exists():
            return False
        try:
            with FileLock(self.folder / LOCK, blocking=False):
                return False
        except OSError as error:
            return isinstance(error, Timeout)

    def save_if_due(self, state: TrainState, epoch_ended: bool) -> None:
        """Write a checkpoint: after an epoch as soon as its cost allows, within an epoch after the longest time."""
        waited, least = monotonic() - self._written, LEAST_COSTS_BETWEEN * self._cost
        if waited >= (least if epoch_ended else max(least, self._longest)):
            self.save(state)

    def save(self, state: TrainState, leaving: bool = False) -> None:
        """Write a checkpoint, unless this step has one. A disk that refuses doesn't end the training."""
        started, now = monotonic(), (state.progress.step, state.progress.epoch)
        try:
            if now == self._last and not (leaving and self.upload):
                return
            path = self._write(state.state_dict(), state.progress.step)
            self._last = now
            if self.upload and (leaving or monotonic() - self._uploaded >= self._between_uploads):
                self.upload(path)
                self._uploaded = monotonic()
        except OSError as error:
            self._say_disk_refused(error)
        self._written = monotonic()
        self._cost = self._written - started

    def _say_disk_refused(self, error: OSError) -> None:
        if not self._disk_refused:
            problem = f"No checkpoint can be written to {self.folder} ({error.strerror or error})"
            self._message(f"{problem}: training continues, and the last checkpoint remains. Free space there.")
        self._disk_refused = True

    def _write(self, state: Mapping[str, Any], step: int) -> Path:
        """Write a checkpoint, then remove all but the last two. After an OSError, the earlier ones remain."""
        self.folder.mkdir(parents=True, exist_ok=True)
        building = self.folder / BUILDING
        try:
            with building.open("wb") as file:
                torch.save({"format": FORMAT, "identity": self._identity, "state": dict(state)}, file)
                file.flush()
                os.fsync(file.fileno())
            written = building.rename(self.folder / f"step-{step}-{sha256_of_file(building)[:16]}.pt")
            _sync(self.folder)
        except RuntimeError as error:  # torch's writer raises this if the disk is full, or after an ending signal
            cause = error.__context__
            known = isinstance(cause, (OSError, KeyboardInterrupt, Terminated))
            raise cause if known else OSError(str(error)) from error  # type: ignore[misc]
        finally:
            building.unlink(missing_ok=True)
        # Checkpoints of later steps must have been damaged, or this training would have begun there.
        found = self._found()
        at = found.index(written) if written in found else len(found)
        for old in found[: max(0, at + 1 - KEPT)] + found[at + 1 :]:
            old.unlink(missing_ok=True)
        return written

    def read(
        self, uploaded: Iterable[str] = (), fetch: Callable[[str], object] = lambda name: None
    ) -> dict[str, Any] | None:
        """Return the newest whole state; None without one; InputError for one of another identity.

        Checkpoints in `uploaded` are downloaded into the folder when they are needed.
        """
        places = [(path.name, False) for path in reversed(self._found())] + [(name, True) for name in uploaded]
        named = [(name, elsewhere) for name, elsewhere in places if NAME.fullmatch(name)]
        for name, elsewhere in sorted(named, key=lambda place: _step(place[0]), reverse=True):
            if elsewhere:
                fetch(name)
            path = self.folder / name
            content = _read(path)
            if content is None:
                self._message(f"{path} is damaged or of another version, and is not used.")
                continue
            if words := "; ".join(differences(content["identity"], self._identity)):
                remedy = "remove it, or give another folder"
                raise InputError("checkpoint_dir", path, f"it belongs to another run ({words})", remedy)
            state: dict[str, Any] = content["state"]
            return state
        return None

    def remove(self) -> None:
        """Remove all checkpoints after the run has ended well."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _found(self) -> list[Path]:
        """Return the existing checkpoints, by step."""
        with suppress(OSError):
            found = [path for path in self.folder.glob("step-*") if NAME.fullmatch(path.name)]
            return sorted(found, key=lambda path: (_step(path.name), path.stat().st_mtime_ns))
        return []


def _step(name: str) -> int:
    """Return the step in the name of a checkpoint."""
    return int(name.split("-")[1])


def _read(path: Path) -> dict[str, Any] | None:
    """Return the content of a checkpoint; None if it is damaged or of another format."""
    try:
        if sha256_of_file(path)[:16] != path.stem.rpartition("-")[2]:
            return None
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, ValueError, KeyError, EOFError):
        return None
    return content if isinstance(content, dict) and content.get("format") == FORMAT else None


def _sync(folder: Path) -> None:
    """Make sure that a rename is on the disk, if the system can open folders."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
