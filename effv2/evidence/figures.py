"""Figures of studies, and how they become SVG: files of their own, or parts of a page in its light or dark colours."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from scipy import stats

from effv2.core.figures import PALETTE, SIZE, plain, value_range
from effv2.evidence.statistics import CONFIDENCE, FEWEST, Interval

MARKERS = ("o", "s", "^", "D")
SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "effv2", "font.family": "sans-serif", "font.size": 9}
INK = re.compile(r"#(000000|262626|333333|555555)\b")  # text, axes and ticks
FRAME = re.compile(r"#(b0b0b0|cccccc)\b")  # grid and legend
PAPER = re.compile(r'<g id="patch_\d+">\s*<path [^>]*style="[^"]*fill: #ffffff[^"]*"/>\s*</g>')
TAG = re.compile(r"<[^>]+>")
NUMBER = re.compile(r"-?\d+\.\d{2,}")


def mean_band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the 95 % interval of the mean of three runs or more (runs, epochs), the range of two."""
    if len(values) < FEWEST:
        return value_range(values)
    reach = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * values.std(0, ddof=1) / np.sqrt(len(values))
    return values.mean(0) - reach, values.mean(0) + reach


def bars(values: Mapping[str, Sequence[float]], title: str, unit: str) -> Figure:
    """Draw the mean of each name's values as a bar, their range as a line across its end."""
    figure = Figure(figsize=(SIZE[0], 1.2 + 0.34 * len(values)), layout="constrained")
    axes = figure.add_subplot()
    means, reach = zip(*map(_mean_and_reach, values.values()), strict=True)
    names, ends = list(map(plain, values)), np.hstack(reach)
    axes.bar_label(axes.barh(names, means, xerr=ends, color=PALETTE[0], ecolor="#555555"), fmt="%.3g", padding=4)
    axes.invert_yaxis()
    axes.set(title=plain(title), xlabel=unit)
    axes.margins(x=0.12)
    return figure


def accuracy_against_time(
    accuracies: Mapping[str, Sequence[float]], seconds: Mapping[str, Sequence[float]], title: str
) -> Figure:
    """Draw the mean accuracy of each name's runs against their mean training time, with the ranges of both."""
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    shared = [name for name in accuracies if name in seconds]
    for index, (name, colour) in enumerate(zip(shared, cycle(PALETTE), strict=False)):
        (across, sideways), (up, upright) = map(_mean_and_reach, (seconds[name], accuracies[name]))
        marker = MARKERS[index % len(MARKERS)]
        axes.errorbar(across, up, yerr=upright, xerr=sideways, fmt=marker, color=colour, label=plain(name))
    axes.set(title=plain(title), xlabel="training, seconds", ylabel="test accuracy, best epoch")
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize="small")
    return figure


def _mean_and_reach(values: Sequence[float]) -> tuple[float, np.ndarray]:
    """Return the mean, and how far it is to the lowest and to the highest value (2, 1)."""
    mean = float(np.mean(values))
    return mean, np.array([[mean - min(values)], [max(values) - mean]])


class CostPoint(NamedTuple):
    """A network's accuracy with its interval, as fractions, and what an image costs."""

    accuracy: float
    interval: Interval
    gflops: float
    milliseconds: float


def accuracy_against_cost(points: Mapping[str, CostPoint], title: str) -> Figure:
    """Draw accuracy with its 95 % interval against arithmetic and against measured time, both an image."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for index, ((name, point), colour) in enumerate(zip(points.items(), cycle(PALETTE), strict=False)):
        reach = [[100 * (point.accuracy - point.interval.low)], [100 * (point.interval.high - point.accuracy)]]
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


def svg_file(figure: Figure) -> str:
    """Return the figure as an SVG file, the same for the same figure."""
    text = io.StringIO()
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():  # type: ignore[arg-type]
        warnings.filterwarnings("ignore", message="Glyph")  # a name in a script that the font lacks
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return TAG.sub(lambda tag: NUMBER.sub(lambda found: f"{float(found[0]):.1f}", tag[0]), text.getvalue())


def inline_svg(svg: str, label: str) -> str:
    """Turn an SVG file into an element of a page, `label` being read to those who don't see it.

    Colours become the page's: `--ink`, `--line` and `--c1` on; text takes the page's font.
    """
    body = PAPER.sub("", svg[svg.index("<svg") :])
    body = INK.sub("var(--ink)", FRAME.sub("var(--line)", body))
    for index, colour in enumerate(PALETTE, 1):
        body = re.sub(re.escape(colour), f"var(--c{index})", body, flags=re.IGNORECASE)
    body = re.sub(r'<g id="(?!m)[a-z0-9_]+">', "<g>", body)
    body = re.sub(r"font-family: [^;\"]*; ?", "", body)
    body = re.sub(r"<style.*?</style>|\s*<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    size = re.search(r'viewBox="[^"]*"', body)
    return f'<svg role="img" aria-label="{label}" {size[0] if size else ""}{body[body.index(">") :]}'
