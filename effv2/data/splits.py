"""Which samples train, validate and test: pure functions over labels and file order."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from effv2.core.errors import InputError
from effv2.core.randomness import stream_seed
from effv2.data.images import Labels

Positions = NDArray[np.int64]


def first_per_class(labels: Labels, per_class: int, classes: tuple[str, ...]) -> Positions:
    """Return the positions of the first `per_class` samples of each class (0 = all), in the given order."""
    return _per_class(labels, per_class, classes, lambda members: members[:per_class])


def sample_per_class(labels: Labels, per_class: int, classes: tuple[str, ...], split_seed: int) -> Positions:
    """Return `per_class` positions of each class at random (0 = all), in the given order."""
    generator = np.random.default_rng(stream_seed(split_seed, "sample"))
    return _per_class(labels, per_class, classes, lambda members: generator.choice(members, per_class, replace=False))


def _per_class(
    labels: Labels, per_class: int, classes: tuple[str, ...], choose: Callable[[Positions], Positions]
) -> Positions:
    if not per_class:
        return np.arange(len(labels))
    counts = np.bincount(labels, minlength=len(classes))
    if counts.min() < per_class:
        problem = f"the class {classes[counts.argmin()]!r} has only {counts.min()} images to take from"
        raise InputError("data.per_class", per_class, problem, "lower data.per_class or add images")
    return np.sort(np.concatenate([choose(np.flatnonzero(labels == label)) for label in range(len(classes))]))


def published_split(count: int, fraction: float, split_seed: int) -> tuple[Positions, Positions]:
    """Split as the published notebooks did: scikit-learn's train_test_split, shuffled, not stratified."""
    from sklearn.model_selection import train_test_split

    if count < 2:
        problem = f"{count} RGB images are left to split, 2 are needed, and published sampling drops all others"
        raise InputError("data.sampling", "published", problem, "choose another set or sampling")
    first, second = train_test_split(np.arange(count), test_size=fraction, random_state=split_seed)
    return first, second


def stratified_split(
    labels: Labels, fraction: float, classes: tuple[str, ...], split_seed: int, stream: str
) -> tuple[Positions, Positions]:
    """Split `fraction` of each class off (at least one sample); both parts keep the given order."""
    generator = np.random.default_rng(stream_seed(split_seed, stream))
    held = []
    for label, name in enumerate(classes):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            problem = f"the class {name!r} has only {len(members)} images to split for {stream}, 2 are needed"
            raise InputError("data.dir", "", problem, "add images or remove the class")
        count = min(len(members) - 1, max(1, round(fraction * len(members))))
        held.append(generator.choice(members, count, replace=False))
    second = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), second), second
