"""The report: what was claimed and what the runs decide, then every study, as one HTML page and a Markdown twin."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

from effv2.evidence.claims import Claims
from effv2.evidence.judge import Finding, Judgement, Verdict, judge
from effv2.evidence.sections import Section, sections_of
from effv2.evidence.sources import Evidence
from effv2.evidence.statistics import p_text
from effv2.evidence.svg import as_file, inline

HTML, MARKDOWN, FIGURES = "report.html", "report.md", "figures"
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Report:
    """What came out in one sentence, a page, its Markdown twin and the figures that the twin shows, by file name."""

    summary: str
    own: Sequence[str]  # the verdicts of the user's own claims, a line each
    html: str
    markdown: str
    figures: Mapping[str, str]

    def write(self, folder: Path) -> None:
        """Write all of it, in the place of the figures that an earlier report shows there."""
        (folder / FIGURES).mkdir(parents=True, exist_ok=True)
        earlier = (
            (folder / MARKDOWN).read_text(encoding="utf-8", errors="replace") if (folder / MARKDOWN).is_file() else ""
        )
        for name in re.findall(rf"\]\({FIGURES}/(\d+-[a-z0-9-]+\.svg)\)", earlier):
            (folder / FIGURES / name).unlink(missing_ok=True)
        (folder / HTML).write_text(self.html, encoding="utf-8")
        (folder / MARKDOWN).write_text(self.markdown, encoding="utf-8")
        for name, svg in self.figures.items():
            (folder / FIGURES / name).write_text(svg, encoding="utf-8")


@dataclass(frozen=True)
class Drawn:
    """A section with its figures as SVG, by file name, and the words that name them."""

    section: Section
    figures: Mapping[str, tuple[str, str]]


def make_report(
    evidence: Evidence, claims: Claims, only_touched: bool = False, progress: Progress = lambda _: None
) -> Report:
    """Judge the claims on the evidence and write it up; with `only_touched`, those alone of which there are runs."""
    progress("judging claims")
    judgements = judge(claims, evidence.runs, evidence.right)
    untouched = [each for each in judgements if not (each.tested or each.nearest)]
    shown = [each for each in judgements if each not in untouched] if only_touched else judgements
    drawn = []
    for number, made in enumerate(sections_of(evidence.runs, claims), 1):
        progress(f"drawing {made.title}")
        figures = {f"{number:02}-{_slug(name)}.svg": (name, as_file(f)) for name, f in made.figures.items()}
        drawn.append(Drawn(made, figures))
    summary = _summary(evidence, shown)
    values = {
        "evidence": evidence,
        "judgements": shown,
        "left_out": len(judgements) - len(shown),
        "title": drawn[0].section.title if only_touched and drawn else evidence.experiment,
        "summary": summary,
        "sections": drawn,
        "figures": FIGURES,
    }
    environment = _environment()
    html = environment.get_template("report.html.j2").render(values)
    markdown = environment.get_template("report.md.j2").render(values)
    files = {name: svg for each in drawn for name, (_, svg) in each.figures.items()}
    own = [f"{each.id} {each.verdict.value}: {reason(each)}" for each in shown if each.id in claims.own]
    return Report(summary, own, html, re.sub(r"\n{3,}", "\n\n", markdown), files)


def _summary(evidence: Evidence, judgements: Sequence[Judgement]) -> str:
    counts = Counter(each.verdict for each in judgements)
    alone = sum(each.on_published_alone for each in judgements)
    aside = {Verdict.UNDECIDED: f" ({alone} of them on the published figures alone)"} if alone else {}
    words = ", ".join(f"{counts[verdict]} {verdict.value}{aside.get(verdict, '')}" for verdict in Verdict)
    said = f"of {len(judgements)} claims {words}" if judgements else "no published claim is about them"
    parents = {run.parent for run in evidence.runs}
    runs = sum(bool(run.metrics) and run.run_id not in parents for run in evidence.runs)
    return f"{runs} runs; {said}"


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
    environment.filters |= {"cell": cell, "drawing": _drawing, "reason": reason, "numbers": numbers, "slug": _slug}
    return environment


def cell(text: object) -> str:
    """Write a text into a cell of a Markdown table."""
    return " ".join(re.sub(r"<(?=[A-Za-z/!?])", "&lt;", re.sub(r"(\||(?<=\])\()", r"\\\1", str(text))).split())


def _drawing(svg: str, label: str) -> Markup:
    return Markup(inline(svg, str(escape(label))))  # noqa: S704 (our own SVG, the label escaped)


def reason(judgement: Judgement) -> str:
    """Say in one sentence why the evidence decides what it does."""
    findings = judgement.findings
    if judgement.tested:
        counts = Counter(each.verdict for each in findings)
        said = ", ".join(f"{counts[verdict]} {verdict.value}" for verdict in Verdict if counts[verdict])
        text = f"of {len(findings)} things said {said}" if len(findings) > 1 else _estimated(findings[0])
        more = [each.more for each in findings if each.verdict == Verdict.UNDECIDED and each.more]
        return f"{text}; {more[0]}" if more else text
    text = "the published figures alone, one run each; not tested here" if judgement.on_published_alone else ""
    near_misses = list(dict.fromkeys(each.lacking for each in findings if each.lacking))
    lacking = f"needs {judgement.needs}" if judgement.needs else "; ".join(near_misses[:2]) or "no such runs yet"
    near = "; see the nearest evidence" if judgement.nearest else ""
    return "; ".join(filter(None, (text, lacking))) + near


def numbers(finding: Finding) -> list[str]:
    """Return what there is to say in numbers of one thing that a claim says."""
    published = f"published: {finding.published}" if finding.published else ""
    return list(filter(None, (published, _estimated(finding), finding.single, finding.more, finding.lacking)))


def _estimated(finding: Finding) -> str:
    """Return what the runs say, with its p-values."""
    told = [p_text(p) for p in (finding.p, finding.corrected) if p is not None]
    if len(set(told)) > 1:
        return f"{finding.evidence}, {told[0]} ({told[1]} after Holm for {finding.tests} tests)"
    return ", ".join(filter(None, (finding.evidence, *told[:1])))
