"""Figures as SVG: files of their own, or parts of a page that follow its light or dark colours."""

from __future__ import annotations

import io
import re
import warnings

import matplotlib
from matplotlib.figure import Figure

from effv2.evidence.figures import PALETTE

SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "effv2", "font.family": "sans-serif", "font.size": 9}
INK = re.compile(r"#(000000|262626|333333|555555)\b")  # text, axes and ticks
FRAME = re.compile(r"#(b0b0b0|cccccc)\b")  # grid and legend
PAPER = re.compile(r'<g id="patch_\d+">\s*<path [^>]*style="[^"]*fill: #ffffff[^"]*"/>\s*</g>')
TAG = re.compile(r"<[^>]+>")
NUMBER = re.compile(r"-?\d+\.\d{2,}")


def as_file(figure: Figure) -> str:
    """Return the figure as an SVG file, the same for the same figure."""
    text = io.StringIO()
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():  # type: ignore[arg-type]
        warnings.filterwarnings("ignore", message="Glyph")  # a name in a script that the font lacks
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return TAG.sub(lambda tag: NUMBER.sub(lambda found: f"{float(found[0]):.1f}", tag[0]), text.getvalue())


def inline(svg: str, label: str) -> str:
    """Turn an SVG file into an element of a page, `label` being read to those who don't see it.

    Colours become the page's: `--ink`, `--line` and `--c1` on; text takes the page's font.
    """
    body = svg[svg.index("<svg") :]
    body = PAPER.sub("", body)
    body = INK.sub("var(--ink)", FRAME.sub("var(--line)", body))
    for index, colour in enumerate(PALETTE, 1):
        body = re.sub(re.escape(colour), f"var(--c{index})", body, flags=re.IGNORECASE)
    body = re.sub(r'<g id="(?!m)[a-z0-9_]+">', "<g>", body)
    body = re.sub(r"font-family: [^;\"]*; ?", "", body)
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    size = re.search(r'viewBox="[^"]*"', body)
    body = f'<svg role="img" aria-label="{label}" {size[0] if size else ""}{body[body.index(">") :]}'
    return re.sub(r"\s*<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
