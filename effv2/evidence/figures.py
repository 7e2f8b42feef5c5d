"""Figures, in colours that survive colour blindness (Okabe & Ito 2008)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter
from scipy import stats

from effv2.evidence.statistics import CONFIDENCE, FEWEST

Curve = Mapping[int, float]  # by epoch

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES: tuple[Any, ...] = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)))  # dotted are published curves
MARKERS = ("o", "s", "^", "D")
CURVES = (5.2, 3.6)  # inches: legible on a phone, two side by side on a screen


def plain(text: str) -> str:
    """Keep matplotlib from reading a name as mathematics."""
    return text.replace("$", r"\$")


def accuracy_curves(
    curves: Mapping[str, Sequence[Curve]], title: str, published: Mapping[str, Curve] | None = None
) -> Figure:
    """Draw accuracy over epochs: a line a name, the mean of its runs, with a band around it.

    The band is the 95 % interval of the mean of three runs or more, the range of two. `published` curves of some of
    the names are dotted behind them, as far as ours go.
    """
    figure = Figure(figsize=CURVES, layout="constrained")
    axes = figure.add_subplot()
    for index, ((name, runs), colour) in enumerate(zip(curves.items(), cycle(PALETTE), strict=False)):
        epochs = sorted(set.intersection(*(set(run) for run in runs)))
        values = np.array([[run[epoch] for epoch in epochs] for run in runs])
        style = STYLES[index % len(STYLES)]
        marker = "o" if len(epochs) == 1 else None
        if published and name in published:
            theirs = {epoch: value for epoch, value in published[name].items() if epoch <= max(epochs, default=0)}
            axes.plot(list(theirs), list(theirs.values()), ":", color=colour, linewidth=1, alpha=0.8)
        axes.plot(epochs, values.mean(0), linestyle=style, color=colour, label=plain(name), marker=marker)
        if len(runs) > 1:
            low, high = _band(values)
            axes.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set(title=plain(title), xlabel="epoch", ylabel="accuracy", ylim=(0, 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize="small")
    return figure


def _band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both ends of the band around the mean of runs (runs, epochs)."""
    runs = len(values)
    if runs < FEWEST:
        return values.min(0), values.max(0)
    reach = stats.t.ppf((1 + CONFIDENCE) / 2, runs - 1) * values.std(0, ddof=1) / np.sqrt(runs)
    return values.mean(0) - reach, values.mean(0) + reach


def bars(values: Mapping[str, Sequence[float]], title: str, unit: str) -> Figure:
    """Draw the mean of each name's values as a bar, their range as a line across its end."""
    figure = Figure(figsize=(CURVES[0], 1.2 + 0.34 * len(values)), layout="constrained")
    axes = figure.add_subplot()
    means = [float(np.mean(runs)) for runs in values.values()]
    reach = [
        [mean - min(runs) for mean, runs in zip(means, values.values(), strict=True)],
        [max(runs) - mean for mean, runs in zip(means, values.values(), strict=True)],
    ]
    drawn = axes.barh(list(map(plain, values)), means, xerr=reach, color=PALETTE[0], ecolor="#555555")
    axes.bar_label(drawn, fmt="%.3g", padding=4)
    axes.invert_yaxis()
    axes.set(title=plain(title), xlabel=unit)
    axes.margins(x=0.12)
    return figure


def accuracy_against_time(
    accuracies: Mapping[str, Sequence[float]], seconds: Mapping[str, Sequence[float]], title: str
) -> Figure:
    """Draw the mean accuracy of each name's runs against their mean training time, with the ranges of both."""
    figure = Figure(figsize=CURVES, layout="constrained")
    axes = figure.add_subplot()
    shared = [name for name in accuracies if name in seconds]
    for index, (name, colour) in enumerate(zip(shared, cycle(PALETTE), strict=False)):
        across, up = np.array(seconds[name]), np.array(accuracies[name])
        sideways, upright = ([[each.mean() - each.min()], [each.max() - each.mean()]] for each in (across, up))
        marker = MARKERS[index % len(MARKERS)]
        axes.errorbar(
            across.mean(), up.mean(), yerr=upright, xerr=sideways, fmt=marker, color=colour, label=plain(name)
        )
    axes.set(title=plain(title), xlabel="training, seconds", ylabel="test accuracy, best epoch")
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize="small")
    return figure


@dataclass(frozen=True)
class CostPoint:
    """A network's accuracy with its interval, as fractions, and what an image costs."""

    accuracy: float
    low: float
    high: float
    gflops: float
    milliseconds: float


def accuracy_against_cost(points: Mapping[str, CostPoint], title: str) -> Figure:
    """Draw accuracy with its 95 % interval against arithmetic and against measured time, both an image."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for index, ((name, point), colour) in enumerate(zip(points.items(), cycle(PALETTE), strict=False)):
        reach = [[100 * (point.accuracy - point.low)], [100 * (point.high - point.accuracy)]]
        marker = MARKERS[index // len(PALETTE) % len(MARKERS)]
        for axes, cost in ((left, point.gflops), (right, point.milliseconds)):
            drawn = {"fmt": marker, "color": colour, "capsize": 3, "label": plain(name)}
            axes.errorbar(cost, 100 * point.accuracy, yerr=reach, **drawn)
    for axes, unit in ((left, "GFLOPs an image (log)"), (right, "milliseconds an image, at full rate (log)")):
        axes.set(xscale="log", xlabel=unit)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
    left.set_ylabel("accuracy, %")
    figure.suptitle(plain(title))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def confusion_figure(matrix: np.ndarray, columns: Sequence[str]) -> Figure:
    """Draw a confusion matrix, rows being true classes and colours the share of the row."""
    columns = list(map(plain, columns))
    rows = columns[: len(matrix)]
    side = min(14.0, 2.5 + 0.38 * len(columns))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(columns)), columns, rotation=90)
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel="predicted", ylabel="true")
    if len(columns) <= 30:
        for (row, column), count in np.ndenumerate(matrix):
            colour = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=7)
    return figure
