"""The studies that an experiment's runs belong to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from effv2.evidence.quantities import QUANTITIES
from effv2.evidence.selection import complete
from effv2.tracking.read import RunRecord
from effv2.tracking.tags import ARM, PLANNED, STUDY, lent_in, names_in

# A table of arms has these figures first; a run that has none of them isn't told of.
MAIN = ("best/test_accuracy", "selected/test_accuracy", "selected/val_accuracy", "time/total_train_seconds")


@dataclass(frozen=True)
class Study:
    """A study's own run and the runs that it rests on; those of no study have no parent."""

    parent: RunRecord | None
    runs: Sequence[RunRecord]

    @property
    def kind(self) -> str:
        """Return which command made it."""
        return "" if self.parent is None else self.parent.params.get("study.kind", "")

    def in_order(self) -> list[RunRecord]:
        """Return the runs in the order in which they were planned, whichever worker was quicker."""
        planned = names_in(self.parent.tags, PLANNED) if self.parent else []
        place = {name: index for index, name in enumerate(planned)}
        return sorted(self.runs, key=lambda run: place.get(run.name, len(place)))

    def baseline(self, arms: Iterable[str]) -> str:
        """Return the arm that the others are held against: the study's own, else the first; empty without a study."""
        if self.parent is None:
            return ""
        known, own = list(arms), self.parent.params.get("study.baseline", "")
        return own if own in known else known[0]


def studies_of(runs: Sequence[RunRecord]) -> list[Study]:
    """Return the studies of an experiment in the order of their beginning, then the training runs of none."""
    by_id = {run.run_id: run for run in runs}
    children: dict[str, list[RunRecord]] = {}
    for run in runs:
        children.setdefault(run.parent, []).append(run)
    alone = children.pop("", [])
    studies = []
    for run in runs:
        names = lent_in(run.tags)
        lent = [_as_lent(by_id[each], name) for each, name in names.items() if each in by_id]
        if run.run_id in children or lent or "study.kind" in run.params:
            studies.append(Study(run, [*children.get(run.run_id, []), *lent]))
    parents = {study.parent.run_id for study in studies if study.parent is not None}
    orphans = [run for parent, of_it in children.items() if parent not in parents for run in of_it]
    single = [run for run in complete([*alone, *orphans]) if run.run_id not in parents and has_figures(run)]
    return [*studies, *([Study(None, single)] if single else [])]


def has_figures(run: RunRecord) -> bool:
    """Say whether a run has any of the figures that a table of arms has."""
    return any(QUANTITIES[name].value(run) is not None for name in MAIN)


def _as_lent(run: RunRecord, name: str) -> RunRecord:
    """Return a run of another study as this one has it: under its name, in its arm."""
    arm = name.rpartition(", seed ")[0]
    return replace(run, name=name, tags=run.tags | ({ARM: arm} if arm else {}))


def arm_of(run: RunRecord) -> str:
    """Return how a run's arm is called."""
    return run.tags.get(ARM) or run.tags.get(STUDY) or run.params.get("model.variant") or run.name
