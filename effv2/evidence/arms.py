"""The arms of a study side by side: their table with intervals and differences, their figures, what to know of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from matplotlib.figure import Figure

from effv2.evidence.claims import FREE, Claims
from effv2.evidence.comparison import COLUMNS, NONE, Comparison, Rows, Told
from effv2.evidence.figures import accuracy_against_time, accuracy_curves, bars
from effv2.evidence.quantities import QUANTITIES, TEST, TRAIN, VALIDATION, percent, points
from effv2.evidence.reference import published_runs
from effv2.evidence.selection import Pair, complete, has, is_like, seed_of, split_of
from effv2.evidence.statistics import FEWEST, TINY, Sample, holm, p_text
from effv2.evidence.study import MAIN, Study, arm_of, has_figures
from effv2.tracking.read import RunRecord

MOST_COLUMNS = 8
LONGEST_END = 100  # characters that are shown of either end of a setting
INTERVALS = ("best/test_accuracy", "selected/test_accuracy")


def tell_arms(study: Study, title: str, claims: Claims) -> Told:
    """Tell of the arms of an ablation, a hyper-parameter check, or of single runs; `title` heads the figures."""
    arms: dict[str, list[RunRecord]] = {}
    for run in complete(study.in_order()):
        if has_figures(run):
            arms.setdefault(arm_of(run), []).append(run)
    if not arms:
        return Told()
    parts: list[str] = []
    if study.parent is None:
        arms, parts = _parted(arms)
    comparison = Comparison(arms)
    published, protocol = _published_curves(arms, claims)
    figures: dict[str, Figure] = {}
    held_out = ("test accuracy", TEST) if comparison.curves(TEST) else ("validation accuracy", VALIDATION)
    for name, metric in (held_out, ("train accuracy", TRAIN)):
        if curves := comparison.curves(metric):
            theirs = {arm: run.history[metric] for arm, run in published.items() if metric in run.history}
            figures[name] = accuracy_curves(curves, f"{title}: {name}", theirs)
    best, seconds = comparison.values("best/test_accuracy"), comparison.values("time/total_train_seconds")
    if best and seconds:
        figures["accuracy against time"] = accuracy_against_time(best, seconds, f"{title}: accuracy and time")
    if seconds:
        figures["training time"] = bars(seconds, f"{title}: training", "seconds")
    notes = [*parts, *_notes(arms, protocol)]
    if comparison.decisive == "selected/val_accuracy":
        notes.append("The test set was left alone: this is validation at its best epoch, which flatters every arm.")
    return Told(_table(comparison, study.baseline(arms)), figures, notes)


def _parted(arms: Mapping[str, Sequence[RunRecord]]) -> tuple[dict[str, list[RunRecord]], list[str]]:
    """Part single runs of one name that differ in more than seeds; return also in what the parts differ.

    Nobody planned them as repeats of each other. Of a seed that was repeated the last run counts.
    """
    parted: dict[str, list[RunRecord]] = {}
    notes: list[str] = []
    for arm, runs in arms.items():
        groups: dict[frozenset[tuple[str, str]], dict[Pair, RunRecord]] = {}
        for run in runs:
            groups.setdefault(frozenset(_settings(run)), {})[split_of(run), seed_of(run)] = run
        shared = frozenset.intersection(*groups)
        for number, (settings, of_it) in enumerate(groups.items(), 1):
            name = arm if len(groups) == 1 else f"{arm} ({number})"
            parted[name] = list(of_it.values())
            if own := sorted(settings - shared):
                words = ", ".join(f"{key} {_short(value) or 'empty'}" for key, value in own)
                notes.append(f"{name}: {words}.")
    return parted, notes


def _short(value: str) -> str:
    return value if len(value) <= 2 * LONGEST_END else f"{value[:LONGEST_END]} … {value[-LONGEST_END:]}"


def _settings(run: RunRecord) -> Iterator[tuple[str, str]]:
    """Return what runs that repeat each other have in common."""
    yield from ((name, value) for name, value in run.params.items() if "." in name and name not in FREE)
    yield from (
        (f"{context} images", f"{each.name}: {', '.join(each.classes)}") for context, each in run.images.items()
    )


def _table(comparison: Comparison, baseline: str) -> Rows:
    """Return the table with a line a figure and a column an arm, accuracies with their intervals.

    Many arms have a line each, and the main figures alone.
    """
    decisive = comparison.decisive
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
        (main if name in MAIN else others).extend(shown)
    return [*main, *others] if len(comparison.arms) <= MOST_COLUMNS else list(zip(*main, strict=True))


def _intervals(comparison: Comparison, name: str) -> Rows:
    """Return lines with the intervals of a quantity's mean and of one more run, where there are runs enough."""
    values, cells, what = comparison.values(name), [], QUANTITIES[name]
    for arm in comparison.arms:
        one_split = len({split_of(run) for run in comparison.arms[arm]}) == 1
        sample = Sample(tuple(values.get(arm, ())) if one_split else ())
        told = sample.n >= FEWEST and sample.deviation > TINY  # equal values don't show how much they vary
        found = (sample.interval(), sample.prediction()) if told else (None, None)
        inside = [each and each.within(what.possible) for each in found]
        cells.append([f"{percent(each.low)} to {percent(each.high)}" if each else NONE for each in inside])
    means, singles = zip(*cells, strict=True)
    lines = [
        (f"95 % interval of the mean, {what.words}", *means),
        (f"a single re-run is expected (95 %), {what.words}", *singles),
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


def _published_curves(arms: Mapping[str, Sequence[RunRecord]], claims: Claims) -> tuple[dict[str, RunRecord], str]:
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
