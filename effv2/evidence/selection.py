"""The runs that a claim is about: which runs belong to an arm of a protocol, and which of two arms form pairs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from effv2.config import TrainConfig
from effv2.evidence.claims import Protocol, Value
from effv2.tracking.read import RunRecord
from effv2.tracking.run import OUTCOME

CLASSES = "data.classes"  # no parameter, but may stand in a protocol like one: the number of classes in the data
# What may differ between runs that are compared: what pairs them, where the images lie, how they are computed.
SEED, SPLIT_SEED = "random.seed", "data.split_seed"
FREE = {SEED, SPLIT_SEED, "data.dir", "data.download", "execution.device", "execution.compile"}
FREE |= {"execution.channels_last"}
PUBLISHED_OVERLAP = 0.25  # test over training images of the published split
Pair = tuple[str, str]  # split seed, seed


def complete(runs: Iterable[RunRecord]) -> list[RunRecord]:
    """Return the runs that were finished, not pruned."""
    return [run for run in runs if run.status == "FINISHED" and run.tags.get(OUTCOME, "complete") == "complete"]


def is_like(run: RunRecord, protocol: Protocol, arm: str) -> bool:
    """Say whether a run has the settings of an arm."""
    settings = protocol.settings(arm)
    defaults = {name: value for name, value in _defaults().items() if name in protocol.varied() - settings.keys()}
    return all(_has(run, name, value) for name, value in settings.items()) and all(
        name not in run.params or _has(run, name, value) for name, value in defaults.items()
    )


def _defaults() -> dict[str, Value]:
    return TrainConfig().flat()


def _has(run: RunRecord, name: str, value: Value) -> bool:
    if name == CLASSES:
        return any(len(images.classes) == value for images in run.images.values())
    logged = run.params.get(name)
    if logged is None:
        return False
    if isinstance(value, (bool, str)):
        return logged.lower() == str(value).lower()
    try:
        return float(logged) == value
    except ValueError:
        return False


def pair_of(run: RunRecord) -> Pair:
    """Return what makes two runs of different arms a pair: seeds of the split and of the training."""
    return run.params.get(SPLIT_SEED, ""), run.params.get(SEED) or run.tags.get("effv2.seed") or run.run_id


@dataclass(frozen=True)
class Chosen:
    """The runs of some arms that differ in nothing else but seeds, by arm and pair; how many were left aside."""

    arms: Mapping[str, Mapping[Pair, RunRecord]]
    aside: int

    def pairs(self) -> list[Pair]:
        """Return the pairs that all arms have."""
        first, *others = self.arms.values()
        return [pair for pair in first if all(pair in other for other in others)]


def choose(runs: Sequence[RunRecord], protocol: Protocol, arms: Sequence[str]) -> Chosen:
    """Choose the runs of some arms of a protocol.

    Where the protocol leaves something open in which runs differ, those are taken of which there are most pairs
    (fixed networks differ in more than the protocol's settings: in weights and transforms).
    Of a run that was repeated the last one counts. `runs` are the oldest first.
    """
    found: dict[tuple[tuple[str, str], ...], dict[str, dict[Pair, RunRecord]]] = {}
    fixed = protocol.runs.keys() | protocol.varied() | FREE
    for run in runs:
        for arm in arms:
            if is_like(run, protocol, arm):
                rest = () if protocol.over == "images" else tuple(_rest(run, fixed))
                group = found.setdefault(rest, {})
                group.setdefault(arm, {})[pair_of(run)] = run
    groups = [Chosen({arm: group.get(arm, {}) for arm in arms}, 0) for group in found.values()]
    if not groups:
        return Chosen({arm: {} for arm in arms}, 0)
    most = max(groups, key=lambda group: (len(group.pairs()), sum(map(len, group.arms.values()))))
    count = sum(len(each) for group in groups for each in group.arms.values())
    return Chosen(most.arms, count - sum(map(len, most.arms.values())))


def _rest(run: RunRecord, fixed: set[str]) -> Iterator[tuple[str, str]]:
    """Return what the protocol leaves open: our other parameters, and which images they are."""
    for name, value in sorted(run.params.items()):
        if "." in name and name not in fixed and not name.startswith("study."):
            yield name, value
    for context, images in sorted(run.images.items()):
        yield context, f"{images.name} {len(images.classes)}"


def overlap(chosen: Chosen) -> float:
    """Return the ratio of test to training images where the runs have several splits, 0 where they have one."""
    runs = [run for of_arm in chosen.arms.values() for run in of_arm.values()]
    if len({pair_of(run)[0] for run in runs}) < 2:
        return 0.0
    counts = {name: run.images[name].images for run in runs for name in ("train", "test") if name in run.images}
    return counts["test"] / counts["train"] if counts.get("train") and counts.get("test") else PUBLISHED_OVERLAP


def over_splits(values: Mapping[Pair, float]) -> list[float]:
    """Return the values, or where there are several splits the mean of each: runs of one split share its luck."""
    splits: dict[str, list[float]] = {}
    for (split, _), value in values.items():
        splits.setdefault(split, []).append(value)
    if len(splits) < 2:
        return list(values.values())
    return [sum(each) / len(each) for each in splits.values()]
