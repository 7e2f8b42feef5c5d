"""Reports made, logged to the runs of the studies that they are about, and exported."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from effv2.core.errors import InputError, RunError
from effv2.core.reporter import Reporter
from effv2.evidence.claims import Claims, read_claims
from effv2.evidence.comparison import Comparison, Rows, markdown_table
from effv2.evidence.quantities import HISTORIES
from effv2.evidence.report import HTML, Report, make_report
from effv2.evidence.run_artifacts import write_csv
from effv2.evidence.sources import EXPORTED, Evidence, export, joined, remove_export, tracked
from effv2.evidence.study import studies_of
from effv2.tracking.read import RunRecord, read_experiment, read_runs
from effv2.tracking.recovery import open_experiment
from effv2.tracking.run import TrackedRun, open_report_run, run_address, working_on
from effv2.tracking.store import TrackingError, reason
from effv2.tracking.tags import BORROWED, OUTCOME, PLANNED, as_tags, lent, names_in
from effv2.tracking.views import artifact_link, describe_experiment, save_views, view_links

DATA = "data"  # folder of an export
SHOWN_TRIALS = 5


@dataclass(frozen=True)
class StudyResults:
    """What a study found: a table with its titles first, a sentence, the names of its arms or networks in order."""

    table: Rows
    sentence: str = ""
    order: Sequence[str] = ()


def study_results(parent: TrackedRun, used: Mapping[str, str]) -> StudyResults:
    """Return the results of a study whose finished runs are `used`, by trial."""
    return _results(parent, used, None)


def publish_study(parent: TrackedRun, used: Mapping[str, str]) -> StudyResults:
    """Log the results of a study, and a report on it, to its run; return them."""
    with tempfile.TemporaryDirectory() as folder:
        results = _results(parent, used, Path(folder))
        parent.log_folder(Path(folder))
    report_on_study(parent, used)
    return results


def _results(parent: TrackedRun, used: Mapping[str, str], folder: Path | None) -> StudyResults:
    (own,) = read_runs([parent.run_id], [])
    runs = dict(zip(used, read_runs(used.values(), HISTORIES), strict=True))
    head = f"{where_to_look(parent)}\n\n{own.params.get('study.description', '')}\n\n"
    if own.params["study.kind"] == "search":
        every = [run for run in read_experiment(parent.experiment_id, (), parent.run_id) if run.run_id != parent.run_id]
        trials = {run.run_id: (name, run) for name, run in runs.items()}
        trials = {run.run_id: (run.name, run) for run in every} | trials
        rows: Rows = [("trial", "state", "validation accuracy", "epochs", "run_id")]
        for name, run in sorted(trials.values(), key=lambda each: -each[1].metrics.get("selected/val_accuracy", 0)):
            accuracy, epochs = run.metrics.get("selected/val_accuracy"), TrackedRun(run.run_id, "").steps("train/loss")
            rows.append((name, run.tags.get(OUTCOME, ""), str(accuracy), str(max(epochs, default=0)), run.run_id))
        if folder is not None:
            write_csv(folder / "trials.csv", rows[0], rows[1:])
            parent.describe(head + markdown_table(rows[: SHOWN_TRIALS + 1]))
        return StudyResults(rows[: SHOWN_TRIALS + 1])
    if own.params["study.kind"] == "evaluate-pretrained":
        from effv2.pretrained.images import Origin
        from effv2.pretrained.ranking import Evaluated, Ranking, right_answers

        if not runs:
            return StudyResults([("network",)])
        networks = {name: Evaluated(run, right_answers(run)) for name, run in runs.items()}
        first = next(iter(runs.values())).params
        ranking = Ranking(networks, first["evaluation.ranked_on"], Origin(first["evaluation.ranked_origin"]))
        if folder is not None:
            ranking.write(folder)
            parent.log_metrics(ranking.metrics())
            parent.describe(head + ranking.markdown())
        return StudyResults(ranking.summary(), ranking.sentence(), ranking.order)
    arms: dict[str, list[RunRecord]] = {}
    place = {name: index for index, name in enumerate(names_in(own.tags, PLANNED))}
    for name in sorted(runs, key=lambda name: place[name]):
        arms.setdefault(name.rpartition(", seed ")[0], []).append(runs[name])
    comparison = Comparison(arms)
    if folder is not None and arms:
        comparison.write(folder, own.name)
        parent.log_metrics(comparison.metrics())
        parent.describe(f"{comparison.sentence()}\n\n{head}{comparison.markdown()}")
    return StudyResults(comparison.lines())


def log_report(report: Report, run: TrackedRun) -> None:
    """Log the page, its Markdown twin and figures as artifacts of a run."""
    with tempfile.TemporaryDirectory() as folder:
        report.write(Path(folder))
        run.log_folder(Path(folder))


def _show_in_ui(run: TrackedRun) -> None:
    """Save the views of the run's experiment, and lead to them and to the report on the run from its description."""
    save_views(run.experiment_id)
    describe_experiment(run.experiment_id, where_to_look(run))


def where_to_look(run: TrackedRun) -> str:
    """Return links to the report on a run and to the views of its experiment, in Markdown."""
    page = artifact_link(run.experiment_id, run.run_id, HTML)
    return f"[Report]({page}) · {view_links(run.experiment_id)}"


def report_on_study(parent: TrackedRun, used: Mapping[str, str]) -> None:
    """Report on one study, which rests on the runs `used`, by name, and log that to the study's run.

    Claims that none of its runs can tell anything about are left out.
    """
    runs = read_experiment(parent.experiment_id, (), parent.run_id)
    own = {run.run_id for run in runs if run.parent == parent.run_id}
    borrowed = [lent(run_id, name) for name, run_id in used.items() if run_id not in own]
    parent.set_tags(as_tags(BORROWED, borrowed))
    evidence = tracked(parent.experiment_id, parent=parent.run_id)
    log_report(make_report(evidence, read_claims(), only_touched=True), parent)
    _show_in_ui(parent)


def publish(experiment: str, own: Path | None, target: Path | None, reporter: Reporter) -> tuple[Report, str]:
    """Report on a whole experiment; log that to a run of its own and to the run of every study; export to `target`.

    `own` is a file of claims that are judged beside the published ones. Returns the report and where its run is to be
    seen. InputError before any run is created.
    """
    claims = read_claims(own)
    if target is not None:
        _prepare(target)
    experiment_id = open_experiment(experiment, reporter.message, create=False)
    try:
        run = open_report_run(experiment_id)
        with working_on(run):
            reporter.working("reading runs")
            evidence = tracked(run.experiment_id, HISTORIES if target is None else EXPORTED)
            report = make_report(evidence, claims, progress=reporter.working)
            parents = [study.parent.run_id for study in studies_of(evidence.runs) if study.parent and study.kind]
            for place in [run, *(TrackedRun(run_id, run.experiment_id) for run_id in parents)]:
                reporter.working("logging the report")
                log_report(report, place)
            _show_in_ui(run)
            run.describe(f"{report.summary}.\n\n{where_to_look(run)}")
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
        raise InputError(f"--from-export: {files} differ; say with --claims which claims to judge.")
    own = own or next(iter(evidence.claims), None)
    claims = read_claims(own)
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
        raise InputError(f"--export {target}: can't be written to ({error.strerror}); give another folder.") from error


def _write(report: Report, evidence: Evidence, target: Path, claims: Claims) -> None:
    own = {name: path.read_text(encoding="utf-8") for name, path in claims.files.items()}
    remove_export(target / DATA)
    report.write(target)
    export(evidence, target / DATA, own)
