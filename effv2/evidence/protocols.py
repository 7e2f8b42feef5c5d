"""Which runs a claim is about: those like an arm of a protocol or a study, and which of two arms form pairs."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice, product
from pathlib import Path
from typing import Literal

from pydantic import Field

from effv2.config.schema import Group, TrainConfig
from effv2.config.studies import NOTHING, Published, Settings, Value, open_study
from effv2.core.errors import InputError
from effv2.evidence.quantities import TEST, TRAIN, Quantity, number, quantity
from effv2.evidence.statistics import EVERY_LOOK, FEWEST, Looks
from effv2.tracking.read import BEST_TEST, LAST_TEST, RunRecord
from effv2.tracking.tags import CONFIG_HASH, DATA_DIGEST, MACHINE, OUTCOME, SEED

PUBLISHED = Path(__file__).with_name("published")
ONLY_ARM = "default"  # of a study that has no arms
SEED_SETTING, SPLIT_SEED = "random.seed", "data.split_seed"
# What may differ between runs that are compared: what pairs them, where the images lie and, but for times, how they
# are computed.
COMPUTED = {"execution.device", "execution.compile", "execution.channels_last", "evaluation.batch_size"}
FREE = {SEED_SETTING, SPLIT_SEED, "data.dir", "data.download", *COMPUTED}
CLASSES = "data.classes"  # no parameter, but may stand in a protocol like one: the number of classes in the data
OF_TIMES = tuple(f"{MACHINE}{name}" for name in ("processor", "accelerator", "threads"))  # tags
PUBLISHED_OVERLAP = 0.25  # test over training images of the published split
DEFAULTS = TrainConfig().flat()
FEW = 2  # settings in which a run may differ to be near
SplitAndSeed = tuple[str, str]  # what runs of several arms have in common that form a pair
Alike = frozenset[tuple[str, str]]  # names and values of what runs that repeat each other have in common
RightAnswers = Callable[[RunRecord], Mapping[str, bool]]  # by image, of a run's predictions of its test images


class Protocol(Group):
    """Which runs a claim is about: those that have the settings of `runs` and of an arm."""

    runs: Settings = Field(default_factory=dict)
    # Their settings, or a `study/arm` that has them. What an arm lacks and others name is as in `runs`, or the default.
    arms: dict[str, Settings | str] = Field(min_length=1)
    over: Literal["seeds", "images"] = "seeds"  # what varies: training, or the test images of a fixed network
    command: str = ""
    others: Literal["same", "default"] = "same"  # settings that nobody names: alike in all runs, or TrainConfig's
    needs: str = ""  # what must be there first
    assumed: str = ""  # what the source doesn't state, said with every claim
    nearest: str = ""  # a protocol with the same arms that comes close, shown where this one has no runs
    published: Published = Published()
    study: str = ""  # of which it is the protocol, and under whose name the published curves stand

    def own(self, arm: str) -> Settings:
        """Return the settings that an arm names, once those of studies are resolved."""
        named = self.arms[arm]
        return named if isinstance(named, dict) else {}

    def varied(self) -> set[str]:
        """Return the settings in which arms differ."""
        return {name for arm in self.arms for name in self.own(arm)}


def protocol_title(study: str, free: Sequence[str]) -> str:
    """Return the name of a study's protocol."""
    return f"{study}, free: {', '.join(free)}" if study and free else study


def study_protocols(name: str, free: Sequence[str], folder: Path) -> dict[str, Protocol]:
    """Return the protocol of a study, without the settings that are left `free`, and that of its nearest runs."""
    study = open_study(name, folder)
    configs = {arm: study.arm(arm, NOTHING) for arm in study.arms} or {ONLY_ARM: study.config(NOTHING)}
    arms = {
        arm: {key: value for key, value in config.flat().items() if key not in FREE and value != "auto"}
        for arm, config in configs.items()
    }
    first, published = next(iter(arms.values())), study.published
    if unknown := next((key for key in free if key not in first | published.runs), ""):
        raise InputError("free", unknown, "no setting of the study", choices=first)
    kept = set.intersection(*map(set, arms.values())) - set(free)  # what is `auto` in an arm is free too
    shared = {key for key in kept if all(arm[key] == first[key] for arm in arms.values())}
    named, near = ({key: each[key] for key in each if key not in free} for each in (published.runs, published.nearest))
    seeds = " -P seed=0; then seeds 1 and 2" if " -e train " in study.command else " -P seeds=0,1,2"
    title = protocol_title(name, free)
    protocol = Protocol(
        runs={key: value for key, value in first.items() if key in shared} | named,
        arms={arm: {key: each[key] for key in each if key in kept - shared} for arm, each in arms.items()},
        command=study.command and study.command + seeds,
        needs=published.needs,
        assumed=study.assumptions(),
        nearest=f"{title}, nearest" if near else "",
        published=published,
        study=name,
    )
    if not near:
        return {title: protocol}
    differing = f"{protocol.nearest}: {', '.join(f'{key} {value}' for key, value in near.items())}."
    others = Protocol(runs=protocol.runs | near, arms=protocol.arms, assumed=differing)
    return {title: protocol, protocol.nearest: others}


@cache
def published_runs() -> Mapping[str, Mapping[str, RunRecord]]:
    """Return the post's training runs, as far as it published their curves, by study and arm; one run an arm."""
    found: dict[str, dict[str, RunRecord]] = {}
    with (PUBLISHED / "curves.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            run = RunRecord("", row["arm"], "FINISHED", {}, {}, {}, {TRAIN: {}, TEST: {}})
            run = found.setdefault(row["study"], {}).setdefault(row["arm"], run)
            for name, column in ((TRAIN, "train_accuracy_percent"), (TEST, "test_accuracy_percent")):
                run.history[name][int(row["epoch"])] = round(float(row[column]) / 100, 6)
            test = run.history[TEST]
            run.metrics.update({BEST_TEST: max(test.values()), LAST_TEST: test[max(test)]})
    return found


def published_value(protocol: Protocol, metric: str, arm: str) -> float | None:
    """Return the published figure of an arm: as it was printed, else from the published curve; None without one."""
    printed = protocol.published.figures.get(metric, {})
    run = published_runs().get(protocol.study, {}).get(arm)
    return printed.get(arm, None if run is None else quantity(metric).value(run))


def complete(runs: Iterable[RunRecord]) -> list[RunRecord]:
    """Return the runs that were finished, not pruned."""
    return [run for run in runs if run.status == "FINISHED" and run.tags.get(OUTCOME, "complete") == "complete"]


def counted(number: int, word: str) -> str:
    """Write how many of something there are."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def is_like(run: RunRecord, protocol: Protocol, arm: str) -> bool:
    """Say whether a run has the settings of an arm."""
    return not any(_unlike(run, protocol, arm))


def _unlike(run: RunRecord, protocol: Protocol, arm: str) -> Iterator[tuple[str, Value]]:
    """Return the settings of an arm that a run doesn't have."""
    settings = protocol.runs | protocol.own(arm)
    others = DEFAULTS.keys() - FREE if protocol.others == "default" else protocol.varied()
    others = (others - settings.keys() - {"model.table"}) & run.params.keys() & DEFAULTS.keys()
    wanted = settings | {name: DEFAULTS[name] for name in sorted(others)}
    return ((name, value) for name, value in wanted.items() if not has(run, name, value))


def _nearest(runs: Sequence[RunRecord], protocol: Protocol, arm: str) -> str:
    """Say in which few settings the nearest runs differ from an arm; empty where none comes near and knows these."""
    unlike = [(run, list(islice(_unlike(run, protocol, arm), FEW + 1))) for run in runs]
    known = [(run, settings) for run, settings in unlike if all(_logged(run, name) for name, _ in settings)]
    least = min((settings for _, settings in known), key=len, default=[])
    words = []
    for name, value in least if len(least) <= FEW else ():
        there = dict.fromkeys(" and ".join(_logged(run, name)) or "empty" for run, each in known if each == least)
        words.append(f"{name} is {' or '.join(list(there)[:4])}, not {'empty' if value == '' else value}")
    return f"no run is like {arm}: in the nearest ones {', '.join(words)}" if words else ""


def _logged(run: RunRecord, name: str) -> list[str]:
    """Return what a run logged as a setting: a value, none, or several numbers of classes.

    A training of ours has the default of a setting younger than itself.
    """
    if name == CLASSES:
        return list(dict.fromkeys(str(len(each.classes)) for each in run.images.values() if each.classes))
    of_ours = CONFIG_HASH in run.tags and "optimiser.name" in run.params
    logged = run.params.get(name, DEFAULTS.get(name) if of_ours else None)
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


def looks_of(parent: RunRecord | None, runs: Iterable[RunRecord]) -> Looks:
    """Return how often a study's runs may be looked at: as its run was stamped before the first of them, if it was."""
    most = number(parent.params.get("study.max_seeds", "")) if parent else math.nan
    if parent is None or not most >= 1 or any(run.started < parent.started for run in runs):
        return EVERY_LOOK
    return Looks(int(most), parent.params.get("study.looks") == "once")


def overlap_of(runs: Sequence[RunRecord]) -> float:
    """Return the ratio of test to other images where splits share images of either; 0 if all have one test set."""
    tests = {run.images.get("test") for run in runs}
    if len(tests) == 1 and None not in tests:
        return 0.0
    share = number(runs[0].params.get("data.test_fraction", ""))
    return share / (1 - share) if 0 < share < 1 else PUBLISHED_OVERLAP


@dataclass(frozen=True)
class Chosen:
    """The runs of some arms that differ in nothing else but seeds, by arm and pair; no arms where there are none."""

    arms: Mapping[str, Mapping[SplitAndSeed, RunRecord]]
    splits: int = 1  # that all arms have
    overlap: float = 0.0  # of several splits: the ratio of test to other images
    aside: Sequence[str] = ()  # which runs were left aside
    why: str = ""  # there are none, where some come near

    def pairs(self) -> list[SplitAndSeed]:
        """Return the pairs that all arms have."""
        first, *others = self.arms.values()
        return [pair for pair in first if all(pair in other for other in others)]


def choose(
    runs: Sequence[RunRecord], protocol: Protocol, arms: Sequence[str], what: Quantity, positive: bool
) -> Chosen:
    """Choose complete runs of some arms of a protocol that have a quantity, `positive` where it must be.

    Where the protocol leaves something open in which runs differ, those are taken of which there are most pairs
    (fixed networks differ in more than the protocol's settings: in weights and transforms).
    Of a run that was repeated the last one counts. `runs` are the oldest first.
    """
    known = complete(runs)
    like = {arm: [run for run in known if is_like(run, protocol, arm)] for arm in arms}
    least = 0 if positive else -math.inf
    having = {a: [run for run in found if max(what.values([run]), default=least) > least] for a, found in like.items()}
    if lacking := [arm for arm in arms if not having[arm]]:
        unusable = f"have no {what.words} that can be used"
        reasons = [f"the runs of {a} {unusable}" if like[a] else _nearest(known, protocol, a) for a in lacking]
        return Chosen({}, why="; ".join(filter(None, reasons)))
    groups: dict[Alike, dict[str, dict[SplitAndSeed, RunRecord]]] = {}
    varies_data = any(name.startswith("data.") for name in protocol.varied())
    for arm, found in having.items():
        for run in found:
            of_arm = groups.setdefault(_left_open(run, protocol, what), {}).setdefault(arm, {})
            split, seed = pair_of(run)
            pair = (run.params.get(SPLIT_SEED, "") if varies_data else split, seed)
            of_arm.pop(pair, None)  # so that the last one stands last
            of_arm[pair] = run
    whole = {settings: Chosen(group) for settings, group in groups.items() if len(group) == len(arms)}
    if not whole:
        first, last = ([settings for settings, group in groups.items() if arm in group] for arm in (arms[0], arms[-1]))
        names = min((_differing(*both) for both in product(first, last)), key=len)
        return Chosen({}, why=f"runs of {' and of '.join(arms)} differ in more than that: in {', '.join(names)}")
    settings = max(whole, key=lambda each: (len(whole[each].pairs()), min(map(len, whole[each].arms.values()))))
    most = whole.pop(settings)
    if protocol.over == "images" or what.fixed:
        return most
    left_out = sum(len(found) - len(having[arm]) for arm, found in like.items())
    aside = [f"{counted(left_out, 'run')} without a usable figure left out"] if left_out else []
    if count := sum(len(of_arm) for group in whole.values() for of_arm in group.arms.values()):
        names = _differing(settings, *whole)
        aside.append(f"{counted(count, 'run')} left aside that differ from these in {', '.join(names)}")
    return _on_shared_splits(most, aside)


def _differing(one: Alike, *others: Alike) -> list[str]:
    return sorted({name for other in others for name, _ in one ^ other})


def _on_shared_splits(chosen: Chosen, aside: list[str]) -> Chosen:
    """Keep the splits that all arms have: an arm on other images says nothing of the difference.

    Where there are pairs enough to be judged by them, those that have pairs. Fewer than three splits decide nothing,
    so that of two the one with more pairs, or runs, counts.
    """
    splits = [Counter(split for split, _ in of_arm) for of_arm in chosen.arms.values()]
    shared, runs = set.intersection(*map(set, splits)), sum(splits, Counter[str]())
    if not shared:
        return Chosen({}, why="the arms have no split of the data in common")
    pairs = Counter(split for split, _ in chosen.pairs())
    if pairs.total() >= FEWEST and (unpaired := sum(runs[split] for split in shared - pairs.keys())):
        aside.append(f"{counted(unpaired, 'run')} on splits without pairs left aside")
        shared &= pairs.keys()
    if 1 < len(shared) < FEWEST:
        counts = pairs if max(pairs.values(), default=0) >= FEWEST else runs
        most = max(sorted(shared), key=lambda split: counts[split])
        others = counted(sum(runs[split] for split in shared - {most}), "run")
        aside.append(f"on one split alone, {others} on another left aside: a third would count all")
        shared = {most}
    arms = {a: {pair: run for pair, run in found.items() if pair[0] in shared} for a, found in chosen.arms.items()}
    some_run = next(run for of_arm in arms.values() for run in of_arm.values())
    share = number(some_run.params.get("data.test_fraction", ""))
    overlap = share / (1 - share) if 0 < share < 1 else PUBLISHED_OVERLAP
    return Chosen(arms, len(shared), overlap if len(shared) > 1 else 0, aside)


def settings_of(run: RunRecord, but: Collection[str] = frozenset(FREE)) -> Alike:
    """Return our parameters of a run `but` some, and which images it used."""
    images = {f"{context} images": f"{each.name}: {', '.join(each.classes)}" for context, each in run.images.items()}
    params = {name: value for name, value in run.params.items() if "." in name and name not in but}
    return frozenset((params | images).items())


def _left_open(run: RunRecord, protocol: Protocol, what: Quantity) -> Alike:
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
