"""The report of an experiment or a study, logged to its runs, and exported."""

import re
import tempfile
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

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
from effv2.evidence.study import StudyResults, cell, images_apart, ruled
from effv2.tracking.read import RunRecord, download, read_experiment
from effv2.tracking.run import open_experiment, open_report_run
from effv2.tracking.store import is_begun, open_store, tracking_faults
from effv2.tracking.studies import TrackedStudy, complete, studies_of
from effv2.tracking.tags import ANSWER, ARM, REUSED, as_tags, reused
from effv2.tracking.writer import TrackedRun, run_address, show_in_ui

# The content of a logged file: a text, an image, a figure, a table.
Content = str | bytes | Sequence[Sequence[Any]]
HTML, MARKDOWN, FIGURES, DATA = "report.html", "report.md", "figures", "data"  # in an export
LONGEST_ANSWER = 500  # characters of a tag
MOST_SHOWN, MOST_ARMS = 24, 5  # images of a gallery, arms in its captions


@dataclass(frozen=True)
class Report:
    """The results in one sentence, and files by name: a page, the same as Markdown, and its figures."""

    summary: str
    answers: Sequence[str]  # a line per study
    own: Sequence[str]  # the verdicts on the user's own claims, one line each
    studies: Sequence[StudyResults]
    files: Mapping[str, str]
    judgements: Sequence[Judgement] = ()  # of the claims with runs, or with near ones
    runs: Sequence[RunRecord] = ()


def publish_study(parent: TrackedRun, used: Mapping[str, str], dataset: Dataset | None = None) -> StudyResults:
    """Log the results of a study to its run, with a report, and return them. This may be repeated.

    `used` are the finished runs of the study by name, including those of other studies. `dataset` has the test images,
    and the report shows some of them.
    """
    read = read_experiment(parent.experiment_id, (), parent.run_id)
    own = {run.run_id for run in read if run.parent == parent.run_id}
    others = [reused(run_id, name) for name, run_id in used.items() if run_id not in own]
    parent.set_tags(as_tags(REUSED, others))
    evidence = tracked(parent.experiment_id, parent=parent.run_id)
    study = studies_of(evidence.runs)[0]
    apart = images_apart(study, evidence.right)
    shown = _differing(apart, dataset) if apart and dataset else b""
    galleries = {"Test images on which the arms differ most": shown, **_mistakes(study)}
    report = make_report(evidence, read_claims(), {title: image for title, image in galleries.items() if image})
    results = report.studies[0]
    files: dict[str, Content] = {**report.files, **results.files, "images.csv": apart, "differing.jpg": shown}
    with parent.new_artifacts() as folder:
        _write(folder, {name: content for name, content in files.items() if content})
    parent.log_metrics(results.metrics)
    parent.set_tags({ANSWER: shorten(results.short or NOTHING_YET, LONGEST_ANSWER)})
    parent.describe(results.markdown(show_in_ui(parent.experiment_id, parent.run_id, HTML)))
    return results


def read_results(parent: TrackedRun) -> StudyResults:
    """Return the results of a study, from the current state of its runs."""
    evidence = tracked(parent.experiment_id, parent=parent.run_id)
    return results_of(evidence.runs, read_claims(), evidence.right)[0]


def publish(experiment: str, own: Path | None, target: Path | None, reporter: Reporter) -> tuple[Report, str]:
    """Report on a whole experiment, log the report to a separate run, and export it to `target`.

    `own` is a file of claims that are judged in addition to the published ones. Returns the report and the address of
    its run. InputError before any run is created. If there is no store, none is created, and an export has no runs.
    """
    claims = read_claims(own)
    if target is not None:
        _prepare(target)
    if not is_begun():
        if target is None:
            open_store(None, create=False)
        nothing = Evidence(experiment or "no runs yet", "", [], lambda run: {})
        return _exported(nothing, claims, target or Path(), reporter), ""
    experiment_id = open_experiment(experiment, reporter.message, create=False)
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
        run.complete()  # even if the last report had failed
    return report, run_address(run.run_id, run.experiment_id)


def rebuild(sources: Sequence[Path], own: Path | None, target: Path, reporter: Reporter) -> Report:
    """Make the report of one or several exports without a tracking server, and write report and data to `target`.

    By default, the file of claims is the one in the exports. InputError before anything is created.
    """
    reporter.progress("reading the exports")
    evidence = exported([source / DATA for source in sources])
    if own is None and len(evidence.claims) > 1:
        files = " and ".join(map(str, evidence.claims))
        raise InputError("from_export", files, "the exports' claims.yaml differ", "name one of them as `claims`")
    claims = read_claims(own or next(iter(evidence.claims), None))
    _prepare(target)
    return _exported(evidence, claims, target, reporter)


def _exported(evidence: Evidence, claims: Claims, target: Path, reporter: Reporter) -> Report:
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
    """Write a report and its data, and replace the data and the figures of an earlier one."""
    page = target / MARKDOWN
    earlier = page.read_text(encoding="utf-8", errors="replace") if page.is_file() else ""
    for name in re.findall(rf"\]\({FIGURES}/(\d+-[a-z0-9-]+\.svg)\)", earlier):
        (target / FIGURES / name).unlink(missing_ok=True)
    _write(target, report.files)
    own = {name: path.read_text(encoding="utf-8") for name, path in claims.files.items()}
    export(evidence, target / DATA, own)


def _differing(apart: Sequence[Sequence[Any]], dataset: Dataset) -> bytes:
    """Return a JPEG gallery of the first images of images_apart on which arms differ; empty without any."""
    places, arms = {id_: place for place, id_ in enumerate(dataset.test.ids)}, apart[0][1 : MOST_ARMS + 1]
    shares = {places[row[0]]: row[1:] for row in apart[1:] if row[0] in places and len(set(row[1:])) > 1}
    labels, file = dataset.test.labels.tolist(), BytesIO()
    if chosen := of_each_class(list(shares), labels, MOST_SHOWN):
        of_arms = (zip(arms, shares[place], strict=False) for place in chosen)
        right = [[f"{arm}: {float(share):.0%}" for arm, share in each] for each in of_arms]
        about = [[dataset.test.ids[place], dataset.classes[labels[place]]] for place in chosen]
        captions = [[*image, *shown] for image, shown in zip(about, right, strict=True)]
        gallery(dataset.test.images(torch.tensor(chosen)), captions).save(file, "JPEG", quality=85)
    return file.getvalue()


def _mistakes(study: TrackedStudy) -> dict[str, bytes]:
    """Return the existing galleries of mistakes of the first run of each arm, by title."""
    first = {run.tags.get(ARM, ""): run for run in reversed(complete(study.in_order()))}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for arm in list(reversed(first))[:MOST_ARMS]:
            if path := download(first[arm].run_id, WRONG, Path(folder)):
                found[f"The most confident mistakes of {first[arm].name}"] = path.read_bytes()
    return found


def make_report(
    evidence: Evidence,
    claims: Claims,
    galleries: Mapping[str, bytes] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Judge the claims on the evidence and write the report of an experiment or, with galleries, of its first study."""
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
    environment.filters |= {
        "cell": cell,
        "ruled": ruled,
        "drawing": svg_part,
        "why": why,
        "numbers": _numbers,
        "slug": _slug,
    }
    of_study = galleries is not None
    values = {
        "evidence": evidence,
        "claims": {"Your claims": own, "Published claims": touched},
        "untouched": [] if of_study else [each.id for each in posts if each not in touched],
        "title": studies[0].title if of_study and studies else evidence.experiment,
        "summary": (summary := _summary(evidence, [*own, *touched])),
        "sections": list(zip(studies, drawn, strict=True)),
        "figures": FIGURES,
        "curves": CURVES,
        "galleries": {title: b64encode(image).decode() for title, image in (galleries or {}).items()},
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
    return "; ".join([counted(runs, "run"), *([f"claims: {words}"] if words else [])])


def _tally(judged: Sequence[Judgement] | Sequence[Finding]) -> str:
    counts = Counter(each.verdict for each in judged)
    return ", ".join(f"{counts[verdict]} {verdict.value}" for verdict in Verdict if counts[verdict])


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def why(judgement: Judgement) -> str:
    """Explain the verdict in one sentence."""
    findings = judgement.findings
    if judgement.tested:
        text = f"of {len(findings)} statements {_tally(findings)}" if len(findings) > 1 else _estimated(findings[0])
        more = [each.lacking for each in findings if each.verdict == Verdict.UNDECIDED and each.lacking]
        return "; ".join([text, *more[:1]])
    near_misses = list(dict.fromkeys(each.lacking for each in findings if each.lacking))
    lacking = f"needs {judgement.needs}" if judgement.needs else "; ".join(near_misses[:2]) or "no such runs yet"
    return "; ".join(filter(None, (lacking, "see the nearest evidence" if judgement.nearest else "")))


def _numbers(finding: Finding) -> str:
    published = f"published: {finding.published}" if finding.published else ""
    return "; ".join(filter(None, (published, _estimated(finding), finding.single, finding.lacking)))


def _estimated(finding: Finding) -> str:
    written = list(dict.fromkeys(p_text(p) for p in (finding.p, finding.corrected) if p is not None))
    holm = [f"({p} after Holm for {finding.tests} tests)" for p in written[1:]]
    return "; ".join(filter(None, (finding.evidence, " ".join([*written[:1], *holm]))))
