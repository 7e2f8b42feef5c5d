"""Checkpoints: complete or absent, verified, and written as seldom as possible."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from effv2.config.options import CheckpointOptions
from effv2.core.errors import InputError
from effv2.run.records import whole_weights
from effv2.training import checkpoint
from effv2.training.checkpoint import Checkpointer
from effv2.training.progress import Progress

IDENTITY = {"config_hash": "a", "data_digest": "b", "code_version": "c"}


class State:
    """The part of a training's state that a checkpoint needs."""

    def __init__(self, step: int) -> None:
        self.progress = Progress(step=step)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.progress.step, "weights": torch.full((50,), float(self.progress.step))}


def make(folder: Path, message: Callable[[str], None] = print, **changes: Any) -> Checkpointer:
    return Checkpointer("run", CheckpointOptions(checkpoint_dir=str(folder)), IDENTITY | changes, message)


def save(checkpoints: Checkpointer, step: int) -> None:
    checkpoints.save(State(step))  # type: ignore[arg-type]


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpointer:
    found = make(tmp_path)
    for step in (9, 10, 100):
        save(found, step)
    return found


def test_the_last_two_are_kept_and_the_newest_is_read(checkpoints: Checkpointer) -> None:
    assert sorted(path.name.split("-")[1] for path in checkpoints.folder.iterdir()) == ["10", "100"]
    found = checkpoints.read()
    assert found is not None and found["step"] == 100 and torch.equal(found["weights"], torch.full((50,), 100.0))
    checkpoints.remove()
    assert checkpoints.read() is None and not checkpoints.folder.exists()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_damaged_checkpoints_are_never_read(checkpoints: Checkpointer, data: st.DataObject) -> None:
    newest = max(checkpoints.folder.iterdir(), key=lambda path: int(path.name.split("-")[1]))
    whole = newest.read_bytes()
    content = bytearray(whole)
    if data.draw(st.booleans()):
        content[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[data.draw(st.integers(0, len(whole) - 1)) :]
    newest.write_bytes(content)
    found = checkpoints.read()
    newest.write_bytes(whole)
    assert found is not None and found["step"] == 10


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@example(place=0.93196, bit=4)  # marks an entry as a folder
def test_damaged_weights_are_never_read(tmp_path: Path, place: float, bit: int) -> None:
    path, weights = tmp_path / "selected.pt", {"a": torch.arange(500.0), "b": torch.arange(7)}
    torch.save(weights, path)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    path.write_bytes(content)
    found = whole_weights(path)
    assert found is None or (found.keys() == weights.keys() and all(torch.equal(found[k], weights[k]) for k in found))


def test_a_new_checkpoint_outlives_damaged_ones_of_later_steps(checkpoints: Checkpointer) -> None:
    for path in checkpoints.folder.iterdir():
        path.write_bytes(b"damaged")
    said: list[str] = []
    assert make(checkpoints.folder.parent, said.append).read() is None
    assert len(said) == 2 and "is damaged" in said[0]
    save(checkpoints, 5)
    found = checkpoints.read()
    assert found is not None and found["step"] == 5 and len(list(checkpoints.folder.iterdir())) == 1


def test_a_full_disk_costs_no_checkpoint_and_is_reported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write fails half-way. On a full disk, torch's writer raises a RuntimeError."""
    whole = torch.save

    def fails(content: Any, file: Any) -> None:
        whole(content, file)
        raise RuntimeError("unexpected pos 768 vs 662")

    said: list[str] = []
    checkpoints = make(tmp_path, said.append)
    save(checkpoints, 100)
    before = sorted(checkpoints.folder.iterdir())
    monkeypatch.setattr(torch, "save", fails)
    for step in (101, 102):
        save(checkpoints, step)
    assert sorted(checkpoints.folder.iterdir()) == before
    assert len(said) == 1 and "unexpected pos" in said[0]


def test_a_checkpoint_of_another_run_is_refused_with_what_differs(checkpoints: Checkpointer) -> None:
    other = make(checkpoints.folder.parent, data_digest="x")
    with pytest.raises(InputError, match=r"belongs to another run \(data_digest was b, is x\); remove it"):
        other.read()


@given(st.lists(st.tuples(st.floats(0, 100), st.booleans()), max_size=60), st.floats(0, 2), st.floats(0, 5))
def test_checkpoints_cost_at_most_two_percent_and_lose_at_most_their_minutes(
    steps: list[tuple[float, bool]], cost: float, minutes: float
) -> None:
    now = 0.0
    written: list[float] = []

    class Timed(Checkpointer):
        def _write(self, state: Any, step: int) -> Path:
            nonlocal now
            written.append(now)
            now += cost
            return Path()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "monotonic", lambda: now)
        timed = Timed("run", CheckpointOptions(checkpoint_dir="", checkpoint_minutes=minutes), {}, print)
        for step, (seconds, epoch_ended) in enumerate(steps):
            now += seconds
            before = len(written)
            timed.save_if_due(State(step), epoch_ended)  # type: ignore[arg-type]
            if len(written) == before and not epoch_ended:
                assert now - (written[-1] + cost if written else 0) <= max(60 * minutes, 50 * cost) + 1e-6
    assert all(later - earlier - cost >= 50 * cost - 1e-6 for earlier, later in pairwise(written))
