"""The report: what was claimed and what the runs decide, then every study, as one HTML page and a Markdown twin."""

from __future__ import annotations

import io
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from effv2.core.figures import PALETTE
from effv2.evidence.claims import Claims
from effv2.evidence.exports import Evidence
from effv2.evidence.judge import Finding, Judgement, Verdict, judge
from effv2.evidence.results import results_of
from effv2.evidence.statistics import p_text
from effv2.evidence.study import StudyResults

HTML, MARKDOWN, FIGURES = "report.html", "report.md", "figures"
SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "effv2", "font.family": "sans-serif", "font.size": 9}
INK = re.compile(r"#(000000|262626|333333|555555)\b")  # text, axes and ticks
FRAME = re.compile(r"#(b0b0b0|cccccc)\b")  # grid and legend
PAPER = re.compile(r'<g id="patch_\d+">\s*<path [^>]*style="[^"]*fill: #ffffff[^"]*"/>\s*</g>')
TAG = re.compile(r"<[^>]+>")
NUMBER = re.compile(r"-?\d+\.\d{2,}")


@dataclass(frozen=True)
class Report:
    """What came out in one sentence, a page, its Markdown twin and the figures that the twin shows, by file name."""

    summary: str
    own: Sequence[str]  # the verdicts of the user's own claims, a line each
    studies: Sequence[StudyResults]
    html: str
    markdown: str
    figures: Mapping[str, str]

    def write(self, folder: Path) -> None:
        """Write all of it, in the place of the figures that an earlier report shows there."""
        (folder / FIGURES).mkdir(parents=True, exist_ok=True)
        page = folder / MARKDOWN
        earlier = page.read_text(encoding="utf-8", errors="replace") if page.is_file() else ""
        for name in re.findall(rf"\]\({FIGURES}/(\d+-[a-z0-9-]+\.svg)\)", earlier):
            (folder / FIGURES / name).unlink(missing_ok=True)
        files = {HTML: self.html, MARKDOWN: self.markdown}
        for name, text in (files | {f"{FIGURES}/{name}": svg for name, svg in self.figures.items()}).items():
            (folder / name).write_text(text, encoding="utf-8")


def make_report(
    evidence: Evidence, claims: Claims, only_touched: bool = False, progress: Callable[[str], None] = lambda _: None
) -> Report:
    """Judge the claims on the evidence and write it up; with `only_touched`, those alone of which there are runs."""
    progress("judging claims")
    judgements = judge(claims, evidence.runs, evidence.right)
    shown = [each for each in judgements if not only_touched or each.tested or each.nearest]
    studies, drawn = results_of(evidence.runs, claims, evidence.right), []
    for number, study in enumerate(studies, 1):
        progress(f"drawing {study.title}")
        drawn.append({f"{number:02}-{_slug(name)}.svg": (name, _svg_file(f)) for name, f in study.figures.items()})
    values = {
        "evidence": evidence,
        "judgements": shown,
        "left_out": len(judgements) - len(shown),
        "title": studies[0].title if only_touched and studies else evidence.experiment,
        "summary": _summary(evidence, shown),
        "sections": list(zip(studies, drawn, strict=True)),
        "figures": FIGURES,
    }
    html, markdown = (_environment().get_template(f"{name}.j2").render(values) for name in (HTML, MARKDOWN))
    own = [f"{each.id} {each.verdict.value}: {reason(each)}" for each in shown if each.id in claims.own]
    figures = {name: svg for each in drawn for name, (_, svg) in each.items()}
    return Report(_summary(evidence, shown), own, studies, html, re.sub(r"\n{3,}", "\n\n", markdown), figures)


def _summary(evidence: Evidence, judgements: Sequence[Judgement]) -> str:
    counts = Counter(each.verdict for each in judgements)
    published = sum(each.on_published_alone for each in judgements)
    aside = {Verdict.UNDECIDED: f" ({published} of them on the published figures alone)"} if published else {}
    words = ", ".join(f"{counts[verdict]} {verdict.value}{aside.get(verdict, '')}" for verdict in Verdict)
    decided = f"of {len(judgements)} claims {words}" if judgements else "no published claim is about them"
    parents = {run.parent for run in evidence.runs}
    runs = sum(bool(run.metrics) and run.run_id not in parents for run in evidence.runs)
    return f"{runs} runs; {decided}"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("effv2.evidence"),
        autoescape=select_autoescape(["html", "html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cell": cell, "drawing": _inline, "reason": reason, "numbers": numbers, "slug": _slug}
    return environment


def cell(text: object) -> str:
    """Write a text into a cell of a Markdown table."""
    return " ".join(re.sub(r"<(?=[A-Za-z/!?])", "&lt;", re.sub(r"(\||(?<=\])\()", r"\\\1", str(text))).split())


def reason(judgement: Judgement) -> str:
    """Say in one sentence why the evidence decides what it does."""
    findings = judgement.findings
    if judgement.tested:
        counts = Counter(each.verdict for each in findings)
        words = ", ".join(f"{counts[verdict]} {verdict.value}" for verdict in Verdict if counts[verdict])
        text = f"of {len(findings)} things said {words}" if len(findings) > 1 else _estimated(findings[0])
        more = [each.lacking for each in findings if each.verdict == Verdict.UNDECIDED and each.lacking]
        return f"{text}; {more[0]}" if more else text
    text = "the published figures alone, one run each; not tested here" if judgement.on_published_alone else ""
    near_misses = list(dict.fromkeys(each.lacking for each in findings if each.lacking))
    lacking = f"needs {judgement.needs}" if judgement.needs else "; ".join(near_misses[:2]) or "no such runs yet"
    near = "; see the nearest evidence" if judgement.nearest else ""
    return "; ".join(filter(None, (text, lacking))) + near


def numbers(finding: Finding) -> list[str]:
    """Return what there is to say in numbers of one thing that a claim says."""
    published = f"published: {finding.published}" if finding.published else ""
    return list(filter(None, (published, _estimated(finding), finding.single, finding.lacking)))


def _estimated(finding: Finding) -> str:
    """Return what the runs say, with its p-values."""
    written = [p_text(p) for p in (finding.p, finding.corrected) if p is not None]
    if len(set(written)) > 1:
        return f"{finding.evidence}, {written[0]} ({written[1]} after Holm for {finding.tests} tests)"
    return ", ".join(filter(None, (finding.evidence, *written[:1])))


def _svg_file(figure: Figure) -> str:
    """Return the figure as an SVG file, the same for the same figure."""
    text = io.StringIO()
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():  # type: ignore[arg-type]
        warnings.filterwarnings("ignore", message="Glyph")  # a name in a script that the font lacks
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return TAG.sub(lambda tag: NUMBER.sub(lambda found: f"{float(found[0]):.1f}", tag[0]), text.getvalue())


def _inline(svg: str, label: str) -> Markup:
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
    start = f'<svg role="img" aria-label="{escape(label)}" {size[0] if size else ""}'
    return Markup(start + body[body.index(">") :])  # noqa: S704 (our own SVG, the label escaped)
