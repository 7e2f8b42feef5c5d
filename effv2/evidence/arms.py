"""The arms of a study side by side: their table with intervals and differences, their figures, what to know of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from effv2.core.figures import accuracy_curves
from effv2.evidence.claims import Claims
from effv2.evidence.figures import accuracy_against_time, bars, mean_band
from effv2.evidence.findings import published_runs
from effv2.evidence.quantities import CURVES, QUANTITIES, SHOWN, TRAIN_SECONDS, percent, points
from effv2.evidence.selection import SplitAndSeed, complete, has, is_like, pair_of, settings_of, split_of
from effv2.evidence.statistics import FEWEST, TINY, Estimate, holm, p_text
from effv2.evidence.study import (
    NONE,
    Rows,
    StudyResults,
    TrackedStudy,
    arm_of,
    has_figures,
    line_of,
    markdown_table,
    values_of,
)
from effv2.tracking.accuracies import BEST_TEST, SELECTED_TEST, SELECTED_VALIDATION, decisive_accuracy
from effv2.tracking.read import RunRecord
from effv2.tracking.tags import SEED

MOST_COLUMNS = 8
LONGEST_END = 100  # characters that are shown of either end of a setting
Arms = Mapping[str, Sequence[RunRecord]]


def arms_results(study: TrackedStudy, claims: Claims) -> StudyResults:
    """Return what came out of an ablation, a hyper-parameter check, or single runs."""
    found: dict[str, list[RunRecord]] = {}
    for run in complete(study.in_order()):
        if has_figures(run):
            found.setdefault(arm_of(run), []).append(run)
    if not found:
        return StudyResults(sentence="No accuracies yet.")
    arms, differences = (found, []) if study.parent is not None else _parted(found)
    decisive = decisive_accuracy([run for runs in arms.values() for run in runs])
    published, protocol = _published_curves(arms, claims)
    notes = [*differences, *_notes(arms, protocol)]
    if decisive == SELECTED_VALIDATION:
        notes.append("The test set was left alone: this is validation at its best epoch, which flatters every arm.")
    table = _table(arms, study.baseline(arms), decisive)
    return StudyResults(
        sentence=_sentence(arms, decisive),
        table=table,
        notes=notes,
        figures=_figures(arms, study.title, published),
        metrics=_means(arms),
        files={"comparison.csv": _rows(arms), "comparison.md": f"# {study.title}\n\n{markdown_table(table)}\n"},
    )


def _rows(arms: Arms) -> list[tuple[Any, ...]]:
    """Return plain numbers, a line a run, of the figures that any has."""
    named = [(arm, run) for arm, runs in arms.items() for run in runs]
    shown = [what for what in SHOWN.values() if any(what.value(run) is not None for _, run in named)]
    titles = ("variant", "seed", "run_id", *(what.words for what in shown))
    return [
        titles,
        *((arm, run.tags.get(SEED), run.run_id, *(what.value(run) for what in shown)) for arm, run in named),
    ]


def _means(arms: Arms) -> dict[str, float]:
    """Return the means of what runs log under that very name: accuracies and the time that training took."""
    logged = [name for name, what in SHOWN.items() if name == what.metric and not what.fixed]
    return {f"{arm}/{name}": statistics.fmean(each) for name in logged for arm, each in values_of(arms, name).items()}


def _sentence(arms: Arms, decisive: str) -> str:
    """Say which arm has the highest mean of the accuracy that decides, and that it is no verdict."""
    means = {arm: statistics.fmean(values) for arm, values in values_of(arms, decisive).items()}
    if not means:
        return "No accuracies yet."
    best = max(means, key=lambda arm: means[arm])
    count = len(arms[best])
    runs = "1 run" if count == 1 else f"mean of {count} runs"
    accuracy = f"{percent(means[best])} {QUANTITIES[decisive].words} ({runs})"
    return f"Highest: **{best}**, {accuracy}; the report says how sure that is."


def _figures(arms: Arms, title: str, published: Mapping[str, RunRecord]) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    for name, metric in CURVES.items():
        found = {arm: [run.history[metric] for run in runs if run.history.get(metric)] for arm, runs in arms.items()}
        curves = {arm: kept for arm, kept in found.items() if kept}
        if curves and not (name == "validation accuracy" and "test accuracy" in figures):
            theirs = {arm: run.history[metric] for arm, run in published.items() if metric in run.history}
            figures[name] = accuracy_curves(curves, f"{title}: {name}", theirs, mean_band)
    best, seconds = values_of(arms, BEST_TEST), values_of(arms, TRAIN_SECONDS)
    if best and seconds:
        figures["accuracy against time"] = accuracy_against_time(best, seconds, f"{title}: accuracy and time")
    if seconds:
        figures["training time"] = bars(seconds, f"{title}: training", "seconds")
    return figures


def _parted(arms: Arms) -> tuple[dict[str, list[RunRecord]], list[str]]:
    """Part single runs of one name that differ in more than seeds; return also in what the parts differ.

    Nobody planned them as repeats of each other. Of a seed that was repeated the last run counts.
    """
    parted: dict[str, list[RunRecord]] = {}
    notes: list[str] = []
    for arm, runs in arms.items():
        groups: dict[frozenset[tuple[str, str]], dict[SplitAndSeed, RunRecord]] = {}
        for run in runs:
            groups.setdefault(frozenset(settings_of(run)), {})[pair_of(run)] = run
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


def _table(arms: Arms, baseline: str, decisive: str) -> Rows:
    """Return the table with a line a figure and a column an arm, accuracies with their intervals.

    Many arms have a line each, and the main figures alone.
    """
    main: Rows = [("variant", *arms), ("runs", *(str(len(runs)) for runs in arms.values()))]
    more: Rows = []
    for name, what in SHOWN.items():
        lines = line_of(arms, name)
        if lines and name in (BEST_TEST, SELECTED_TEST, decisive):
            lines += _intervals(arms, name)
        if lines and name == decisive and baseline:
            lines += _differences(arms, baseline, name)
        (main if what.shown == "main" else more).extend(lines)
    return [*main, *more] if len(arms) <= MOST_COLUMNS else list(zip(*main, strict=True))


def _intervals(arms: Arms, name: str) -> Rows:
    """Return lines with the intervals of a quantity's mean and of one more run, where there are runs enough."""
    values, cells, what = values_of(arms, name), [], QUANTITIES[name]
    for arm, runs in arms.items():
        one_split = len(set(map(split_of, runs))) == 1
        estimate = Estimate(tuple(values.get(arm, ())) if one_split else ())
        told = estimate.n >= FEWEST and estimate.deviation > TINY  # equal values don't show how much they vary
        found = (estimate.interval(), estimate.prediction()) if told else (None, None)
        inside = [each and each.within(what.possible) for each in found]
        cells.append([f"{percent(each.low)} to {percent(each.high)}" if each else NONE for each in inside])
    means, singles = zip(*cells, strict=True)
    lines = [
        (f"95 % interval of the mean, {what.words}", *means),
        (f"a single re-run is expected (95 %), {what.words}", *singles),
    ]
    return [line for line in lines if set(line[1:]) != {NONE}]


def _differences(arms: Arms, baseline: str, name: str) -> Iterator[tuple[str, ...]]:
    """Return lines that hold each arm against its baseline, on the seeds that both have: difference and p-value.

    Nothing where there are several splits, whose runs don't count one by one; claims are judged over them.
    """
    if len({split_of(run) for runs in arms.values() for run in runs}) > 1:
        return
    what = QUANTITIES[name]
    values = {
        arm: {pair_of(run): value for run in runs if (value := what.value(run)) is not None}
        for arm, runs in arms.items()
    }
    against = {arm: _baseline_of(arm, arms, baseline) for arm in arms if arm != baseline}
    differences = {
        arm: Estimate(
            tuple(value - values[other][pair] for pair, value in values[arm].items() if pair in values[other])
        )
        for arm, other in against.items()
    }
    told = {arm: estimate for arm, estimate in differences.items() if estimate.n >= FEWEST}
    corrected = dict(zip(told, holm([estimate.p(0) for estimate in told.values()]), strict=True))
    for other in dict.fromkeys(against[arm] for arm in told):
        cells = dict.fromkeys(arms, "") | {
            arm: f"{points(estimate.mean)} [{100 * each.low:+.2f} to {100 * each.high:+.2f}]"
            for arm, estimate in told.items()
            if against[arm] == other and (each := estimate.interval()) is not None
        }
        yield f"less {other}, {what.words}, paired [95 %]", *cells.values()
        shown = [p_text(corrected[arm]) if arm in told and against[arm] == other else "" for arm in cells]
        yield f"p of that, after Holm for {len(told)}", *shown


def _baseline_of(arm: str, arms: Arms, baseline: str) -> str:
    """Return the arm that one is held against: the baseline under its own learning rate schedule, if there is one.

    So the two differ in one thing alone. The baseline itself under another schedule is held against the baseline.
    """
    schedules = {run.params.get("schedule.name", "") for run in arms[arm]}
    found = [name for schedule in schedules if (name := f"{baseline}_{schedule}") in arms and name != arm]
    return found[0] if len(found) == 1 else baseline


def _published_curves(arms: Arms, claims: Claims) -> tuple[dict[str, RunRecord], str]:
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


def _notes(arms: Arms, protocol: str) -> Iterator[str]:
    """Say what a reader of the table and the figures must know."""
    if max(map(len, arms.values())) > 1:
        yield "± is the standard deviation over runs."
    runs = [run for of_arm in arms.values() for run in of_arm]
    few = min(map(len, arms.values()))
    if few < FEWEST:
        yield f"An arm has {few} run{'' if few == 1 else 's'}: fewer than {FEWEST} decide nothing about training."
    if len(set(map(split_of, runs))) == 1:
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
