"""Figures, in colours that survive colour blindness (Okabe & Ito 2008)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D")
Curve = Mapping[int, float]


def plain(text: str) -> str:
    """Keep matplotlib from reading a name as mathematics."""
    return text.replace("$", r"\$")


def accuracy_curves(curves: Mapping[str, Sequence[Curve]], title: str) -> Figure:
    """Draw accuracy over epochs: a line a name, the mean of its runs, with the range over runs as a band."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for index, ((name, runs), colour) in enumerate(zip(curves.items(), cycle(PALETTE), strict=False)):
        epochs = sorted(set.intersection(*(set(run) for run in runs)))
        values = np.array([[run[epoch] for epoch in epochs] for run in runs])
        style = STYLES[index // len(PALETTE) % len(STYLES)]
        marker = "o" if len(epochs) == 1 else None
        axes.plot(epochs, values.mean(0), style, color=colour, label=plain(name), marker=marker)
        if len(runs) > 1:
            axes.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
    axes.set(title=title, xlabel="epoch", ylabel="accuracy", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure


def bars(values: Mapping[str, Sequence[float]], title: str, unit: str) -> Figure:
    """Draw the mean of each name's values as a bar, their range as a line across its end."""
    figure = Figure(figsize=(7, 1.2 + 0.34 * len(values)), layout="constrained")
    axes = figure.add_subplot()
    means = [float(np.mean(runs)) for runs in values.values()]
    reach = [
        [mean - min(runs) for mean, runs in zip(means, values.values(), strict=True)],
        [max(runs) - mean for mean, runs in zip(means, values.values(), strict=True)],
    ]
    drawn = axes.barh(list(map(plain, values)), means, xerr=reach, color=PALETTE[0], ecolor="#555555")
    axes.bar_label(drawn, fmt="%.3g", padding=4)
    axes.invert_yaxis()
    axes.set(title=title, xlabel=unit)
    axes.margins(x=0.12)
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
    figure.suptitle(title)
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
