"""A study as tracked runs show it: the runs that it rests on, what it lacks, where it was run, what came out of it."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from textwrap import shorten
from typing import Any

from matplotlib.figure import Figure

from effv2.evidence.protocols import complete, counted
from effv2.evidence.quantities import EPOCH_SECONDS, SHOWN, duration, quantity
from effv2.tracking import tags
from effv2.tracking.read import RunRecord

NONE = "none"  # in a cell: the runs lack the figure
MOST_NAMED, LONGEST_REASON = 6, 150  # of the runs that a study lacks; characters
Rows = list[tuple[str, ...]]  # of a table, its titles first
NO_STUDY = RunRecord("", "Single runs", "", {}, {}, {})  # stands for the parent of runs that belong to no study
# How tags are called where a report tells of the code, the data and the machine.
ENVIRONMENT = {
    tags.GIT_COMMIT: "git commit",
    tags.GIT_DIRTY: "uncommitted changes",
    tags.CODE_VERSION: "code version",
    tags.DATA_DIGEST: "data digest",
    **{f"{tags.MACHINE}{name}": name for name in ("processor", "cores", "threads", "accelerator")},
    f"{tags.MACHINE}memory_gib": "memory, GiB",
    f"{tags.MACHINE}system": "system",
    f"{tags.MACHINE}python": "Python",
    **{f"{tags.MACHINE}{name}": name for name in ("torch", "torchvision", "mlflow")},
}


@dataclass(frozen=True)
class TrackedStudy:
    """A study's own run, or NO_STUDY, and the runs that it rests on."""

    parent: RunRecord
    runs: Sequence[RunRecord]

    @property
    def kind(self) -> str:
        """Return which command made it."""
        return self.parent.params.get("study.kind", "")

    def in_order(self) -> list[RunRecord]:
        """Return the runs in the order in which they were planned, whichever worker was quicker."""
        place = {name: index for index, name in enumerate(tags.names_in(self.parent.tags, tags.PLANNED))}
        return sorted(self.runs, key=lambda run: place.get(run.name, len(place)))

    def missing(self) -> str:
        """Say what it lacks: runs that failed, and planned ones. A run that diverged is an answer to a search."""
        there = {run.name for run in self.runs if run.status == "FINISHED"}
        failed = {run.name: run.tags.get(tags.ERROR, "no reason known") for run in self.runs if run.status == "FAILED"}
        planned = tags.names_in(self.parent.tags, tags.PLANNED)
        lacking = [name for name in planned if name not in there | failed.keys()]
        diverged = {name for name, error in failed.items() if error.startswith("Diverged:")}
        hidden = there | (diverged if self.kind == "search" else set())
        errors = [f"{name} ({shorten(error, LONGEST_REASON)})" for name, error in failed.items() if name not in hidden]
        running = any(run.status == "RUNNING" for run in self.runs)
        found = ["it is being worked on, or its process died"] if running else []
        for words, names in {"failed": errors, "planned but not finished": lacking}.items():
            if names:
                more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
                found.append(f"{counted(len(names), 'run')} {words}: {', '.join(names[:MOST_NAMED])}{more}")
        if not self.runs:
            found.append("it has no runs yet")
        resumes = self.parent.tags.get(tags.COMMAND) and (lacking or failed.keys() - there - diverged)
        return f"{'; '.join(found)}.{' The command below resumes it.' if resumes else ''}" if found else ""


@dataclass(frozen=True)
class StudyResults:
    """What came out of a study, made once for the terminal, the report, MLflow and exports.

    `details` are a second table, of what the first leaves out. Figures are by the words that name their files.
    `missing` says what there should be and isn't. `metrics` and `files` (tables and figures by name, and the
    `document` that is called so) are those of the study's run.
    """

    title: str = ""
    description: str = ""
    run_id: str = ""
    sentence: str = ""
    table: Rows = field(default_factory=list)
    details: Rows = field(default_factory=list)
    notes: Sequence[str] = ()
    figures: Mapping[str, Figure] = field(default_factory=dict)
    missing: str = ""
    commands: Sequence[str] = ()
    environment: Rows = field(default_factory=list)
    metrics: Mapping[str, float] = field(default_factory=dict)
    document: str = ""
    files: Mapping[str, Sequence[Sequence[Any]] | Figure] = field(default_factory=dict)

    def markdown(self, links: str = "") -> str:
        """Write sentence, links, description, tables and notes as Markdown."""
        ruled = [[rows[0], ("---",) * len(rows[0]), *rows[1:]] for rows in (self.table, self.details) if rows]
        tables = ["\n".join(f"| {' | '.join(cells)} |" for cells in rows) for rows in ruled]
        return "\n\n".join(filter(None, (self.sentence, links, self.description, *tables, *self.notes)))


def studies_of(runs: Sequence[RunRecord]) -> list[TrackedStudy]:
    """Return the studies of an experiment in the order of their beginning, then the training runs of none."""
    by_id = {run.run_id: run for run in runs}
    children: dict[str, list[RunRecord]] = {}
    for run in runs:
        children.setdefault(run.parent, []).append(run)
    studies = []
    for run in runs:
        of_it = list(children.get(run.run_id, ()))
        for run_id, name in tags.reused_in(run.tags).items():  # of other studies: here they have its names and arms
            if run_id in by_id:
                arm = name.rpartition(", seed ")[0]
                own = by_id[run_id].tags | ({tags.ARM: arm} if arm else {})
                of_it.append(replace(by_id[run_id], name=name, tags=own))
        if of_it or "study.kind" in run.params:
            studies.append(TrackedStudy(run, of_it))
    parents = {study.parent.run_id for study in studies}
    single = [run for run in complete(runs) if not parents & {run.run_id, run.parent} and has_figures(run)]
    return [*studies, *([TrackedStudy(NO_STUDY, single)] if single else [])]


def has_figures(run: RunRecord) -> bool:
    """Say whether a run has any of the main figures of a table of arms."""
    return any(what.values([run]) for what in SHOWN.values() if what.shown == "main")


def environment(runs: Sequence[RunRecord]) -> Iterator[tuple[str, str]]:
    """Yield with which code, on what machine and on which data runs were made, and how long their epochs took."""
    for tag, words in ENVIRONMENT.items():
        if values := dict.fromkeys(run.tags[tag] for run in runs if tag in run.tags):
            yield words, ", ".join(values)
    sets = dict.fromkeys(
        f"{images.name}, {images.images:,} images of {len(images.classes)} classes, digest {images.digest}: {context}"
        for run in runs
        for context, images in sorted(run.images.items())
    )
    if sets:
        yield "data", "; ".join(sets)
    if took := [sum(curve.values()) for run in runs if (curve := run.history.get(EPOCH_SECONDS))]:
        yield "epochs took", f"{duration(sum(took))}, finished runs: {len(took)}"


def values_of(groups: Mapping[str, Sequence[RunRecord]], name: str) -> dict[str, list[float]]:
    """Return a quantity of the runs of each group, of those groups that have it."""
    return {group: found for group, runs in groups.items() if (found := quantity(name).values(runs))}


def line_of(groups: Mapping[str, Sequence[RunRecord]], name: str) -> Rows:
    """Return a quantity as a line, a cell a group: its mean, ± its standard deviation; no line where all lack it."""
    what, values = quantity(name), values_of(groups, name)
    cells = dict.fromkeys(groups, NONE)
    for group, each in values.items():
        spread = f" ± {what.text(statistics.stdev(each))}" if len(set(each)) > 1 else ""
        cells[group] = what.text(statistics.fmean(each)) + spread
    return [(what.words, *cells.values())] if values else []
