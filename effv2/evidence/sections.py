"""The sections of a report: each study's runs as a table, figures, commands, and where they come from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from matplotlib.figure import Figure

from effv2.evidence.claims import Claims
from effv2.evidence.comparison import COLUMNS, NONE, Comparison, Rows
from effv2.evidence.figures import accuracy_against_time, accuracy_curves, bars
from effv2.evidence.quantities import (
    EPOCH_SECONDS,
    EVALUATE_RATE,
    LARGEST,
    QUANTITIES,
    TEST,
    TRAIN,
    VALIDATION,
    percent,
    points,
    whole,
)
from effv2.evidence.reference import published_runs
from effv2.evidence.selection import SPLIT_SEED, complete, has, is_like, seed_of, split_of
from effv2.evidence.statistics import FEWEST, TINY, Sample, holm, p_text, wilson
from effv2.tracking.read import RunRecord
from effv2.tracking.run import OUTCOME
from effv2.tracking.tags import ARM, BORROWED, COMMAND, PLANNED, lent_in, names_in

BEST_TRIALS = 5
MOST_COLUMNS = 8
SHORT = ("best/test_accuracy", "selected/test_accuracy", "selected/val_accuracy", "time/total_train_seconds")
INTERVALS = ("best/test_accuracy", "selected/test_accuracy")
SINGLE_RUNS = "Single runs"
# Where a report tells about them: what a tag is called, and how it is called there.
ENVIRONMENT = {
    "effv2.git_commit": "git commit",
    "effv2.git_dirty": "uncommitted changes",
    "effv2.code_version": "code version",
    "effv2.data_digest": "data digest",
    "effv2.machine.processor": "processor",
    "effv2.machine.cores": "cores",
    "effv2.machine.threads": "threads",
    "effv2.machine.accelerator": "accelerator",
    "effv2.machine.memory_gib": "memory, GiB",
    "effv2.machine.system": "system",
    "effv2.machine.python": "Python",
    "effv2.machine.torch": "torch",
    "effv2.machine.torchvision": "torchvision",
    "effv2.machine.mlflow": "mlflow",
}


@dataclass(frozen=True)
class Section:
    """A study in a report. `table` has its titles first; figures are by the word that names their file.

    `missing` says what there should be and isn't.
    """

    title: str
    description: str = ""
    run_id: str = ""
    table: Rows = field(default_factory=list)
    figures: Mapping[str, Figure] = field(default_factory=dict)
    notes: Sequence[str] = ()
    missing: str = ""
    commands: Sequence[str] = ()
    environment: Rows = field(default_factory=list)


@dataclass(frozen=True)
class Study:
    """A study's own run and the runs that it rests on; those of no study have no parent."""

    parent: RunRecord | None
    runs: Sequence[RunRecord]

    @property
    def kind(self) -> str:
        """Return which command made it."""
        return "" if self.parent is None else self.parent.params.get("study.kind", "")

    def in_order(self) -> list[RunRecord]:
        """Return the runs in the order in which they were planned, whichever worker was quicker."""
        planned = names_in(self.parent.tags.get(PLANNED, "")) if self.parent else []
        place = {name: index for index, name in enumerate(planned)}
        return sorted(self.runs, key=lambda run: place.get(run.name, len(place)))

    def baseline(self, arms: Iterable[str]) -> str:
        """Return the arm that the others are held against: the study's own, else the first; empty without a study."""
        if self.parent is None:
            return ""
        known, own = list(arms), self.parent.params.get("study.baseline", "")
        return own if own in known else known[0]


def studies_of(runs: Sequence[RunRecord]) -> list[Study]:
    """Return the studies of an experiment in the order of their beginning, then the training runs of none."""
    by_id = {run.run_id: run for run in runs}
    children: dict[str, list[RunRecord]] = {}
    for run in runs:
        children.setdefault(run.parent, []).append(run)
    alone = children.pop("", [])
    studies = []
    for run in runs:
        names = lent_in(run.tags.get(BORROWED, ""))
        lent = [_as_lent(by_id[each], name) for each, name in names.items() if each in by_id]
        if run.run_id in children or lent or "study.kind" in run.params:
            studies.append(Study(run, [*children.get(run.run_id, []), *lent]))
    parents = {study.parent.run_id for study in studies if study.parent is not None}
    orphans = [run for parent, of_it in children.items() if parent not in parents for run in of_it]
    single = [run for run in complete([*alone, *orphans]) if run.run_id not in parents and _is_told(run)]
    return [*studies, *([Study(None, single)] if single else [])]


def _is_told(run: RunRecord) -> bool:
    """Say whether a run has any of the figures that a table of arms has."""
    return any(QUANTITIES[name].value(run) is not None for name in SHORT)


def _as_lent(run: RunRecord, name: str) -> RunRecord:
    """Return a run of another study as this one has it: under its name, in its arm."""
    arm = name.rpartition(", seed ")[0]
    return replace(run, name=name, tags=run.tags | ({ARM: arm} if arm else {}))


def sections_of(runs: Sequence[RunRecord], claims: Claims) -> list[Section]:
    """Return the sections of all studies; those of one name also say their split, or which run they are."""
    studies = studies_of(runs)
    made = [section(study, claims) for study in studies]
    titles = Counter(each.title for each in made)
    return [
        replace(each, title=f"{each.title} ({_apart(study)})") if titles[each.title] > 1 else each
        for each, study in zip(made, studies, strict=True)
    ]


def _apart(study: Study) -> str:
    splits = dict.fromkeys(run.params.get(SPLIT_SEED, "") for run in study.runs)
    run_id = study.parent.run_id[:8] if study.parent else ""
    return f"split {', '.join(splits)}, run {run_id}" if any(splits) else f"run {run_id}"


def section(study: Study, claims: Claims) -> Section:
    """Return a study's section."""
    fill: Callable[[Study, Section, Claims], Section]
    fill = {"search": _of_search, "evaluate-pretrained": _of_networks}.get(study.kind, _of_arms)
    parent = study.parent
    title = SINGLE_RUNS if parent is None else parent.name
    known = [study.parent] if study.parent is not None else []
    empty = Section(
        title=title,
        description="" if parent is None else parent.params.get("study.description", ""),
        run_id="" if parent is None else parent.run_id,
        missing=_missing(study),
        commands=list(dict.fromkeys(c for run in known or study.runs if (c := run.tags.get(COMMAND, "")))),
        environment=list(_environment([*known, *study.runs])),
    )
    return fill(study, empty, claims)


def _missing(study: Study) -> str:
    parent = study.parent
    if parent is None:
        return ""
    there = {run.name for run in study.runs if run.status == "FINISHED"}
    lacking = [name for name in names_in(parent.tags.get(PLANNED, "")) if name not in there]
    said = []
    if lacking and parent.status == "RUNNING":
        said.append("it is being worked on, or its process died")
    if lacking:
        more = f" and {len(lacking) - 6} more" if len(lacking) > 6 else ""
        said.append(f"{len(lacking)} planned runs aren't finished: {', '.join(lacking[:6])}{more}")
    if not study.runs:
        said.append("it has no runs yet")
    return "; ".join(said)


def _environment(runs: Iterable[RunRecord]) -> Iterator[tuple[str, str]]:
    known = list(runs)
    for tag, words in ENVIRONMENT.items():
        values = list(dict.fromkeys(run.tags[tag] for run in known if tag in run.tags))
        if values:
            yield words, ", ".join(values)
    sets = dict.fromkeys(
        f"{images.name}, {images.images:,} images of {len(images.classes)} classes, digest {images.digest}: {context}"
        for run in known
        for context, images in sorted(run.images.items())
    )
    if sets:
        yield "data", "; ".join(sets)
    took = [sum(curve.values()) for run in known if (curve := run.history.get(EPOCH_SECONDS))]
    if took:
        yield "epochs took", f"{_duration(sum(took))}, finished runs: {len(took)}"


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes / 60:.1f} hours" if minutes >= 60 else f"{minutes:.1f} minutes"


def arm_of(run: RunRecord) -> str:
    """Return how a run's arm is called."""
    return run.tags.get(ARM) or run.tags.get("effv2.study") or run.params.get("model.variant") or run.name


def _of_arms(study: Study, empty: Section, claims: Claims) -> Section:
    arms: dict[str, list[RunRecord]] = {}
    for run in complete(study.in_order()):
        if _is_told(run):
            arms.setdefault(arm_of(run), []).append(run)
    if not arms:
        return empty
    comparison, title = Comparison(arms), empty.title
    published, protocol = published_curves(arms, claims)
    drawn: dict[str, Callable[[], Figure]] = {}
    held_out = ("test accuracy", TEST) if comparison.curves(TEST) else ("validation accuracy", VALIDATION)
    for name, metric in (held_out, ("train accuracy", TRAIN)):
        if curves := comparison.curves(metric):
            theirs = {arm: run.history[metric] for arm, run in published.items() if metric in run.history}
            drawn[name] = partial(accuracy_curves, curves, f"{title}: {name}", theirs)
    best, seconds = comparison.values("best/test_accuracy"), comparison.values("time/total_train_seconds")
    if best and seconds:
        drawn["accuracy against time"] = partial(accuracy_against_time, best, seconds, f"{title}: accuracy and time")
    if seconds:
        drawn["training time"] = partial(bars, seconds, f"{title}: training", "seconds")
    figures = {name: draw() for name, draw in drawn.items()}
    notes = list(_notes(arms, protocol))
    if _decisive(comparison) == "selected/val_accuracy":
        notes.append("The test set was left alone: this is validation at its best epoch, which flatters every arm.")
    return replace(empty, table=_table(comparison, study.baseline(arms)), figures=figures, notes=notes)


def _table(comparison: Comparison, baseline: str) -> Rows:
    """Return the table with a line a figure and a column an arm, accuracies with their intervals.

    Many arms have a line each, and the main figures alone.
    """
    decisive = _decisive(comparison)
    titles, runs, *lines = comparison.lines()
    main: Rows = [titles, runs]
    others: Rows = []
    names = {QUANTITIES[name].words: name for name in COLUMNS}
    for line in lines:
        name = names[line[0]]
        shown = [line]
        if name in INTERVALS or name == decisive:
            shown += _intervals(comparison, name)
        if name == decisive and baseline:
            shown += _differences(comparison, baseline, name)
        (main if name in SHORT else others).extend(shown)
    return [*main, *others] if len(comparison.arms) <= MOST_COLUMNS else list(zip(*main, strict=True))


def _decisive(comparison: Comparison) -> str:
    """Return the accuracy that decides: under the published rules, without a validation split, the best epoch's.

    Elsewhere it is the selected epoch's: the best one on validation, or the last. Where the test set was left alone, it
    is that on validation.
    """
    runs = [run for of_arm in comparison.arms.values() for run in of_arm]
    validated = all("selected/val_accuracy" in run.metrics for run in runs)
    if not comparison.values("selected/test_accuracy"):
        return "selected/val_accuracy"
    published = any(run.params.get("data.sampling") == "published" for run in runs)
    return "best/test_accuracy" if published and not validated else "selected/test_accuracy"


def _intervals(comparison: Comparison, name: str) -> Rows:
    """Return lines with the intervals of a quantity's mean and of one more run, where there are runs enough."""
    values, cells, words = comparison.values(name), [], QUANTITIES[name].words
    for arm in comparison.arms:
        one_split = len({split_of(run) for run in comparison.arms[arm]}) == 1
        sample = Sample(tuple(values.get(arm, ())) if one_split else ())
        told = sample.n >= FEWEST and sample.deviation > TINY  # equal values don't show how much they vary
        found = (sample.interval(), sample.prediction()) if told else (None, None)
        shares = [each and each.of_share() for each in found]
        cells.append([f"{percent(each.low)} to {percent(each.high)}" if each else NONE for each in shares])
    means, singles = zip(*cells, strict=True)
    lines = [
        (f"95 % interval of the mean, {words}", *means),
        (f"a single re-run is expected (95 %), {words}", *singles),
    ]
    return [line for line in lines if set(line[1:]) != {NONE}]


def _differences(comparison: Comparison, baseline: str, name: str) -> Iterator[tuple[str, ...]]:
    """Return lines that hold each arm against its baseline, on the seeds that both have: difference and p-value.

    Nothing where there are several splits, whose runs don't count one by one; claims are judged over them.
    """
    if len({split_of(run) for of_arm in comparison.arms.values() for run in of_arm}) > 1:
        return
    against = {arm: _baseline_of(arm, comparison, baseline) for arm in comparison.arms if arm != baseline}
    what = QUANTITIES[name]
    values = {
        arm: {(split_of(run), seed_of(run)): value for run in of_arm if (value := what.value(run)) is not None}
        for arm, of_arm in comparison.arms.items()
    }
    samples = {}
    for arm, other in against.items():
        pairs = [pair for pair in values[arm] if pair in values[other]]
        samples[arm] = Sample(tuple(values[arm][pair] - values[other][pair] for pair in pairs))
    told = {arm: sample for arm, sample in samples.items() if sample.n >= FEWEST}
    corrected = dict(zip(told, holm([sample.p(0) for sample in told.values()]), strict=True))
    for other in dict.fromkeys(against[arm] for arm in told):
        cells = dict.fromkeys(comparison.arms, "") | {
            arm: f"{points(sample.mean)} [{100 * each.low:+.2f} to {100 * each.high:+.2f}]"
            for arm, sample in told.items()
            if against[arm] == other and (each := sample.interval()) is not None
        }
        yield f"less {other}, {what.words}, paired [95 %]", *cells.values()
        shown = [p_text(corrected[arm]) if arm in told and against[arm] == other else "" for arm in cells]
        yield f"p of that, after Holm for {len(told)}", *shown


def _baseline_of(arm: str, comparison: Comparison, baseline: str) -> str:
    """Return the arm that one is held against: the baseline under its own learning rate schedule, if there is one.

    So the two differ in one thing alone. The baseline itself under another schedule is held against the baseline.
    """
    schedules = {run.params.get("schedule.name", "") for run in comparison.arms[arm]}
    found = [name for schedule in schedules if (name := f"{baseline}_{schedule}") in comparison.arms and name != arm]
    return found[0] if len(found) == 1 else baseline


def published_curves(arms: Mapping[str, Sequence[RunRecord]], claims: Claims) -> tuple[dict[str, RunRecord], str]:
    """Return the published runs of arms that follow a published protocol, or come near it, and the protocol's name."""
    known = published_runs()
    for name, protocol in claims.protocols.items():
        source = name if name in known else next((n for n in known if claims.protocols[n].nearest == name), "")
        found = {
            arm: known[source][theirs]
            for arm, runs in arms.items()
            for theirs in (known[source] if source else ())
            if all(is_like(run, protocol, theirs) for run in runs)
        }
        if found:
            return found, source
    return {}, ""


def _notes(arms: Mapping[str, Sequence[RunRecord]], protocol: str) -> Iterator[str]:
    """Say what a reader of the table and the figures must know."""
    if max(map(len, arms.values())) > 1:
        yield "± is the standard deviation over runs."
    runs = [run for of_arm in arms.values() for run in of_arm]
    few = min(map(len, arms.values()))
    if few < FEWEST:
        yield f"An arm has {few} run{'' if few == 1 else 's'}: fewer than {FEWEST} decide nothing about training."
    if len({split_of(run) for run in runs}) == 1:
        yield (
            "All runs share one split of the data, so what is said holds for that split; give --split-seed another "
            "value to repeat it on others, and the claims are judged over all of them."
        )
    if all(has(run, "data.validation_fraction", 0) for run in runs):
        watched = any(has(run, "schedule.name", "plateau") or not has(run, "stopping.patience", 0) for run in runs)
        yield (
            "The protocol has no validation split: the best epoch is the best on the test set itself, which flatters "
            f"every arm{', and plateau and stopping watch the test set' if watched else ''}."
        )
    if protocol:
        yield f"Dotted: the post's own curves ({protocol}), one run an arm."


def _of_networks(study: Study, empty: Section, claims: Claims) -> Section:
    """Return a table of published networks: accuracy on images they weren't fitted to, where those are known, and all.

    A line a network and set of images.
    """
    rows: Rows = [("network", "top-1 of 1000 [95 % Wilson]", "among the classes present", "on", "images/s")]
    for run in complete(study.runs):
        seen = run.metrics.get("seen/images", 0)
        every = "test images" + (f", {seen:,.0f} of which it was trained on" if seen else "")
        for basis, which in (("unseen", "images that it was not trained on"), ("eval", every)):
            value, images = run.metrics.get(f"{basis}/top1_accuracy"), run.metrics.get(f"{basis}/images", 0.0)
            if value is None:
                continue
            count = int(images) if 0 < images < LARGEST else 0
            interval = wilson(round(value * count), count) if count and 0 <= value <= 1 else None
            shown = percent(value) + (f" [{percent(interval.low)} to {percent(interval.high)}]" if interval else "")
            present, rate = run.metrics.get(f"{basis}/top1_present"), run.metrics.get(EVALUATE_RATE)
            on = f"{count:,} {which}" if count else which
            rows.append((run.name, shown, _shown(present, percent), on, _shown(rate, whole)))
    return replace(empty, table=rows if len(rows) > 1 else [])


def _shown(value: float | None, text: Callable[[float], str]) -> str:
    return NONE if value is None else text(value)


def _of_search(study: Study, empty: Section, claims: Claims) -> Section:
    """Return the best trials of a search, and the test accuracy of the one that was chosen."""
    trials = sorted(study.runs, key=lambda run: -run.metrics.get("selected/val_accuracy", -math.inf))
    trials = [run for run in trials if "selected/val_accuracy" in run.metrics]
    if not trials:
        return empty
    names = [
        name
        for name in trials[0].params
        if "." in name and len({run.params.get(name) for run in trials}) > 1 and name != "random.seed"
    ]
    titles = (f"best {min(BEST_TRIALS, len(trials))} of {len(trials)}", *(run.name for run in trials[:BEST_TRIALS]))
    lines = [
        ("validation accuracy", *(percent(run.metrics["selected/val_accuracy"]) for run in trials[:BEST_TRIALS])),
        (
            "test accuracy",
            *(_shown(run.metrics.get("selected/test_accuracy"), percent) for run in trials[:BEST_TRIALS]),
        ),
        *((name, *(_number(run.params.get(name, "")) for run in trials[:BEST_TRIALS])) for name in names),
    ]
    outcomes = Counter(run.tags.get(OUTCOME, "unknown") for run in study.runs if run.status == "FINISHED")
    ended = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    parent = study.parent
    if parent is not None and parent.status == "FINISHED" and parent.ended > parent.started:
        ended += f"; {_duration((parent.ended - parent.started) / 1000)} from its first start to its end"
    notes = [
        f"Trials: {ended}.",
        "Trials are chosen on validation; the test set is looked at by the best one alone, after it was chosen.",
    ]
    return replace(empty, table=[titles, *lines], notes=notes)


def _number(text: str) -> str:
    try:
        return f"{float(text):.4g}"
    except ValueError:
        return text
