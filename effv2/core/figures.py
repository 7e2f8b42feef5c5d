"""Figures that runs and reports share, in colours that survive colour blindness (Okabe & Ito 2008)."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy import stats

Curve = Mapping[int, float]  # by epoch

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES: tuple[Any, ...] = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)))  # dotted are published curves
MARKERS = ("o", "s", "^", "D")
LONGEST_NAME = 30  # characters of a name in a figure
SIZE = (5.2, 3.6)  # inches: legible on a phone, two side by side on a screen


def plain(text: str) -> str:
    """Keep matplotlib from reading a text as mathematics."""
    return text.replace("$", r"\$")


def short(name: str) -> str:
    """Return a name that leaves room for the figure: of a long one both ends, as names often differ in the last."""
    half = LONGEST_NAME // 2
    return plain(name if len(name) <= LONGEST_NAME else f"{name[:half]}…{name[-half:]}")


def accuracy_curves(
    curves: Mapping[str, Sequence[Curve]], title: str, published: Mapping[str, Curve] | None = None
) -> Figure:
    """Draw accuracy over epochs: a line a name, the mean of its runs, in a band: its 95 % interval, of two the range.

    `published` curves of some of the names are dotted behind them, as far as ours go.
    """
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot(title=plain(title), xlabel="epoch", ylabel="accuracy", ylim=(0, 1))
    for index, ((name, runs), colour) in enumerate(zip(curves.items(), cycle(PALETTE), strict=False)):
        epochs = sorted(set.intersection(*(set(run) for run in runs)))
        values = np.array([[run[epoch] for epoch in epochs] for run in runs])
        style, marker = STYLES[index % len(STYLES)], "o" if len(epochs) == 1 else None
        if published and name in published:
            theirs = {epoch: value for epoch, value in published[name].items() if epoch <= max(epochs, default=0)}
            axes.plot(list(theirs), list(theirs.values()), ":", color=colour, linewidth=1, alpha=0.8)
        axes.plot(epochs, values.mean(0), linestyle=style, color=colour, label=short(name), marker=marker)
        if len(runs) > 1:
            reach = stats.t.ppf(0.975, len(runs) - 1) * values.std(0, ddof=1) / np.sqrt(len(runs))
            low, high = values.mean(0) - reach, values.mean(0) + reach
            ends = (low, high) if len(runs) > 2 else (values.min(0), values.max(0))
            axes.fill_between(epochs, *ends, color=colour, alpha=0.15, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize="small")
    return figure


def forest(
    differences: Mapping[str, tuple[float, float, float, bool]], title: str, unit: str, margin: float = 0.0
) -> Figure:
    """Draw differences by name: mean, low and high end (NaN: none), and whether it is decided, which is drawn filled.

    A band shows the `margin` within which differences don't matter.
    """
    figure = Figure(figsize=(SIZE[0], 1.2 + 0.34 * len(differences)), layout="constrained")
    axes = figure.add_subplot(title=plain(title), xlabel=plain(unit))
    if margin:
        axes.axvspan(-margin, margin, color="#b0b0b0", alpha=0.4, linewidth=0)
    axes.axvline(0, color="#555555", linewidth=1)
    for place, (mean, low, high, decided) in enumerate(differences.values()):
        style: dict[str, Any] = {"color": PALETTE[0], "markersize": 7, "fillstyle": "full" if decided else "none"}
        axes.plot([low, high], [place, place], color=PALETTE[0], linewidth=2 if decided else 1)
        axes.plot([mean], [place], marker="o", **style)
    axes.set_yticks(range(len(differences)), list(map(short, differences)))
    axes.set_ylim(len(differences) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    return figure


def bars(values: Mapping[str, Sequence[float]], title: str, unit: str) -> Figure:
    """Draw means as bars, ranges as lines across their ends."""
    figure = Figure(figsize=(SIZE[0], 1.2 + 0.34 * len(values)), layout="constrained")
    axes = figure.add_subplot(title=plain(title), xlabel=unit)
    means, reach = zip(*map(_spread, values.values()), strict=True)
    drawn = axes.barh(list(map(short, values)), means, xerr=np.hstack(reach), color=PALETTE[0], ecolor="#555555")
    axes.bar_label(drawn, fmt="%.3g", padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    return figure


def accuracy_against_time(
    accuracies: Mapping[str, Sequence[float]], seconds: Mapping[str, Sequence[float]], title: str
) -> Figure:
    """Draw the mean test accuracy of each name against its mean training time, with the ranges of both."""
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot(title=plain(title), xlabel="training, seconds", ylabel="test accuracy, best epoch")
    both = [name for name in accuracies if name in seconds]
    for name, colour, marker in zip(both, cycle(PALETTE), cycle(MARKERS), strict=False):
        (across, sideways), (up, upright) = _spread(seconds[name]), _spread(accuracies[name])
        axes.errorbar(across, up, yerr=upright, xerr=sideways, fmt=marker, color=colour, label=short(name))
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize="small")
    return figure


def _spread(values: Sequence[float]) -> tuple[float, np.ndarray]:
    """Return the mean of values, and how far it is to the lowest and to the highest of them (2, 1)."""
    mean = float(np.mean(values))
    return mean, np.array([[mean - min(values)], [max(values) - mean]])
