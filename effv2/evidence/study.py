"""A study as tracked runs show it: the runs that it rests on, and what came out of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from matplotlib.figure import Figure

from effv2.evidence.protocols import complete
from effv2.evidence.quantities import SHOWN, quantity
from effv2.tracking.read import RunRecord
from effv2.tracking.tags import ARM, PLANNED, names_in, reused_in

NONE = "none"  # in a cell: the runs lack the figure
Rows = list[tuple[str, ...]]  # of a table, its titles first
NO_STUDY = RunRecord("", "Single runs", "", {}, {}, {})  # stands for the parent of runs that belong to no study


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
        place = {name: index for index, name in enumerate(names_in(self.parent.tags, PLANNED))}
        return sorted(self.runs, key=lambda run: place.get(run.name, len(place)))


@dataclass(frozen=True)
class StudyResults:
    """What came out of a study, made once for the terminal, the report, MLflow and exports.

    `details` are a second table, of what the first leaves out. Figures are by the words that name their files.
    `missing` says what there should be and isn't. `order` holds networks, the most accurate first. `metrics` and
    `files` (tables and figures by name, and the `document` that is called so) are those of the study's run.
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
    order: Sequence[str] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    document: str = ""
    files: Mapping[str, Sequence[Sequence[Any]] | Figure] = field(default_factory=dict)

    def markdown(self, links: str = "") -> str:
        """Write sentence, links, description, tables and notes as Markdown."""
        tables = [_markdown(rows) for rows in (self.table, self.details) if rows]
        return "\n\n".join(filter(None, (self.sentence, links, self.description, *tables, *self.notes)))


def _markdown(rows: Rows) -> str:
    titles, *others = rows
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, ("---",) * len(titles), *others))


def studies_of(runs: Sequence[RunRecord]) -> list[TrackedStudy]:
    """Return the studies of an experiment in the order of their beginning, then the training runs of none."""
    by_id = {run.run_id: run for run in runs}
    children: dict[str, list[RunRecord]] = {}
    for run in runs:
        children.setdefault(run.parent, []).append(run)
    without = children.pop("", [])
    studies = []
    for run in runs:
        reused = []  # of other studies, under the names that this one has for them, in its arms
        for each, name in reused_in(run.tags).items():
            if each in by_id:
                arm = name.rpartition(", seed ")[0]
                reused.append(replace(by_id[each], name=name, tags=by_id[each].tags | ({ARM: arm} if arm else {})))
        if run.run_id in children or reused or "study.kind" in run.params:
            studies.append(TrackedStudy(run, [*children.get(run.run_id, []), *reused]))
    parents = {study.parent.run_id for study in studies}
    orphans = [run for parent, of_it in children.items() if parent not in parents for run in of_it]
    single = [run for run in complete([*without, *orphans]) if run.run_id not in parents and has_figures(run)]
    return [*studies, *([TrackedStudy(NO_STUDY, single)] if single else [])]


def has_figures(run: RunRecord) -> bool:
    """Say whether a run has any of the main figures of a table of arms."""
    return any(what.values([run]) for what in SHOWN.values() if what.shown == "main")


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
