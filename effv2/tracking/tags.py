"""Tags that tell a reader of runs what a study is made of."""

from __future__ import annotations

import json
from collections.abc import Iterable

ARM = "effv2.arm"
COMMAND = "effv2.command"  # of a study's run, and of a run of its own: the command that made it, as it was given
PLANNED = "effv2.planned"  # of a study's run: the names of all runs that it is to have
BORROWED = "effv2.borrowed"  # of a study's run: runs that were finished before, for other studies, as `lent` says
NOTE = "mlflow.note.content"  # what the UI shows as the description of a run, or of an experiment
REPORT = "effv2.report"  # of the run that an experiment's report is logged to
LONGEST_TAG = 8_000  # characters; MLflow cuts longer ones


def as_tag(names: Iterable[str]) -> str:
    """Write names as the value of a tag; none of them where they are too many for one."""
    text = json.dumps(list(names))
    return text if len(text) <= LONGEST_TAG else "[]"


def lent(run_id: str, name: str) -> str:
    """Write that a study has a run of another one, and as what: the name that its own would have."""
    return f"{run_id} {name}"


def lent_in(tag: str) -> dict[str, str]:
    """Return the names that `lent` wrote by run."""
    return {run_id: name for run_id, _, name in (each.partition(" ") for each in names_in(tag))}


def names_in(tag: str) -> list[str]:
    """Return the names that `as_tag` wrote."""
    try:
        return list(map(str, json.loads(tag or "[]")))
    except ValueError:  # somebody else's
        return []
