"""Checkpoints on disk: appear whole or not at all, are verified before they are read, two kept.

    <folder>/step-<step>-<head of the SHA-256 of the content>.pt

The content is {"format", "identity", "state"}, loadable with weights_only: tensors and plain values alone.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from effv2.config.options import CheckpointOptions
from effv2.core.errors import InputError, Terminated
from effv2.core.paths import expanded
from effv2.core.provenance import sha256_of_file
from effv2.training.state import TrainState

FORMAT = 1  # raise it when what a state holds changes
KEPT = 2
BUILDING = ".building"  # a run is worked on by one process at a time
NAME = re.compile(r"step-(\d+)-([0-9a-f]{16})\.pt")
# A checkpoint is written no sooner than this many times the seconds that the last one took: at most 2 % of the time.
LEAST_COSTS_BETWEEN = 50


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run; `identity` names what decides the run, and must be that of what is read."""

    folder: Path
    identity: Mapping[str, str]

    @classmethod
    def of(cls, run_id: str, saving: CheckpointOptions, identity: Mapping[str, str]) -> Checkpoints:
        """Return those of a run, in a folder of its own."""
        return cls(expanded(saving.checkpoint_dir) / run_id, identity)

    def write(self, state: Mapping[str, Any], step: int) -> Path:
        """Write a checkpoint, then remove all but the last two; OSError leaves those there were."""
        self.folder.mkdir(parents=True, exist_ok=True)
        building = self.folder / BUILDING
        try:
            with building.open("wb") as file:
                torch.save({"format": FORMAT, "identity": dict(self.identity), "state": dict(state)}, file)
                file.flush()
                os.fsync(file.fileno())
            written = building.rename(self.folder / f"step-{step}-{_digest(building)}.pt")
            _sync(self.folder)
        except RuntimeError as error:  # what torch's writer makes of a disk that is full
            cause = error.__context__
            raise cause if isinstance(cause, OSError) else OSError(str(error)) from error
        finally:
            building.unlink(missing_ok=True)
        # Those of later steps were damaged, or this training wouldn't have come by here.
        found = self._found()
        before = found[: found.index(written)]
        for old in set(found) - {written, *before[len(before) - KEPT + 1 :]}:
            old.unlink(missing_ok=True)
        return written

    def newest(self) -> int:
        """Return the step of the newest one, -1 without any."""
        return newest_step(path.name for path in self._found())

    def read(self, message: Callable[[str], None]) -> dict[str, Any] | None:
        """Return the newest state that is whole, None without one; InputError for one of another identity."""
        for path in reversed(self._found()):
            content = _read(path)
            if content is None:
                message(f"{path} is damaged, or of another version, and is left out.")
                continue
            differing = [
                f"{name} was {content['identity'].get(name)}, is {value}"
                for name, value in self.identity.items()
                if content["identity"].get(name) != value
            ]
            if differing:
                raise InputError(
                    f"--checkpoint-dir: {path} is of another run ({'; '.join(differing)}); remove it, or give another "
                    "folder."
                )
            state: dict[str, Any] = content["state"]
            return state
        return None

    def remove(self) -> None:
        """Remove all, once the run has ended well."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _found(self) -> list[Path]:
        """Return the checkpoints there are, by step."""
        with suppress(OSError):
            named = [(path, NAME.fullmatch(path.name)) for path in self.folder.iterdir()]
            return [path for _, path in sorted((int(match[1]), path) for path, match in named if match)]
        return []


def newest_step(names: Iterable[str]) -> int:
    """Return the highest step of checkpoints with these names, -1 without any."""
    return max((int(match[1]) for name in names if (match := NAME.fullmatch(name))), default=-1)


@dataclass
class Pace:
    """Decides when a checkpoint is due: seldom enough to cost little, often enough to lose little."""

    longest_seconds: float
    clock: Callable[[], float] = time.monotonic
    cost: float = 0.0

    def __post_init__(self) -> None:
        self._last = self.clock()

    def due(self, epoch_ended: bool) -> bool:
        """Say whether to write one now: at the end of an epoch as soon as its cost allows, else after so long."""
        waited = self.clock() - self._last
        least = LEAST_COSTS_BETWEEN * self.cost
        return waited >= (least if epoch_ended else max(least, self.longest_seconds))

    def measure(self, write: Callable[[], None]) -> None:
        """Write, and note what it cost."""
        started = self.clock()
        try:
            write()
        finally:
            self._last = self.clock()
            self.cost = self._last - started


@dataclass
class Keeper:
    """Writes the checkpoints of a training when they are due; a disk that refuses doesn't end the training.

    `upload`, where there is one, is given a checkpoint every `upload_seconds`, and the last one on the way out.
    """

    checkpoints: Checkpoints
    pace: Pace
    state: TrainState
    message: Callable[[str], None]
    upload: Callable[[Path], None] | None
    upload_seconds: float
    _told: bool = False

    def __post_init__(self) -> None:
        self._uploaded = self.pace.clock()

    def keep(self, epoch_ended: bool) -> None:
        """Write a checkpoint if one is due."""
        if self.pace.due(epoch_ended):
            self.write()

    @contextmanager
    def last_one_on_the_way_out(self) -> Iterator[None]:
        """Write a checkpoint when the training is told to end."""
        try:
            yield
        except (KeyboardInterrupt, Terminated):
            self.write(last=True)
            raise

    def write(self, last: bool = False) -> None:
        """Write a checkpoint; say once if the disk refuses."""
        try:
            self.pace.measure(lambda: self._write(last))
        except OSError as error:
            if not self._told:
                self.message(
                    f"No checkpoint can be written to {self.checkpoints.folder} ({error.strerror or error}): training "
                    "goes on, the last one that was stays. Free space there."
                )
            self._told = True

    def _write(self, last: bool) -> None:
        written = self.checkpoints.write(self.state.state_dict(), self.state.progress.step)
        if self.upload and (last or self.pace.clock() - self._uploaded >= self.upload_seconds):
            self.upload(written)
            self._uploaded = self.pace.clock()


def _read(path: Path) -> dict[str, Any] | None:
    """Return the content of a checkpoint; None where it is damaged, or of another format."""
    match = NAME.fullmatch(path.name)
    try:
        if match is None or _digest(path) != match[2]:
            return None
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, ValueError, KeyError, EOFError):
        return None
    return content if isinstance(content, dict) and content.get("format") == FORMAT else None


def _digest(path: Path) -> str:
    return sha256_of_file(path)[:16]


def _sync(folder: Path) -> None:
    """Make sure that a rename is on the disk, where the system can open folders."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
