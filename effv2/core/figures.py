"""Figures of runs and reports, in colours that colour-blind readers can tell apart (Okabe & Ito 2008)."""

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from html import escape
from itertools import cycle
from typing import Any, TypeVar

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter
from scipy import stats

Curve = Mapping[int, float]  # by epoch
Step = TypeVar("Step", int, float)  # an epoch, or seconds
MOMENTS = 100  # at which a curve over time is drawn

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES: tuple[Any, ...] = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)))  # dotted are published curves
MARKERS = ("o", "s", "^", "D")
LONGEST_NAME = 30  # characters of a name in a figure
SIZE = (5.2, 3.6)  # inches: legible on a phone, two side by side on a screen
SVG = {"svg.fonttype": "none", "svg.hashsalt": "effv2", "font.family": "sans-serif", "font.size": 9}
TAG, NUMBER = re.compile(r"<[^>]+>"), re.compile(r"-?\d+\.\d{2,}")
# These changes fit an SVG file into a page: its colours become the page's variables, its text gets the page's font.
AS_PART = {
    r'<g id="patch_\d+">\s*<path [^>]*style="[^"]*fill: #ffffff[^"]*"/>\s*</g>': "",  # paper
    r"#(b0b0b0|cccccc)\b": "var(--line)",  # grid and legend
    r"#(000000|262626|333333|555555)\b": "var(--ink)",  # text, axes and ticks
    **{f"(?i){colour}": f"var(--c{index})" for index, colour in enumerate(PALETTE, 1)},
    r'<g id="(?!m)[a-z0-9_]+">': "<g>",
    r"font-family: [^;\"]*; ?": "",
    r"(?s)<style.*?</style>|\s*<metadata>.*?</metadata>": "",
}


class Drawing(Figure):
    """A figure that notebooks show, whether or not they use pyplot."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()


def plain(text: str) -> str:
    """Escape a text, so that matplotlib does not read it as mathematics."""
    return text.replace("$", r"\$")


def short(name: str) -> str:
    """Return a name that leaves room for the figure: both ends of a long one, because names often differ at the end."""
    half = LONGEST_NAME // 2
    return plain(name if len(name) <= LONGEST_NAME else f"{name[:half]}…{name[-half:]}")


def accuracy_curves(
    curves: Mapping[str, Sequence[Mapping[Step, float]]],
    title: str,
    published: Mapping[str, Curve] | None = None,
    over: str = "epoch",
) -> Figure:
    """Draw accuracy over epochs: per name, the mean of its runs in a band, the 95 % interval (the range of two runs).

    `published` curves of some of the names are dotted behind them, for as many epochs as ours have.
    """
    figure = Drawing(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot(title=plain(title), xlabel=over, ylabel="accuracy", ylim=(0, 1))
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
    """Draw (mean, low, high) of differences by name (NaN: none), filled if decided, and a band of `margin` around 0."""
    figure = Drawing(figsize=(SIZE[0], 1.2 + 0.34 * len(differences)), layout="constrained")
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
    """Draw means as bars, and ranges as lines across the ends of the bars."""
    figure = Drawing(figsize=(SIZE[0], 1.2 + 0.34 * len(values)), layout="constrained")
    axes = figure.add_subplot(title=plain(title), xlabel=unit)
    means, low, high = np.array([(np.mean(each), min(each), max(each)) for each in values.values()]).T
    reach = np.maximum(0, [means - low, high - means])  # the mean is rounded
    drawn = axes.barh(list(map(short, values)), means, xerr=reach, color=PALETTE[0], ecolor="#555555")
    axes.bar_label(drawn, fmt="%.3g", padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    return figure


def accuracy_against_time(curves: Mapping[str, Sequence[Mapping[float, float]]], title: str) -> Figure:
    """Draw accuracy over seconds of training as `accuracy_curves` does over epochs, straight between epochs.

    A line begins when all of its runs have an accuracy, and ends with the first run that ends.
    """
    drawn: dict[str, list[dict[float, float]]] = {}
    for name, runs in curves.items():
        moments = np.linspace(max(map(min, runs)), min(map(max, runs)), MOMENTS)
        values = (np.interp(moments, list(run), list(run.values())) for run in runs)
        drawn[name] = [dict(zip(moments.tolist(), each.tolist(), strict=True)) for each in values]
    return accuracy_curves(drawn, title, over="training, seconds")


def accuracy_against_cost(
    accuracies: Mapping[str, tuple[float, float, float]], costs: Mapping[str, tuple[float | None, float]], title: str
) -> Figure:
    """Draw accuracies (share, low, high) against GFLOPs and, if known, against measured time in ms per image."""
    figure = Drawing(figsize=(9, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    styles = ({"fmt": marker, "color": colour, "capsize": 3} for marker in cycle(MARKERS) for colour in PALETTE)
    for (label, (share, low, high)), style in zip(accuracies.items(), styles, strict=False):
        reach = [[100 * (share - low)], [100 * (high - share)]]
        for axes, cost in zip(panels, costs[label], strict=True):
            if cost:
                axes.errorbar(cost, 100 * share, yerr=reach, label=short(label), **style)
    for axes, unit in zip(panels, ("GFLOPs", "milliseconds, at full rate:"), strict=True):
        axes.set(xscale="log", xlabel=f"{unit} per image (log)")
        ticks = {"major_locator": LogLocator(subs=(1, 2, 5)), "minor_locator": NullLocator()}
        axes.xaxis.set(major_formatter=StrMethodFormatter("{x:g}"), **ticks)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy, %")
    figure.suptitle(title)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def svg_file(figure: Figure) -> str:
    """Return the figure as an SVG file. The same figure gives the same bytes."""
    text = io.StringIO()
    with matplotlib.rc_context(SVG), warnings.catch_warnings():  # type: ignore[arg-type]
        warnings.filterwarnings("ignore", message="Glyph")  # a name in a script that the font lacks
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return TAG.sub(lambda tag: NUMBER.sub(lambda found: f"{float(found[0]):.1f}", tag[0]), text.getvalue())


def svg_part(svg: str, label: str) -> str:
    """Turn an SVG file into an element of a page. Screen readers read `label`."""
    body = svg[svg.index("<svg") :]
    for pattern, ours in AS_PART.items():
        body = re.sub(pattern, ours, body)
    size = re.search(r'viewBox="[^"]*"', body)
    start = f'<svg role="img" aria-label="{escape(label)}" {size[0] if size else ""}'
    return start + body[body.index(">") :]
