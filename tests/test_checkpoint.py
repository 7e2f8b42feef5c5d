"""Checkpoints: whole or absent, verified, as seldom as they must be."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from effv2.core.errors import InputError
from effv2.training.checkpoint import Checkpoints, Pace

IDENTITY = {"config_hash": "a", "data_digest": "b", "code_version": "c"}


def state(step: int) -> dict[str, Any]:
    return {"step": step, "weights": torch.full((50,), float(step))}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    found = Checkpoints(tmp_path / "run", IDENTITY)
    for step in (9, 10, 100):
        found.write(state(step), step)
    return found


def test_the_last_two_are_kept_and_the_newest_is_read(checkpoints: Checkpoints) -> None:
    assert sorted(path.name.split("-")[1] for path in checkpoints.folder.iterdir()) == ["10", "100"]
    found = checkpoints.read(print)
    assert found is not None and found["step"] == 100 and torch.equal(found["weights"], state(100)["weights"])
    checkpoints.remove()
    assert checkpoints.read(print) is None and not checkpoints.folder.exists()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_what_is_damaged_is_never_read(checkpoints: Checkpoints, data: st.DataObject) -> None:
    newest = max(checkpoints.folder.iterdir(), key=lambda path: int(path.name.split("-")[1]))
    whole = newest.read_bytes()
    content = bytearray(whole)
    if data.draw(st.booleans()):
        content[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[data.draw(st.integers(0, len(whole) - 1)) :]
    newest.write_bytes(content)
    found = checkpoints.read(print)
    newest.write_bytes(whole)
    assert found is not None and found["step"] == 10


def test_a_new_checkpoint_outlives_damaged_ones_of_later_steps(checkpoints: Checkpoints) -> None:
    for path in checkpoints.folder.iterdir():
        path.write_bytes(b"damaged")
    said: list[str] = []
    assert checkpoints.read(said.append) is None and len(said) == 2 and "is damaged" in said[0]
    checkpoints.write(state(5), 5)
    found = checkpoints.read(print)
    assert found is not None and found["step"] == 5 and len(list(checkpoints.folder.iterdir())) == 1


def test_a_disk_that_is_full_costs_no_checkpoint(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a write that fails half-way; on a real full disk torch's writer raises a RuntimeError."""
    save = torch.save

    def fails(content: Any, file: Any) -> None:
        save(content, file)
        raise RuntimeError("unexpected pos 768 vs 662")

    monkeypatch.setattr(torch, "save", fails)
    before = sorted(checkpoints.folder.iterdir())
    with pytest.raises(OSError, match="unexpected pos"):
        checkpoints.write(state(101), 101)
    assert sorted(checkpoints.folder.iterdir()) == before


def test_a_checkpoint_of_another_run_is_refused_with_what_differs(checkpoints: Checkpoints) -> None:
    other = Checkpoints(checkpoints.folder, IDENTITY | {"data_digest": "x"})
    with pytest.raises(InputError, match=r"is of another run \(data_digest was b, is x\); remove it"):
        other.read(print)


@given(st.lists(st.tuples(st.floats(0, 100), st.booleans()), max_size=60), st.floats(0, 2), st.floats(0, 300))
def test_checkpoints_cost_at_most_two_percent_and_lose_at_most_their_minutes(
    steps: list[tuple[float, bool]], cost: float, longest: float
) -> None:
    now = 0.0
    pace = Pace(longest, clock=lambda: now)
    written: list[float] = []

    def write() -> None:
        nonlocal now
        now += cost

    for seconds, epoch_ended in steps:
        now += seconds
        if pace.due(epoch_ended):
            written.append(now)
            pace.measure(write)
        elif not epoch_ended:
            assert now - (written[-1] + cost if written else 0) <= max(longest, 50 * cost) + 1e-6
    assert all(later - earlier - cost >= 50 * cost - 1e-6 for earlier, later in pairwise(written))
