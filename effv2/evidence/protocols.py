"""The runs that a claim is about: those like an arm of a protocol or study, which of them count, and which don't."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice, product
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field

from effv2.config.schema import Group, TrainConfig
from effv2.config.studies import NOTHING, Published, Settings, Value, as_command, open_study
from effv2.core.errors import InputError
from effv2.core.words import counted, number
from effv2.evidence.quantities import Quantity
from effv2.evidence.statistics import EVERY_LOOK, FEWEST, MOST_LOOKS, Looks
from effv2.tracking.read import RunRecord
from effv2.tracking.studies import complete
from effv2.tracking.tags import CONFIG_HASH, DATA_DIGEST, MACHINE, SEED

ONLY_ARM = "default"  # the arm of a study without arms
SEED_SETTING, SPLIT_SEED = "random.seed", "data.split_seed"
# Settings that may differ between compared runs: what pairs them, the place of the images and, except for times, the
# execution.
COMPUTED = {"execution.device", "execution.compile", "execution.channels_last", "evaluation.batch_size"}
WEIGHTS_HASH = "model.weights_sha256"  # follows from model.weights
FREE = {SEED_SETTING, SPLIT_SEED, WEIGHTS_HASH, "data.dir", "data.download", *COMPUTED}
CLASSES = "data.classes"  # not a parameter, but a protocol may name it: the number of classes in the data
OF_TIMES = tuple(f"{MACHINE}{name}" for name in ("processor", "accelerator", "threads"))  # tags
PUBLISHED_OVERLAP = 0.25  # ratio of test to training images in the published split
DEFAULTS = TrainConfig().flat()
NEWER = {name: str(value) for name, value in DEFAULTS.items() if value != "auto"}  # settings that an old run may lack
FEW = 2  # most settings in which a near run may differ
SplitAndSeed = tuple[str, str]  # the split of the images, and the seed of the training
Runs = Mapping[SplitAndSeed, RunRecord]  # of an arm
Alike = frozenset[tuple[str, str]]  # names and values that repeated runs have in common
RightAnswers = Callable[[RunRecord], Mapping[str, bool]]  # by image, for a run's predictions of its test images
T = TypeVar("T")


class Protocol(Group):
    """The runs that a claim is about: those with the settings of `runs` and of an arm."""

    runs: Settings = Field(default_factory=dict)
    # Their settings, or a `study/arm` that has them. Settings of other arms only are as in `runs`, or the default.
    arms: dict[str, Settings | str] = Field(min_length=1)
    over: Literal["seeds", "images"] = "seeds"  # what varies: training, or the test images of a fixed network
    command: str = ""
    ignore: list[str] = []  # parameters in which runs may differ
    paired: bool = False  # by seed, within a split
    needs: str = ""  # what the runs need
    assumed: str = ""  # settings that the source doesn't state, shown with every claim
    nearest: str = ""  # the nearest protocol with the same arms, shown if this one has no runs
    published: Published = Published()
    study: str = ""  # the study of the protocol, which also names the published curves

    def own(self, arm: str) -> Settings:
        """Return the settings that an arm names, after those of studies are resolved."""
        named = self.arms[arm]
        return named if isinstance(named, dict) else {}

    @cached_property
    def varied(self) -> set[str]:
        """Return the settings in which arms differ."""
        return {name for arm in self.arms for name in self.own(arm)}


def protocol_title(study: str, ignore: Sequence[str]) -> str:
    """Return the name of a study's protocol."""
    return f"{study}, ignoring {', '.join(ignore)}" if study and ignore else study


def study_protocols(name: str, ignore: Sequence[str], folder: Path) -> dict[str, Protocol]:
    """Return the protocol of a study, without the settings in `ignore`, and that of its nearest runs."""
    study = open_study(name, folder)
    configs = {arm: study.arm(arm, NOTHING) for arm in study.arms} or {ONLY_ARM: study.config(NOTHING)}
    arms = {
        arm: {key: value for key, value in config.flat().items() if key not in FREE and value != "auto"}
        for arm, config in configs.items()
    }
    first, published = next(iter(arms.values())), study.published
    if unknown := next((key for key in ignore if "." in key and key not in first | published.runs), ""):
        raise InputError("ignore", unknown, "is not a setting of the study", choices=first)
    kept = set.intersection(*map(set, arms.values())) - set(ignore)  # also without `auto`
    shared = {key for key in kept if all(arm[key] == first[key] for arm in arms.values())}
    named, near = (
        {key: each[key] for key in each if key not in ignore} for each in (published.runs, published.nearest)
    )
    one = study.command.startswith("effv2 train ")
    seeds = as_command(" -P seed=0; then seeds 1 and 2" if one else " -P seeds=0,1,2")
    title = protocol_title(name, ignore)
    protocol = Protocol(
        runs={key: value for key, value in first.items() if key in shared} | named,
        arms={arm: {key: each[key] for key in each if key in kept - shared} for arm, each in arms.items()},
        command=study.command and study.command + seeds,
        needs=published.needs,
        assumed=study.assumptions(),
        ignore=list(ignore),
        paired=study.paired,
        nearest=f"{title}, nearest" if near else "",
        published=published,
        study=name,
    )
    differing = f"{protocol.nearest}: {', '.join(f'{key} {value}' for key, value in near.items())}."
    changes = {"runs": protocol.runs | near, "assumed": differing, "nearest": "", "study": "", "published": Published()}
    return {title: protocol} | ({protocol.nearest: protocol.model_copy(update=changes)} if near else {})


def is_like(run: RunRecord, protocol: Protocol, arm: str) -> bool:
    """Return whether a run has the settings of an arm."""
    return not any(_unlike(run, protocol, arm))


def _unlike(run: RunRecord, protocol: Protocol, arm: str) -> Iterator[tuple[str, Value]]:
    """Return the settings of an arm that a run doesn't have."""
    settings = protocol.runs | protocol.own(arm)
    left_out = (protocol.varied - settings.keys() - {"model.table"}) & run.params.keys()
    wanted = settings | {name: DEFAULTS.get(name, "") for name in sorted(left_out)}  # others than ours have no default
    return ((name, value) for name, value in wanted.items() if not has(run, name, value))


def _nearest(runs: Sequence[RunRecord], protocol: Protocol, arm: str) -> str:
    """Describe the few settings in which the nearest runs differ from an arm; empty if there are no near runs."""
    unlike = [(run, list(islice(_unlike(run, protocol, arm), FEW + 1))) for run in runs]
    known = [(run, settings) for run, settings in unlike if all(_logged(run, name) for name, _ in settings)]
    least = min((settings for _, settings in known), key=len, default=[])
    words = []
    for name, value in least if len(least) <= FEW else ():
        there = dict.fromkeys(" and ".join(_logged(run, name)) or "empty" for run, each in known if each == least)
        words.append(f"{name} is {' or '.join(list(there)[:4])}, not {'empty' if value == '' else value}")
    return f"no run is like {arm}: in the nearest ones {', '.join(words)}" if words else ""


def _logged(run: RunRecord, name: str) -> list[str]:
    """Return the logged value of a setting: one, none, or several numbers of classes.

    A training of effv2 has the default of a setting that is newer than itself.
    """
    if name == CLASSES:
        return list(dict.fromkeys(str(len(each.classes)) for each in run.images.values() if each.classes))
    logged = run.params.get(name, DEFAULTS.get(name) if _is_training(run) else None)
    return [] if logged is None else [str(logged)]


def _is_training(run: RunRecord) -> bool:
    return CONFIG_HASH in run.tags and "optimiser.name" in run.params


def has(run: RunRecord, name: str, value: Value) -> bool:
    """Say whether a run has a setting."""
    if isinstance(value, str) and type(DEFAULTS.get(name)) in (int, float):
        value = number(value)  # YAML reads 1e-3 as text
    if isinstance(value, (bool, str)):
        return str(value).lower() in map(str.lower, _logged(run, name))
    return value in map(number, _logged(run, name))


def machine_of(run: RunRecord) -> tuple[str, ...]:
    """Return the machine of a run's times, as far as it was logged."""
    return tuple(run.tags.get(tag, "") for tag in OF_TIMES)


def split_of(run: RunRecord) -> str:
    """Return the split and the images of a run: the seed, and the digest of the data if it was logged."""
    return f"{run.params.get(SPLIT_SEED, '')} {run.tags.get(DATA_DIGEST, '')}".strip()


def pair_of(run: RunRecord, other_images: bool = False) -> SplitAndSeed:
    """Return a run's split (only its seed, if arms have other images), and the seed of its training, or else its id."""
    split = run.params.get(SPLIT_SEED, "") if other_images else split_of(run)
    return split, run.params.get(SEED_SETTING) or run.tags.get(SEED) or run.run_id


def looks_of(parent: RunRecord | None, runs: Iterable[RunRecord]) -> Looks:
    """Return the looks at a study's runs: those that its own run recorded, if it began before them; else every look."""
    began_first = parent is not None and all(run.started >= parent.started for run in runs)
    return planned_looks(parent.params) if parent and began_first else EVERY_LOOK


def planned_looks(params: Mapping[str, str]) -> Looks:
    """Return the looks that a study's own run records when it begins; every look if it names no maximum of seeds."""
    if not re.fullmatch("[0-9]{1,6}", most := params.get("study.max_seeds", "")):
        return EVERY_LOOK
    if params.get("study.looks") != "once":
        return Looks(min(int(most), MOST_LOOKS))
    splits = number(params.get("study.splits", "1"))
    return Looks(int(most), once=True, splits=int(splits) if 1 <= splits <= MOST_LOOKS else 1)


@dataclass(frozen=True)
class Chosen:
    """The runs of some arms, by split and seed, that differ in nothing else; no arms if there are none."""

    arms: Mapping[str, Runs]
    splits: int = 1  # that all arms have
    overlap: float = 0.0  # with several splits: the ratio of test to other images, if the test images differ
    looks: Looks = EVERY_LOOK
    paired: bool = False  # by seed, within a split
    aside: Sequence[str] = ()  # descriptions of unused runs
    why: str = ""  # why there are no runs, or no verdict yet


def choose(
    runs: Sequence[RunRecord], protocol: Protocol, arms: Sequence[str], what: Quantity, positive: bool
) -> Chosen:
    """Choose complete runs of some arms of a protocol that have a quantity, `positive` if it must be.

    If runs differ in something that the protocol leaves open, the largest group of equal runs counts
    (fixed networks differ in more than the protocol's settings: in weights and transforms).
    Of repeated runs, the last one counts. `runs` are in order of age, the oldest first.
    """
    groups: dict[Alike, dict[str, dict[SplitAndSeed, RunRecord]]] = {}
    unused: dict[str, list[tuple[Alike, str]]] = {arm: [] for arm in arms}  # settings of runs, and why they don't count
    other_images = any(name.startswith("data.") for name in protocol.varied)
    ended = [run for run in runs if run.status == "FAILED" or complete([run])]  # only these are counted if left out
    for arm, run in ((arm, run) for arm in arms for run in ended if is_like(run, protocol, arm)):
        settings, pair = _left_open(run, protocol, what), pair_of(run, other_images)
        if why := _unusable(run, what, positive):
            unused[arm].append((settings, why))
            continue
        of_arm = groups.setdefault(settings, {}).setdefault(arm, {})
        if of_arm.pop(pair, None):  # so that the last run is last
            unused[arm].append((settings, "repeated since"))
        of_arm[pair] = run
    whole = {settings: group for settings, group in groups.items() if len(group) == len(arms)}
    if not whole:
        return Chosen({}, why=_why_none(runs, protocol, groups, unused))
    settings = max(whole, key=lambda each: min(map(len, whole[each].values())))
    most = whole.pop(settings)
    if protocol.over == "images" or what.fixed:
        return Chosen(most)
    aside = list[str]()
    for arm, others in unused.items():
        counts = Counter(why for theirs, why in others if theirs <= settings)
        aside += [f"{counted(count, 'run')} of {arm} {why}" for why, count in counts.items()]
    if count := sum(len(of_arm) for group in whole.values() for of_arm in group.values()):
        names = _differing(settings, *whole)
        aside.append(f"{counted(count, 'run')} not used, which differ from these in {names}")
    return replace(_as_planned(most, aside, runs, what.metric or what.name), paired=protocol.paired)


def _why_none(
    runs: Sequence[RunRecord],
    protocol: Protocol,
    groups: Mapping[Alike, Collection[str]],
    unused: Mapping[str, Sequence[tuple[Alike, str]]],
) -> str:
    """Explain why no runs of all arms (those of `unused`) are equal in other settings."""
    having = {arm: [settings for settings, group in groups.items() if arm in group] for arm in unused}
    if all(having.values()):
        first, *_, last = having.values()
        names = min((_differing(*both) for both in product(first, last)), key=lambda each: each.count(", "))
        return f"runs of {' and of '.join(having)} differ in {names}; name it under `ignore` if it doesn't matter"
    words = []
    for arm in (arm for arm in unused if not having[arm]):
        reasons = ", ".join(dict.fromkeys(why for _, why in unused[arm]))
        words.append(f"the runs of {arm} are {reasons}" if reasons else _nearest(complete(runs), protocol, arm))
    return "; ".join(filter(None, words))


def _unusable(run: RunRecord, what: Quantity, positive: bool) -> str:
    """Return why a complete or failed run doesn't count; empty if it does."""
    if run.status == "FAILED":
        return "failed"
    value = what.value(run)
    if value is None or (positive and value <= 0):
        return f"without a usable {what.words}"
    percentage = what.is_accuracy and value > 1
    return "left out: above 1, but accuracies are fractions (a point is 0.01)" if percentage else ""


def _differing(one: Alike, *others: Alike) -> str:
    return ", ".join(sorted({name for other in others for name, _ in one ^ other}))


def that_count(values: Mapping[SplitAndSeed, T], looks: Looks) -> dict[SplitAndSeed, T]:
    """Return the values that a verdict uses: those of the first splits and, on each, of the first seeds."""
    splits: dict[str, list[SplitAndSeed]] = {}
    for pair in values:
        splits.setdefault(pair[0], []).append(pair)
    seeds = looks.most if looks.once or len(splits) == 1 else 1
    return {pair: values[pair] for pairs in list(splits.values())[: looks.most_splits] for pair in pairs[:seeds]}


def _as_planned(arms: Mapping[str, Runs], aside: list[str], known: Sequence[RunRecord], metric: str) -> Chosen:
    """Keep the splits of all arms, because arms on other images aren't comparable, and at most the planned seeds.

    Fewer than three splits decide nothing, so of two only the one with more runs counts.
    """
    runs = [run for of_arm in arms.values() for run in of_arm.values()]
    parent = next((run for run in known if {each.parent for each in runs} == {run.run_id}), None)
    looks = looks_of(parent, runs)
    total = Counter(split for of_arm in arms.values() for split, _ in of_arm)
    on_all = set.intersection(*({split for split, _ in of_arm} for of_arm in arms.values()))
    shared = [split for split in total if split in on_all][: looks.most_splits]
    if not shared:
        return Chosen({}, why="the arms have no split of the data in common")
    if 1 < len(shared) < FEWEST:
        kept = max(sorted(shared), key=lambda split: total[split])
        others = counted(sum(total[split] for split in shared if split != kept), "run")
        aside.append(f"only on one split, {others} on another not used: with a third split, all would count")
        shared = [kept]
    of_splits = {
        arm: {pair: run for split in shared for pair, run in of_arm.items() if pair[0] == split}
        for arm, of_arm in arms.items()
    }
    first = {arm: that_count(of_arm, looks) for arm, of_arm in of_splits.items()}
    if beyond := sum(map(len, of_splits.values())) - sum(map(len, first.values())):
        aside.append(f"{counted(beyond, 'run')} beyond {looks.counted(len(shared))} left out")
    overlap = overlap_of([list(each.values()) for each in first.values()], metric) if len(shared) > 1 else 0.0
    return Chosen(first, len(shared), overlap, looks, aside=aside, why=looks.waits(min(map(len, first.values()))))


def overlap_of(arms: Collection[Sequence[RunRecord]], metric: str) -> float:
    """Return the ratio of judged to other images if splits share images; 0 if each arm is judged on one set.

    A metric with `val` in its name is judged on validation images, another one on test images.
    """
    found = [run for runs in arms for run in runs]
    judged = "validation" if "val" in re.split("[/_]", metric) else "test"
    sets = [{run.images.get(judged) for run in runs} for runs in arms]
    if all(len(each) == 1 and None not in each for each in sets):
        return 0.0
    share = number(found[0].params.get(f"data.{judged}_fraction", ""))
    return share / (1 - share) if 0 < share < 1 else PUBLISHED_OVERLAP


def _left_open(run: RunRecord, protocol: Protocol, what: Quantity) -> Alike:
    """Return the facts that the protocol leaves open: settings, images, and the machine for times; none if over images.

    For runs of effv2, parameters without a dot are left out: `mlflow run` logs its options in this form.
    """
    if protocol.over == "images":
        return frozenset()
    named = protocol.runs.keys() | protocol.varied | (FREE - COMPUTED if what.timed else FREE)
    if "model.variant" in named:
        named.add("model.table")  # under that name
    ours = CONFIG_HASH in run.tags
    logged = (NEWER if _is_training(run) else {}) | run.params
    found = {name: value for name, value in logged.items() if name not in named and ("." in name or not ours)}
    if "model.weights" not in protocol.varied and (sha256 := run.params.get(WEIGHTS_HASH)):
        found[WEIGHTS_HASH] = sha256
    found |= {f"{context} images": f"{each.name}: {', '.join(each.classes)}" for context, each in run.images.items()}
    found |= dict(zip(OF_TIMES, machine_of(run), strict=True)) if what.timed else {}
    kept = (name for name in found if not name.startswith("study.") and name not in protocol.ignore)
    return frozenset((name, found[name]) for name in kept)
