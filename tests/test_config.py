"""The hash identifies a configuration and nothing else."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from effv2.config.schema import TrainConfig
from tests.conftest import tiny_config

CHANGES: dict[str, st.SearchStrategy[Any]] = {
    "optimiser.lr": st.floats(1e-6, 10),
    "optimiser.batch_size": st.integers(2, 512),
    "model.dropout": st.floats(0, 0.9),
    "schedule.epochs": st.integers(1, 500),
    "augment.flip": st.booleans(),
    "random.seed": st.integers(0, 2**32 - 1),
}


def changed(dotted: str, value: Any) -> TrainConfig:
    group, name = dotted.split(".")
    return TrainConfig.model_validate({group: {name: value}})


@given(st.sampled_from(sorted(CHANGES)).flatmap(lambda name: st.tuples(st.just(name), CHANGES[name], CHANGES[name])))
def test_hashes_are_equal_exactly_when_the_values_are(case: tuple[str, Any, Any]) -> None:
    name, first, second = case
    assert (changed(name, first).hash() == changed(name, second).hash()) == (first == second)


def test_hash_ignores_how_a_number_is_written() -> None:
    assert changed("optimiser.lr", "1e-4").hash() == changed("optimiser.lr", 0.0001).hash()
    table = "F 1 3 1 8 8 1  /  M 2 3 2 8 16 1"
    hashes = {tiny_config(model={"table": text}).hash() for text in (table, " ".join(table.split()))}
    assert len(hashes) == 1


def test_hash_ignores_the_folder_of_the_data() -> None:
    assert tiny_config(data={"dir": "/a"}).hash() == tiny_config(data={"dir": "/b", "download": True}).hash()


def test_flat_holds_every_field_once() -> None:
    flat = TrainConfig().flat()
    assert flat["optimiser.lr"] == 1e-3 and flat["random.seed"] == 0
    assert not any(isinstance(value, float) and not math.isfinite(value) for value in flat.values())
    assert all("." in name for name in flat)  # so that no name collides with one that `mlflow run` logs
