"""Studies from tracked runs: the runs of each study, and the runs that it lacks."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from textwrap import shorten

from effv2.core.errors import listed
from effv2.core.words import counted
from effv2.tracking import tags
from effv2.tracking.read import RunRecord

MOST_NAMED, LONGEST_REASON = 6, 150  # missing runs of a study that are named; characters of a reason
NO_STUDY = RunRecord("", "Single runs", "", {}, {}, {})  # replaces the parent of runs that belong to no study


@dataclass(frozen=True)
class TrackedStudy:
    """A study's own run, or NO_STUDY, and the training runs that the study uses."""

    parent: RunRecord
    runs: Sequence[RunRecord]

    @property
    def kind(self) -> str:
        """Return the command that made it."""
        return self.parent.params.get("study.kind", "")

    @property
    def planned(self) -> list[str]:
        """Return the names of the runs that were planned."""
        return tags.names_in(self.parent.tags, tags.PLANNED)

    def in_order(self) -> list[RunRecord]:
        """Return the runs in their planned order."""
        place = {name: index for index, name in enumerate(self.planned)}
        return sorted(self.runs, key=lambda run: place.get(run.name, len(place)))

    def missing(self) -> str:
        """Describe its missing runs, failed or unfinished. For a search, a diverged run is a valid result."""
        there = {run.name for run in self.runs if run.status == "FINISHED"}
        failed = {run.name: run.tags.get(tags.ERROR) or "unknown reason" for run in self.runs if run.status == "FAILED"}
        lacking = [name for name in self.planned if name not in there | failed.keys()]
        diverged = {name for name, error in failed.items() if error.startswith("Diverged:")}
        hidden = there | (diverged if self.kind == "search" else set())
        errors = [f"{name} ({shorten(error, LONGEST_REASON)})" for name, error in failed.items() if name not in hidden]
        running = any(run.status == "RUNNING" for run in self.runs)
        found = ["it is in progress, or its process died"] if running else []
        for words, names in {"failed": errors, "planned but not finished": lacking}.items():
            found += [f"{counted(len(names), 'run')} {words}: {listed(names, MOST_NAMED, ' / ')}"] if names else []
        found += [] if self.runs else ["it has no runs yet"]
        resumes = self.parent.tags.get(tags.COMMAND) and (lacking or failed.keys() - there - diverged)
        return f"{'; '.join(found)}.{' The command below resumes it.' if resumes else ''}" if found else ""


def studies_of(runs: Sequence[RunRecord]) -> list[TrackedStudy]:
    """Return the studies of an experiment in the order of their beginning, then the training runs without a study."""
    by_id = {run.run_id: run for run in runs}
    children: dict[str, list[RunRecord]] = {}
    for run in runs:
        children.setdefault(run.parent, []).append(run)
    studies = []
    for run in runs:
        of_it = list(children.get(run.run_id, ()))
        for run_id, name in tags.reused_in(run.tags).items():  # with this study's names
            if run_id in by_id:
                arm = arm_in(name)
                own = by_id[run_id].tags | ({tags.ARM: arm} if arm else {})
                of_it.append(replace(by_id[run_id], name=name, tags=own))
        if of_it or "study.kind" in run.params:
            studies.append(TrackedStudy(run, of_it))
    known = {study.parent.run_id for study in studies} | {run.run_id for study in studies for run in study.runs}
    single = [run for run in complete(runs) if run.metrics and not known & {run.run_id, run.parent}]
    return [*studies, *([TrackedStudy(NO_STUDY, single)] if single else [])]


def complete(runs: Iterable[RunRecord]) -> list[RunRecord]:
    """Return the runs that were finished, not pruned."""
    return [run for run in runs if run.status == "FINISHED" and run.tags.get(tags.OUTCOME, "complete") == "complete"]


def arm_in(name: str) -> str:
    """Return the arm in the name of a run; empty if there is none."""
    found = re.fullmatch(r"(.*?)(, split \d+)?, seed \d+", name)
    return found[1] if found else ""
