"""The report of an experiment or a study, logged to the runs that it is about, and exported."""

import re
import tempfile
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from textwrap import shorten
from types import MappingProxyType
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup
from matplotlib.figure import Figure

from effv2.core.errors import InputError
from effv2.core.figures import svg_file, svg_part
from effv2.core.paths import write_csv
from effv2.core.reporter import Reporter
from effv2.core.words import counted
from effv2.data.dataset import Dataset
from effv2.data.inspection import WRONG, gallery, of_each_class
from effv2.evidence.answers import NOTHING_YET
from effv2.evidence.claims import Claims, read_claims
from effv2.evidence.exports import Evidence, export, exported, tracked
from effv2.evidence.judge import Finding, Judgement, Verdict, judge
from effv2.evidence.quantities import CURVES, EXPORTED, HISTORIES
from effv2.evidence.results import results_of
from effv2.evidence.statistics import p_text
from effv2.evidence.study import StudyResults, images_apart
from effv2.tracking.read import RunRecord, download, read_experiment
from effv2.tracking.run import open_experiment, open_report_run
from effv2.tracking.store import tracking_faults
from effv2.tracking.studies import TrackedStudy, complete, studies_of
from effv2.tracking.tags import ANSWER, ARM, REUSED, as_tags, reused
from effv2.tracking.writer import TrackedRun, run_address, show_in_ui

# Of a file that is logged: a text, an image, a figure, a table.
Content = str | bytes | Figure | Sequence[Sequence[Any]]
HTML, MARKDOWN, FIGURES, DATA = "report.html", "report.md", "figures", "data"  # in an export
LONGEST_ANSWER = 500  # characters of a tag
MOST_SHOWN, MOST_ARMS = 24, 5  # images of a gallery, arms in its captions


@dataclass(frozen=True)
class Report:
    """What came out in one sentence, and files by name: a page, its Markdown twin, the figures that the twin shows."""

    summary: str
    answers: Sequence[str]  # a line a study
    own: Sequence[str]  # the verdicts of the user's own claims, a line each
    studies: Sequence[StudyResults]
    files: Mapping[str, str]
    judgements: Sequence[Judgement] = ()  # of the claims that runs are about, or come near
    runs: Sequence[RunRecord] = ()


def publish_study(parent: TrackedRun, used: Mapping[str, str], dataset: Dataset | None = None) -> StudyResults:
    """Log to a study's run what came out of it, with a report, and return it. It may be repeated.

    `used` are the finished runs of the study by name, some of them other studies'. `dataset` has the test images, of
    which the report shows some.
    """
    read = read_experiment(parent.experiment_id, (), parent.run_id)
    own = {run.run_id for run in read if run.parent == parent.run_id}
    others = [reused(run_id, name) for name, run_id in used.items() if run_id not in own]
    parent.set_tags(as_tags(REUSED, others))
    evidence = tracked(parent.experiment_id, parent=parent.run_id)
    (study,) = [each for each in studies_of(evidence.runs) if each.parent.run_id == parent.run_id]
    apart = images_apart(study, evidence.right)
    shown = _differing(apart, dataset) if apart and dataset else None
    galleries = {"Test images on which the arms differ most": shown} if shown else {}
    report = make_report(evidence, read_claims(), of_study=True, galleries=galleries | _mistakes(study))
    results = next(each for each in report.studies if each.run_id == parent.run_id)
    files: dict[str, Content] = {**report.files, **results.files}
    if apart:
        files["images.csv"] = apart
    if shown:
        files["differing.jpg"] = shown
    with parent.new_artifacts() as folder:
        _write(folder, files)
    parent.log_metrics(results.metrics)
    parent.set_tags({ANSWER: shorten(results.short or NOTHING_YET, LONGEST_ANSWER)})
    parent.describe(results.markdown(show_in_ui(parent.experiment_id, parent.run_id, HTML)))
    return results


def read_results(parent: TrackedRun) -> StudyResults:
    """Return what came out of a study, from its tracked runs as they are."""
    evidence = tracked(parent.experiment_id, parent=parent.run_id)
    studies = results_of(evidence.runs, read_claims(), evidence.right)
    return next(each for each in studies if each.run_id == parent.run_id)


def publish(experiment: str, own: Path | None, target: Path | None, reporter: Reporter) -> tuple[Report, str]:
    """Report on a whole experiment; log that to a run of its own; export to `target`.

    `own` is a file of claims that are judged beside the published ones. Returns the report and where its run is to be
    seen. InputError before any run is created.
    """
    claims = read_claims(own)
    if target is not None:
        _prepare(target)
    experiment_id = open_experiment(experiment, reporter.message, create=not experiment)
    with tracking_faults(), open_report_run(experiment_id, reporter.message) as run:
        reporter.progress("reading runs")
        evidence = tracked(run.experiment_id, HISTORIES if target is None else EXPORTED)
        report = make_report(evidence, claims, progress=reporter.progress)
        reporter.progress("logging the report")
        with run.new_artifacts() as folder:
            _write(folder, report.files)
        lines = [f"- {line}\n" for line in report.answers]
        parts = ["".join(lines), f"{report.summary}.", show_in_ui(run.experiment_id, run.run_id, HTML)]
        run.describe("\n\n".join(filter(None, parts)))
        if target is not None:
            reporter.progress("exporting")
            _export(report, evidence, target, claims)
        run.complete()  # also where the last report had failed
    return report, run_address(run.run_id, run.experiment_id)


def rebuild(sources: Sequence[Path], own: Path | None, target: Path, reporter: Reporter) -> Report:
    """Make the report of an export again, or one of several, without a tracking server, and write both to `target`.

    Where no file of claims is given, it is the one that was exported with them. InputError before anything is made.
    """
    reporter.progress("reading what was exported")
    evidence = exported([source / DATA for source in sources])
    if own is None and len(evidence.claims) > 1:
        files = " and ".join(map(str, evidence.claims))
        raise InputError("from_export", files, "the exports' claims.yaml differ", "name one of them as `claims`")
    claims = read_claims(own or next(iter(evidence.claims), None))
    _prepare(target)
    report = make_report(evidence, claims, progress=reporter.progress)
    _export(report, evidence, target, claims)
    return report


def _write(folder: Path, files: Mapping[str, Content]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        elif isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, Figure):
            content.savefig(path, dpi=120)
        else:
            write_csv(path, content)


def _prepare(target: Path) -> None:
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target):
            pass
    except OSError as error:
        raise InputError("export", target, f"can't be written to ({error.strerror})", "give another folder") from error


def _export(report: Report, evidence: Evidence, target: Path, claims: Claims) -> None:
    """Write a report and its data, in the place of the data and the figures of an earlier one there."""
    page = target / MARKDOWN
    earlier = page.read_text(encoding="utf-8", errors="replace") if page.is_file() else ""
    for name in re.findall(rf"\]\({FIGURES}/(\d+-[a-z0-9-]+\.svg)\)", earlier):
        (target / FIGURES / name).unlink(missing_ok=True)
    _write(target, report.files)
    own = {name: path.read_text(encoding="utf-8") for name, path in claims.files.items()}
    export(evidence, target / DATA, own)


def _differing(apart: Sequence[Sequence[Any]], dataset: Dataset) -> bytes:
    """Return a gallery of the first images of images_apart that arms differ on, a JPEG; empty without any."""
    places, arms = {id_: place for place, id_ in enumerate(dataset.test.ids)}, apart[0][1 : MOST_ARMS + 1]
    shares = {places[row[0]]: row[1:] for row in apart[1:] if row[0] in places and len(set(row[1:])) > 1}
    labels, file = dataset.test.labels.tolist(), BytesIO()
    captions = {
        place: [dataset.test.ids[place], dataset.classes[labels[place]]]
        + [f"{arm}: {float(share):.0%}" for arm, share in zip(arms, shares[place], strict=False)]
        for place in of_each_class(list(shares), labels, MOST_SHOWN)
    }
    if captions:
        gallery(dataset.test.images(torch.tensor(list(captions))), list(captions.values())).save(
            file, "JPEG", quality=85
        )
    return file.getvalue()


def _mistakes(study: TrackedStudy) -> dict[str, bytes]:
    """Return the gallery of mistakes of the first run of each arm, where there is one, by title."""
    first = {run.tags.get(ARM, ""): run for run in reversed(complete(study.in_order()))}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for arm in list(reversed(first))[:MOST_ARMS]:
            if path := download(first[arm].run_id, WRONG, Path(folder)):
                found[f"The surest mistakes of {first[arm].name}"] = path.read_bytes()
    return found


def make_report(
    evidence: Evidence,
    claims: Claims,
    of_study: bool = False,
    progress: Callable[[str], None] = lambda _: None,
    galleries: Mapping[str, bytes] = MappingProxyType({}),
) -> Report:
    """Judge the claims on the evidence and write it up, of an experiment or of one study, the latter with galleries."""
    progress("judging claims")
    judgements, known = judge(claims, evidence.runs, evidence.right), read_claims().claims
    own = [each for each in judgements if each.id not in known]
    posts = [each for each in judgements if each.id in known]
    touched = [each for each in posts if each.tested or each.nearest]
    studies, drawn = results_of(evidence.runs, claims, evidence.right), []
    for number, study in enumerate(studies, 1):
        progress(f"drawing {study.title}")
        drawn.append({f"{number:02}-{_slug(name)}.svg": (name, svg_file(f)) for name, f in study.figures.items()})
    environment = Environment(
        loader=PackageLoader("effv2.evidence"),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cell": _cell, "drawing": _drawing, "why": why, "numbers": _numbers, "slug": _slug}
    values = {
        "evidence": evidence,
        "claims": {"Your claims": own, "Published claims": touched},
        "untouched": [] if of_study else [each.id for each in posts if each not in touched],
        "title": studies[0].title if of_study and studies else evidence.experiment,
        "summary": (summary := _summary(evidence, [*own, *touched])),
        "sections": list(zip(studies, drawn, strict=True)),
        "figures": FIGURES,
        "curves": CURVES,
        "galleries": {title: b64encode(image).decode() for title, image in galleries.items()},
    }
    files = {name: environment.get_template(f"{name}.j2").render(values) for name in (HTML, MARKDOWN)}
    files[MARKDOWN] = re.sub(r"\n{3,}", "\n\n", files[MARKDOWN])
    files |= {f"{FIGURES}/{name}": svg for each in drawn for name, (_, svg) in each.items()}
    verdicts = [f"{each.id} {each.verdict.value}: {why(each)}" for each in own]
    answers = [f"{each.title}: {each.short}" for each in studies if each.short]
    return Report(summary, answers, verdicts, studies, files, [*own, *touched], evidence.runs)


def _summary(evidence: Evidence, judgements: Sequence[Judgement]) -> str:
    words = _tally(judgements)
    parents = {run.parent for run in evidence.runs}
    runs = sum(bool(run.metrics) and run.run_id not in parents for run in evidence.runs)
    return f"{counted(runs, 'run')}; {f'claims: {words}' if words else 'no claim is about them'}"


def _tally(judged: Sequence[Judgement] | Sequence[Finding]) -> str:
    counts = Counter(each.verdict for each in judged)
    return ", ".join(f"{counts[verdict]} {verdict.value}" for verdict in Verdict if counts[verdict])


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _cell(text: object) -> str:
    """Write a text into a cell of a Markdown table."""
    return " ".join(re.sub(r"<(?=[A-Za-z/!?])", "&lt;", re.sub(r"(\||(?<=\])\()", r"\\\1", str(text))).split())


def why(judgement: Judgement) -> str:
    """Say in one sentence why the evidence decides what it does."""
    findings = judgement.findings
    if judgement.tested:
        text = f"of {len(findings)} things said {_tally(findings)}" if len(findings) > 1 else _estimated(findings[0])
        more = [each.lacking for each in findings if each.verdict == Verdict.UNDECIDED and each.lacking]
        return "; ".join([text, *more[:1]])
    near_misses = list(dict.fromkeys(each.lacking for each in findings if each.lacking))
    lacking = f"needs {judgement.needs}" if judgement.needs else "; ".join(near_misses[:2]) or "no such runs yet"
    return "; ".join(filter(None, (lacking, "see the nearest evidence" if judgement.nearest else "")))


def _numbers(finding: Finding) -> list[str]:
    published = f"published: {finding.published}" if finding.published else ""
    return list(filter(None, (published, _estimated(finding), finding.single, finding.lacking)))


def _estimated(finding: Finding) -> str:
    written = list(dict.fromkeys(p_text(p) for p in (finding.p, finding.corrected) if p is not None))
    holm = [f"({p} after Holm for {finding.tests} tests)" for p in written[1:]]
    return ", ".join(filter(None, (finding.evidence, " ".join([*written[:1], *holm]))))


def _drawing(svg: str, label: str) -> Markup:
    return Markup(svg_part(svg, label))  # noqa: S704 (our own SVG, the label escaped)
