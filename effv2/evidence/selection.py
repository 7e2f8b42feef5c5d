"""The runs that a claim is about: which runs belong to an arm of a protocol, and which of two arms form pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

from effv2.config.schema import TrainConfig
from effv2.config.studies import Value
from effv2.evidence.protocols import COMPUTED, FREE, SEED_SETTING, SPLIT_SEED, Protocol
from effv2.evidence.quantities import Quantity, number
from effv2.evidence.statistics import FEWEST
from effv2.tracking.read import RunRecord
from effv2.tracking.tags import CONFIG_HASH, DATA_DIGEST, MACHINE, OUTCOME, SEED

CLASSES = "data.classes"  # no parameter, but may stand in a protocol like one: the number of classes in the data
OF_TIMES = tuple(f"{MACHINE}{name}" for name in ("processor", "accelerator", "threads"))  # tags
PUBLISHED_OVERLAP = 0.25  # test over training images of the published split
FEW = 2  # settings in which a run may differ to be near
SplitAndSeed = tuple[str, str]  # what runs of several arms have in common that form a pair
Settings = frozenset[tuple[str, str]]  # names and values of what runs that repeat each other have in common
RightAnswers = Callable[[RunRecord], Mapping[str, bool]]  # by image, of a run's predictions of its test images


def complete(runs: Iterable[RunRecord]) -> list[RunRecord]:
    """Return the runs that were finished, not pruned."""
    return [run for run in runs if run.status == "FINISHED" and run.tags.get(OUTCOME, "complete") == "complete"]


def counted(number: int, word: str) -> str:
    """Write how many of something there are."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def is_like(run: RunRecord, protocol: Protocol, arm: str) -> bool:
    """Say whether a run has the settings of an arm."""
    return next(_unlike(run, protocol, arm), None) is None


def _unlike(run: RunRecord, protocol: Protocol, arm: str) -> Iterator[tuple[str, Value]]:
    """Return the settings of an arm that a run doesn't have."""
    settings, defaults = protocol.settings(arm), _defaults()
    others = defaults.keys() - FREE if protocol.others == "default" else protocol.varied()
    others = (others - settings.keys() - {"model.table"}) & run.params.keys() & defaults.keys()
    wanted = settings | {name: defaults[name] for name in sorted(others)}
    return ((name, value) for name, value in wanted.items() if not has(run, name, value))


def _nearest(runs: Sequence[RunRecord], protocol: Protocol, arm: str) -> str:
    """Say in which few settings the runs that come nearest to an arm differ from it; empty where none comes near.

    A run that doesn't know a setting at all isn't near.
    """
    unlike = [(run, list(_unlike(run, protocol, arm))) for run in runs]
    known = [(run, settings) for run, settings in unlike if all(_logged(run, name) for name, _ in settings)]
    least = min((settings for _, settings in known), key=len, default=[])
    words = []
    for name, value in least if len(least) <= FEW else ():
        there = dict.fromkeys(" and ".join(_logged(run, name)) or "empty" for run, each in known if each == least)
        words.append(f"{name} is {' or '.join(list(there)[:4])}, not {'empty' if value == '' else value}")
    return f"no run is like {arm}: in the nearest ones {', '.join(words)}" if words else ""


@cache
def _defaults() -> dict[str, Value]:
    return TrainConfig().flat()


def _logged(run: RunRecord, name: str) -> list[str]:
    """Return what a run logged as a setting: a value, none, or several numbers of classes.

    A training of ours has the default of a setting younger than itself.
    """
    if name == CLASSES:
        return list(dict.fromkeys(str(len(each.classes)) for each in run.images.values() if each.classes))
    of_ours = CONFIG_HASH in run.tags and "optimiser.name" in run.params
    logged = run.params.get(name, _defaults().get(name) if of_ours else None)
    return [] if logged is None else [str(logged)]


def has(run: RunRecord, name: str, value: Value) -> bool:
    """Say whether a run has a setting."""
    if isinstance(value, (bool, str)):
        return str(value).lower() in map(str.lower, _logged(run, name))
    return value in map(number, _logged(run, name))


def split_of(run: RunRecord) -> str:
    """Return which split of which images a run used: the seed, and the digest of the data where it was logged."""
    return f"{run.params.get(SPLIT_SEED, '')} {run.tags.get(DATA_DIGEST, '')}".strip()


def pair_of(run: RunRecord) -> SplitAndSeed:
    """Return a run's split, and the seed of its training: its own id where none was logged, so that it has no pair."""
    return split_of(run), run.params.get(SEED_SETTING) or run.tags.get(SEED) or run.run_id


@dataclass(frozen=True)
class Chosen:
    """The runs of some arms that differ in nothing else but seeds, by arm and pair; no arms where there are none.

    `splits` counts those that all arms have; `overlap` is the ratio of test to other images where there are several,
    else 0; `aside` says which runs were left aside; `why` why there are none, where some come near.
    """

    arms: Mapping[str, Mapping[SplitAndSeed, RunRecord]]
    splits: int = 1
    overlap: float = 0.0
    aside: Sequence[str] = ()
    why: str = ""

    def pairs(self) -> list[SplitAndSeed]:
        """Return the pairs that all arms have."""
        first, *others = self.arms.values()
        return [pair for pair in first if all(pair in other for other in others)]


def choose(
    runs: Sequence[RunRecord], protocol: Protocol, arms: Sequence[str], what: Quantity, positive: bool
) -> Chosen:
    """Choose the runs of some arms of a protocol that have a quantity, `positive` where it must be.

    Where the protocol leaves something open in which runs differ, those are taken of which there are most pairs
    (fixed networks differ in more than the protocol's settings: in weights and transforms).
    Of a run that was repeated the last one counts. `runs` are the oldest first.
    """
    like = {arm: [run for run in runs if is_like(run, protocol, arm)] for arm in arms}
    having = {
        arm: [run for run in found if any(value > 0 or not positive for value in what.values([run]))]
        for arm, found in like.items()
    }
    if lacking := [arm for arm in like if not having[arm]]:
        unusable = f"have no {what.words} that can be used"
        reasons = [f"the runs of {a} {unusable}" if like[a] else _nearest(runs, protocol, a) for a in lacking]
        return Chosen({}, why="; ".join(filter(None, reasons)))
    groups: dict[Settings, dict[str, dict[SplitAndSeed, RunRecord]]] = {}
    varies_data = any(name.startswith("data.") for name in protocol.varied())
    for arm, found in having.items():
        for run in found:
            of_arm = groups.setdefault(_left_open(run, protocol, what), {}).setdefault(arm, {})
            split, seed = pair_of(run)
            pair = (run.params.get(SPLIT_SEED, "") if varies_data else split, seed)
            of_arm.pop(pair, None)  # so that the last one stands last
            of_arm[pair] = run
    whole = {settings: Chosen(group) for settings, group in groups.items() if len(group) == len(like)}
    if not whole:
        first, last = ([settings for settings, group in groups.items() if a in group] for a in (arms[0], arms[-1]))
        fewest = min((_differing(*both) for both in product(first, last)), key=len)
        names = f"runs of {' and of '.join(arms)} differ in more than that: in {', '.join(fewest)}"
        return Chosen({}, why=names)
    settings = max(whole, key=lambda each: (len(whole[each].pairs()), min(map(len, whole[each].arms.values()))))
    most = whole.pop(settings)
    if protocol.over == "images" or what.fixed:
        return most
    left_out = sum(len(found) - len(having[arm]) for arm, found in like.items())
    aside = [f"{counted(left_out, 'run')} without a usable figure left out"] if left_out else []
    if whole:
        count = sum(len(of_arm) for group in whole.values() for of_arm in group.arms.values())
        aside.append(
            f"{counted(count, 'run')} left aside that differ from these in {', '.join(_differing(settings, *whole))}"
        )
    return _on_shared_splits(most.arms, aside)


def _differing(one: Settings, *others: Settings) -> list[str]:
    return sorted({name for other in others for name, _ in one ^ other})


def _on_shared_splits(found: Mapping[str, Mapping[SplitAndSeed, RunRecord]], aside: list[str]) -> Chosen:
    """Keep the splits that all arms have: an arm on other images says nothing of the difference.

    Where there are pairs enough to be judged by them, those that have pairs. Fewer than three splits decide nothing,
    so that of two the one with more pairs, or runs, counts.
    """
    runs = Counter(split for of_arm in found.values() for split, _ in of_arm)
    shared = set.intersection(*({split for split, _ in of_arm} for of_arm in found.values()))
    if not shared:
        return Chosen({}, why="the arms have no split of the data in common")
    pairs = Counter(split for split, _ in Chosen(found).pairs())
    if pairs.total() >= FEWEST and (unpaired := sum(runs[split] for split in shared - pairs.keys())):
        aside.append(f"{counted(unpaired, 'run')} on splits without pairs left aside")
        shared &= pairs.keys()
    if 1 < len(shared) < FEWEST:
        counts = pairs if max(pairs.values(), default=0) >= FEWEST else runs
        most = max(sorted(shared), key=lambda split: counts[split])
        others = counted(sum(runs[split] for split in shared - {most}), "run")
        aside.append(f"on one split alone, {others} on another left aside: a third would count all")
        shared = {most}
    arms = {arm: {pair: run for pair, run in of_arm.items() if pair[0] in shared} for arm, of_arm in found.items()}
    share = number(next(iter(next(iter(arms.values())).values())).params.get("data.test_fraction", ""))
    overlap = share / (1 - share) if 0 < share < 1 else PUBLISHED_OVERLAP
    return Chosen(arms, len(shared), overlap if len(shared) > 1 else 0.0, aside)


def settings_of(run: RunRecord, but: Collection[str] = frozenset(FREE)) -> Settings:
    """Return our parameters of a run `but` some, and which images it used."""
    images = {f"{context} images": f"{each.name}: {', '.join(each.classes)}" for context, each in run.images.items()}
    params = {name: value for name, value in run.params.items() if "." in name and name not in but}
    return frozenset((params | images).items())


def _left_open(run: RunRecord, protocol: Protocol, what: Quantity) -> Settings:
    """Return what the protocol leaves open: other settings, and of times the machine; nothing of fixed networks."""
    if protocol.over == "images":
        return frozenset()
    named = (protocol.runs.keys() | protocol.varied() | FREE) - (COMPUTED if what.timed else set())
    if "model.variant" in named:
        named.add("model.table")  # which goes by that name
    settings = {each for each in settings_of(run, named) if not each[0].startswith("study.")}
    return frozenset(settings | {(tag, run.tags.get(tag, "")) for tag in OF_TIMES if what.timed})


def over_splits(values: Mapping[SplitAndSeed, float]) -> tuple[float, ...]:
    """Return the values, or where there are several splits the mean of each: runs of one split share its luck."""
    splits: dict[str, list[float]] = {}
    for (split, _), value in values.items():
        splits.setdefault(split, []).append(value)
    return tuple(values.values() if len(splits) < 2 else (sum(each) / len(each) for each in splits.values()))
