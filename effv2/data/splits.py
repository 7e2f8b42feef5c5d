"""Which samples train, validate and test: pure functions over labels and file order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from effv2.core.errors import InputError
from effv2.core.randomness import stream_seed

Positions = NDArray[np.int64]


def first_per_class(labels: NDArray[np.int64], per_class: int, classes: tuple[str, ...]) -> Positions:
    """Return the positions of the first `per_class` samples of each class (0 = all), in the given order."""
    if not per_class:
        return np.arange(len(labels))
    _require(labels, per_class, classes, f"--per-class {per_class}", "lower --per-class or add images")
    chosen = [np.flatnonzero(labels == label)[:per_class] for label in range(len(classes))]
    return np.sort(np.concatenate(chosen))


def sample_per_class(labels: NDArray[np.int64], per_class: int, classes: tuple[str, ...], split_seed: int) -> Positions:
    """Return `per_class` positions of each class at random (0 = all), in the given order."""
    if not per_class:
        return np.arange(len(labels))
    _require(labels, per_class, classes, f"--per-class {per_class}", "lower --per-class or add images")
    generator = np.random.default_rng(stream_seed(split_seed, "sample"))
    chosen = [
        generator.choice(np.flatnonzero(labels == label), per_class, replace=False) for label in range(len(classes))
    ]
    return np.sort(np.concatenate(chosen))


def published_split(count: int, fraction: float, split_seed: int) -> tuple[Positions, Positions]:
    """Split as the published notebooks did: scikit-learn's train_test_split, shuffled, not stratified."""
    from sklearn.model_selection import train_test_split

    if count < 2:
        raise InputError(
            f"data.sampling published: {count} RGB images are left to split, 2 are needed; published sampling drops "
            "all others, so choose another set or sampling."
        )
    first, second = train_test_split(np.arange(count), test_size=fraction, random_state=split_seed)
    return first, second


def stratified_split(
    labels: NDArray[np.int64], fraction: float, classes: tuple[str, ...], split_seed: int, stream: str
) -> tuple[Positions, Positions]:
    """Split `fraction` of each class off (at least one sample); both parts keep the given order."""
    _require(labels, 2, classes, f"--data-dir, split for {stream}", "add images or remove the class")
    generator = np.random.default_rng(stream_seed(split_seed, stream))
    held = []
    for label in range(len(classes)):
        members = np.flatnonzero(labels == label)
        count = min(len(members) - 1, max(1, round(fraction * len(members))))
        held.append(generator.choice(members, count, replace=False))
    second = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), second), second


def _require(labels: NDArray[np.int64], least: int, classes: tuple[str, ...], option: str, remedy: str) -> None:
    counts = np.bincount(labels, minlength=len(classes))
    label = int(counts.argmin())
    if counts[label] < least:
        raise InputError(
            f"{option}: the class {classes[label]!r} has only {counts[label]} images to take from, {least} are "
            f"needed; {remedy}."
        )
