"""The runs that a claim is about: which runs belong to an arm of a protocol, and which of two arms form pairs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

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
FEW = 2  # settings in which a run may differ to be near
Pair = tuple[str, str]  # split seed, seed
Rest = tuple[tuple[str, str], ...]  # all that a protocol leaves open, and what it is in some runs


def complete(runs: Iterable[RunRecord]) -> list[RunRecord]:
    """Return the runs that were finished, not pruned."""
    return [run for run in runs if run.status == "FINISHED" and run.tags.get(OUTCOME, "complete") == "complete"]


def is_like(run: RunRecord, protocol: Protocol, arm: str) -> bool:
    """Say whether a run has the settings of an arm."""
    return next(_unlike(run, protocol, arm), None) is None


def _unlike(run: RunRecord, protocol: Protocol, arm: str) -> Iterator[tuple[str, Value]]:
    """Return the settings of an arm that a run doesn't have."""
    settings = protocol.settings(arm)
    for name, value in settings.items():
        if not _has(run, name, value):
            yield name, value
    for name in sorted((protocol.varied() - settings.keys()) & run.params.keys() & _defaults().keys()):
        if not _has(run, name, _defaults()[name]):
            yield name, _defaults()[name]


def nearest_run(runs: Sequence[RunRecord], protocol: Protocol, arm: str) -> str:
    """Say in which few settings the runs that come nearest to an arm differ from it; empty where none comes near."""
    unlike = [list(_unlike(run, protocol, arm)) for run in runs]
    least = min(unlike, key=len, default=[])
    if not 0 < len(least) <= FEW:
        return ""
    near = [run for run, each in zip(runs, unlike, strict=True) if each == least]
    words = []
    for name, value in least:
        there = dict.fromkeys(run.params[name] or "empty" for run in near if name in run.params) or {"absent": None}
        words.append(f"{name} is {' or '.join(list(there)[:4])}, not {value or 'empty'}")
    return f"no run is like {arm}: in the nearest ones {', '.join(words)}"


@cache
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
    """The runs of some arms that differ in nothing else but seeds, by arm and pair.

    `apart` says what else runs of the arms differ in, where that is why an arm has none.
    """

    arms: Mapping[str, Mapping[Pair, RunRecord]]
    apart: str = ""

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
    found: dict[Rest, dict[str, dict[Pair, RunRecord]]] = {}
    fixed = protocol.runs.keys() | protocol.varied() | FREE
    if "model.variant" in fixed:
        fixed.add("model.table")  # which goes by that name
    for run in runs:
        for arm in arms:
            if is_like(run, protocol, arm):
                rest = () if protocol.over == "images" else tuple(_rest(run, fixed))
                group = found.setdefault(rest, {})
                group.setdefault(arm, {})[pair_of(run)] = run
    groups = [Chosen({arm: group.get(arm, {}) for arm in arms}) for group in found.values()]
    none = Chosen({arm: {} for arm in arms})
    most = max(groups, key=lambda group: (len(group.pairs()), min(map(len, group.arms.values()))), default=none)
    return most if all(most.arms.values()) else replace(none, apart=_apart(found, arms))


def _apart(found: Mapping[Rest, Mapping[str, object]], arms: Sequence[str]) -> str:
    """Say what the runs of two arms differ in, at least, where both have some."""
    sides = [[dict(rest) for rest, group in found.items() if arm in group] for arm in arms]
    if len(sides) < 2:
        return ""
    ways = [
        [name for name in {**one, **other} if one.get(name) != other.get(name)]
        for one, other in product(sides[0], sides[-1])
    ]
    fewest: list[str] = min(ways, key=len, default=[])
    names = " and of ".join(arms)
    return f"runs of {names} differ in more than that: in {', '.join(fewest)}" if fewest else ""


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
