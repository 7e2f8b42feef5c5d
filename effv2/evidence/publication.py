"""Results and reports, logged to the runs of the studies that they are about, and exported."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from effv2.core.errors import InputError, RunError
from effv2.core.paths import write_csv
from effv2.core.reporter import Reporter
from effv2.evidence.claims import Claims, read_claims
from effv2.evidence.exports import Evidence, export, joined, remove_export, tracked
from effv2.evidence.quantities import EXPORTED, HISTORIES
from effv2.evidence.report import HTML, Report, make_report
from effv2.evidence.results import results_of
from effv2.evidence.study import StudyResults, studies_of
from effv2.tracking.read import read_experiment
from effv2.tracking.run import open_experiment, open_report_run, run_address, working_on
from effv2.tracking.store import TrackingError, reason
from effv2.tracking.tags import REUSED, as_tags, reused
from effv2.tracking.views import artifact_link, describe_experiment, save_views, view_links
from effv2.tracking.writer import TrackedRun

DATA = "data"  # folder of an export


def publish_study(parent: TrackedRun, used: Mapping[str, str]) -> StudyResults:
    """Log to a study's run what came out of it, with a report, and return it. It may be repeated.

    `used` are the finished runs of the study by name, some of them other studies'. Claims that none of its runs can
    tell anything about are left out of the report.
    """
    read = read_experiment(parent.experiment_id, (), parent.run_id)
    own = {run.run_id for run in read if run.parent == parent.run_id}
    others = [reused(run_id, name) for name, run_id in used.items() if run_id not in own]
    parent.set_tags(as_tags(REUSED, others))
    report = make_report(tracked(parent.experiment_id, parent=parent.run_id), read_claims(), only_touched=True)
    results = _of(parent, report.studies)
    _log(parent, report, results)
    parent.log_metrics(results.metrics)
    parent.describe(results.markdown(_show_in_ui(parent)))
    return results


def read_results(parent: TrackedRun) -> StudyResults:
    """Return what came out of a study, from its tracked runs as they are."""
    evidence = tracked(parent.experiment_id, parent=parent.run_id)
    return _of(parent, results_of(evidence.runs, read_claims(), evidence.right))


def _of(parent: TrackedRun, studies: Sequence[StudyResults]) -> StudyResults:
    return next(each for each in studies if each.run_id == parent.run_id)


def _log(run: TrackedRun, report: Report, results: StudyResults | None = None) -> None:
    """Log a report as artifacts of a run, and the files of a study's results."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report.write(folder)
        for file, content in results.files.items() if results else ():
            if isinstance(content, Figure):
                content.savefig(folder / file, dpi=120)
            else:
                write_csv(folder / file, content)
        if results and results.document and results.table:
            text = f"# {results.title}\n\n{results.markdown()}\n"
            (folder / results.document).write_text(text, encoding="utf-8")
        run.log_folder(folder)


def _show_in_ui(run: TrackedRun) -> str:
    """Save the views of the run's experiment, and return links to them and to the report on the run.

    The experiment's description leads there too.
    """
    save_views(run.experiment_id)
    page = artifact_link(run.experiment_id, run.run_id, HTML)
    links = f"[Report]({page}) · {view_links(run.experiment_id)}"
    describe_experiment(run.experiment_id, links)
    return links


def publish(experiment: str, own: Path | None, target: Path | None, reporter: Reporter) -> tuple[Report, str]:
    """Report on a whole experiment; log that to a run of its own and to the run of every study; export to `target`.

    `own` is a file of claims that are judged beside the published ones. Returns the report and where its run is to be
    seen. InputError before any run is created.
    """
    claims = read_claims(own)
    if target is not None:
        _prepare(target)
    experiment_id = open_experiment(experiment, create=False)
    try:
        run = open_report_run(experiment_id)
        with working_on(run):
            reporter.working("reading runs")
            evidence = tracked(run.experiment_id, HISTORIES if target is None else EXPORTED)
            report = make_report(evidence, claims, progress=reporter.working)
            parents = [study.parent.run_id for study in studies_of(evidence.runs) if study.kind]
            for place in [run, *(TrackedRun(run_id, run.experiment_id) for run_id in parents)]:
                reporter.working("logging the report")
                _log(place, report)
            run.describe(f"{report.summary}.\n\n{_show_in_ui(run)}")
            if target is not None:
                reporter.working("exporting")
                _write(report, evidence, target, claims)
    except TrackingError as error:
        raise RunError(f"The tracking store failed ({reason(error)}); mend it and try again.") from error
    return report, run_address(run.run_id, run.experiment_id)


def rebuild(sources: Sequence[Path], own: Path | None, target: Path, reporter: Reporter) -> Report:
    """Make the report of an export again, or one of several, without a tracking server, and write both to `target`.

    Where no file of claims is given, it is the one that was exported with them. InputError before anything is made.
    """
    reporter.working("reading what was exported")
    evidence = joined([source / DATA for source in sources])
    if own is None and len(evidence.claims) > 1:
        files = " and ".join(map(str, evidence.claims))
        raise InputError("from_export", files, "the exports' claims.yaml differ", "name one of them as `claims`")
    claims = read_claims(own or next(iter(evidence.claims), None))
    _prepare(target)
    report = make_report(evidence, claims, progress=reporter.working)
    _write(report, evidence, target, claims)
    return report


def _prepare(target: Path) -> None:
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target):
            pass
    except OSError as error:
        raise InputError("export", target, f"can't be written to ({error.strerror})", "give another folder") from error


def _write(report: Report, evidence: Evidence, target: Path, claims: Claims) -> None:
    own = {name: path.read_text(encoding="utf-8") for name, path in claims.files.items()}
    remove_export(target / DATA)
    report.write(target)
    export(evidence, target / DATA, own)
