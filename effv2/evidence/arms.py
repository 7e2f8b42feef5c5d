"""The arms of a study side by side: their table with intervals and differences, their figures, what to know of them."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle, product

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from effv2.core.figures import MARKERS, PALETTE, SIZE, accuracy_curves, plain, value_range
from effv2.evidence.claims import Claims
from effv2.evidence.protocols import complete, counted, has, is_like, pair_of, published_runs, settings_of, split_of
from effv2.evidence.quantities import CURVES, QUANTITIES, TRAIN_SECONDS, Quantity, percent, points, shown_for
from effv2.evidence.statistics import CONFIDENCE, FEWEST, TINY, Estimate, holm, p_text
from effv2.evidence.study import NO_STUDY, NONE, Rows, StudyResults, TrackedStudy, has_figures, line_of, values_of
from effv2.tracking.read import BEST_TEST, SELECTED_TEST, SELECTED_VALIDATION, RunRecord, decisive_accuracy
from effv2.tracking.tags import ARM, SEED, STUDY

NOTHING_YET = "No accuracies yet."
MOST_COLUMNS = 8
LONGEST_END = 100  # characters that are shown of either end of a setting
Arms = Mapping[str, Sequence[RunRecord]]
Spread = tuple[float, np.ndarray]  # a mean, and how far it is to the lowest and the highest value (2, 1)


def arms_results(study: TrackedStudy, claims: Claims) -> StudyResults:
    """Return what came out of an ablation, a hyper-parameter check, or single runs."""
    found: dict[str, list[RunRecord]] = {}
    for run in filter(has_figures, complete(study.in_order())):
        arm = run.tags.get(ARM) or run.tags.get(STUDY) or run.params.get("model.variant") or run.name
        found.setdefault(arm, []).append(run)
    if not found:
        return StudyResults(sentence=NOTHING_YET)
    arms, differences = _parted(found) if study.parent is NO_STUDY else (found, [])
    own = study.parent.params.get("study.baseline", "")
    baseline = "" if study.parent is NO_STUDY else own if own in arms else next(iter(arms))
    named = [(arm, run) for arm, runs in arms.items() for run in runs]
    quantities = shown_for(run for _, run in named)
    shown = [what for what in quantities.values() if what.values(run for _, run in named)]
    rows = [(arm, run.tags.get(SEED), run.run_id, *(what.value(run) for what in shown)) for arm, run in named]
    decisive = decisive_accuracy([run for _, run in named])
    published, protocol = _published_curves(arms, claims)
    return StudyResults(
        sentence=_sentence(arms, decisive),
        table=_table(arms, baseline, decisive),
        notes=[*differences, *_notes(arms, protocol, decisive)],
        figures=_figures(arms, study.parent.name, published),
        # Of what runs log under that very name: accuracies and the time that training took.
        metrics={
            f"{arm}/{name}": statistics.fmean(values)
            for name, what in quantities.items()
            if not what.metric and not what.fixed
            for arm, values in values_of(arms, name).items()
        },
        document="comparison.md",
        files={"comparison.csv": [("variant", "seed", "run_id", *(what.words for what in shown)), *rows]},
    )


def _sentence(arms: Arms, decisive: str) -> str:
    """Say which arm has the highest mean of the accuracy that decides, and that it is no verdict."""
    means = {arm: statistics.fmean(values) for arm, values in values_of(arms, decisive).items()}
    if not means:
        return NOTHING_YET
    best = max(means, key=lambda arm: means[arm])
    runs = "1 run" if len(arms[best]) == 1 else f"mean of {len(arms[best])} runs"
    words = f"{percent(means[best])} {QUANTITIES[decisive].words} ({runs})"
    return f"Highest: **{best}**, {words}; the report says how sure that is."


def _figures(arms: Arms, title: str, published: Mapping[str, RunRecord]) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    for name, metric in CURVES.items():
        found = {arm: [run.history[metric] for run in runs if run.history.get(metric)] for arm, runs in arms.items()}
        curves = {arm: kept for arm, kept in found.items() if kept}
        if curves and not (name == "validation accuracy" and "test accuracy" in figures):
            theirs = {arm: run.history[metric] for arm, run in published.items() if metric in run.history}
            figures[name] = accuracy_curves(curves, f"{title}: {name}", theirs, _mean_band)
    best, seconds = ({a: _spread(v) for a, v in values_of(arms, name).items()} for name in (BEST_TEST, TRAIN_SECONDS))
    if best and seconds:
        figures["accuracy against time"] = _accuracy_against_time(best, seconds, f"{title}: accuracy and time")
    if seconds:
        figures["training time"] = _bars(seconds, f"{title}: training")
    return figures


def _mean_band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the 95 % interval of the mean of three runs or more (runs, epochs), the range of two."""
    if len(values) < FEWEST:
        return value_range(values)
    reach = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * values.std(0, ddof=1) / np.sqrt(len(values))
    return values.mean(0) - reach, values.mean(0) + reach


def _spread(values: Sequence[float]) -> Spread:
    mean = float(np.mean(values))
    return mean, np.array([[mean - min(values)], [max(values) - mean]])


def _bars(spreads: Mapping[str, Spread], title: str) -> Figure:
    """Draw means as bars, ranges as lines across their ends."""
    figure = Figure(figsize=(SIZE[0], 1.2 + 0.34 * len(spreads)), layout="constrained")
    axes = figure.add_subplot()
    means, reach = zip(*spreads.values(), strict=True)
    bars = axes.barh(list(map(plain, spreads)), means, xerr=np.hstack(reach), color=PALETTE[0], ecolor="#555555")
    axes.bar_label(bars, fmt="%.3g", padding=4)
    axes.invert_yaxis()
    axes.set(title=plain(title), xlabel="seconds")
    axes.margins(x=0.12)
    return figure


def _accuracy_against_time(best: Mapping[str, Spread], seconds: Mapping[str, Spread], title: str) -> Figure:
    """Draw the mean accuracy of each arm's runs against their mean training time, with the ranges of both."""
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    for index, (name, colour) in enumerate(zip((arm for arm in best if arm in seconds), cycle(PALETTE), strict=False)):
        (across, sideways), (up, upright) = seconds[name], best[name]
        marker = MARKERS[index % len(MARKERS)]
        axes.errorbar(across, up, yerr=upright, xerr=sideways, fmt=marker, color=colour, label=plain(name))
    axes.set(title=plain(title), xlabel="training, seconds", ylabel="test accuracy, best epoch")
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize="small")
    return figure


def _parted(arms: Arms) -> tuple[dict[str, list[RunRecord]], list[str]]:
    """Part single runs of one name that differ in more than seeds; return also in what the parts differ.

    Nobody planned them as repeats of each other. Of a seed that was repeated the last run counts.
    """
    parted, notes = dict[str, list[RunRecord]](), list[str]()
    for arm, runs in arms.items():
        groups: dict[frozenset[tuple[str, str]], dict[tuple[str, str], RunRecord]] = {}  # by settings and pair
        for run in runs:
            groups.setdefault(settings_of(run), {})[pair_of(run)] = run
        shared = frozenset.intersection(*groups)
        for number, (settings, of_it) in enumerate(groups.items(), 1):
            name = arm if len(groups) == 1 else f"{arm} ({number})"
            parted[name] = list(of_it.values())
            own = []
            for key, value in sorted(settings - shared):
                ends = f"{value[:LONGEST_END]} … {value[-LONGEST_END:]}" if len(value) > 2 * LONGEST_END else value
                own.append(f"{key} {ends or 'empty'}")
            notes += [f"{name}: {', '.join(own)}."] if own else []
    return parted, notes


def _table(arms: Arms, baseline: str, decisive: str) -> Rows:
    """Return a line a figure and a column an arm, accuracies with intervals; of many arms a line each, main figures."""
    main: Rows = [("variant", *arms), ("runs", *(str(len(runs)) for runs in arms.values()))]
    more: Rows = []
    for name, what in shown_for(run for runs in arms.values() for run in runs).items():
        lines = line_of(arms, name)
        if lines and name in (BEST_TEST, SELECTED_TEST, decisive):
            lines += _intervals(arms, what)
        if lines and name == decisive and baseline:
            lines += _differences(arms, baseline, what)
        (main if what.shown == "main" else more).extend(lines)
    return [*main, *more] if len(arms) <= MOST_COLUMNS else list(zip(*main, strict=True))


def _intervals(arms: Arms, what: Quantity) -> Rows:
    """Return lines with the intervals of a quantity's mean and of one more run, where there are runs enough.

    Equal values don't show how much they vary, and runs of several splits don't count one by one.
    """
    lines = ["95 % interval of the mean"], ["a single re-run is expected (95 %)"]
    for runs in arms.values():
        estimate = Estimate(what.values(runs) or [math.nan])
        enough = estimate.n >= FEWEST and estimate.deviation > TINY and len(set(map(split_of, runs))) == 1
        for line, interval in zip(lines, (estimate.interval(), estimate.prediction()), strict=True):
            line.append(interval.within(what.possible).text(percent) if enough else NONE)
    return [(f"{words}, {what.words}", *cells) for words, *cells in lines if set(cells) != {NONE}]


def _differences(arms: Arms, baseline: str, what: Quantity) -> Iterator[tuple[str, ...]]:
    """Return lines that hold each arm against its baseline, on the seeds that both have: difference and p-value.

    An arm is held against the baseline under its own learning rate schedule, if there is one, so that the two differ in
    one thing alone. Nothing where there are several splits, whose runs don't count one by one; claims are judged so.
    """
    if len({split_of(run) for runs in arms.values() for run in runs}) > 1:
        return
    values = {arm: {pair_of(run): value for run in runs for value in what.values([run])} for arm, runs in arms.items()}
    tests: dict[tuple[str, str], Estimate] = {}
    for arm, runs in arms.items():
        own = {f"{baseline}_{run.params.get('schedule.name', '')}" for run in runs} & arms.keys() - {arm}
        other = own.pop() if len(own) == 1 else baseline
        pairs = [pair for pair in values[arm] if pair in values[other]]
        if arm != baseline and len(pairs) >= FEWEST:
            tests[other, arm] = Estimate([values[arm][pair] - values[other][pair] for pair in pairs])
    corrected = dict(zip(tests, holm([estimate.p(0) for estimate in tests.values()]), strict=True))
    for other in dict.fromkeys(against for against, _ in tests):
        found = [tests.get((other, arm)) for arm in arms]
        cells = [f"{points(e.mean)} [{e.interval().text(lambda x: f'{100 * x:+.2f}')}]" if e else "" for e in found]
        yield f"less {other}, {what.words}, paired [95 %]", *cells
        ps = [p_text(corrected[other, arm]) if (other, arm) in tests else "" for arm in arms]
        yield f"p of that, after Holm for {len(tests)}", *ps


def _published_curves(arms: Arms, claims: Claims) -> tuple[dict[str, RunRecord], str]:
    """Return the published runs of arms that follow a published protocol, or come near it, and the protocol's name."""
    for source, published in published_runs().items():
        for name in filter(None, (source, claims.protocols[source].nearest)):
            follows = partial(is_like, protocol=claims.protocols[name])
            pairs = product(arms, published)
            found = {arm: published[their] for arm, their in pairs if all(follows(run, arm=their) for run in arms[arm])}
            if found:
                return found, source
    return {}, ""


def _notes(arms: Arms, protocol: str, decisive: str) -> Iterator[str]:
    """Say what a reader of the table and the figures must know."""
    runs = [run for of_arm in arms.values() for run in of_arm]
    if len(runs) > len(arms):
        yield "± is the standard deviation over runs."
    if (few := min(map(len, arms.values()))) < FEWEST:
        yield f"An arm has {counted(few, 'run')}: fewer than {FEWEST} decide nothing about training."
    if len(set(map(split_of, runs))) == 1:
        yield (
            "All runs share one split of the data, so what is said holds for that split; another data.split_seed "
            "repeats it on others, and the claims are judged over all of them."
        )
    if all(has(run, "data.validation_fraction", 0) for run in runs):
        watched = any(has(run, "schedule.name", "plateau") or not has(run, "stopping.patience", 0) for run in runs)
        yield (
            "The protocol has no validation split: the best epoch is the best on the test set itself, which flatters "
            f"every arm{', and plateau and stopping watch the test set' if watched else ''}."
        )
    if protocol:
        yield f"Dotted: the post's own curves ({protocol}), one run an arm."
    if decisive == SELECTED_VALIDATION:
        yield "The test set was left alone: this is validation at its best epoch, which flatters every arm."
