"""Tags that tell a reader of runs what a study is made of."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import count

ARM = "effv2.arm"
COMMAND = "effv2.command"  # of a study's run, and of a run of its own: the command that made it, as it was given
PLANNED = "effv2.planned"  # of a study's run: the names of all runs that it is to have
BORROWED = "effv2.borrowed"  # of a study's run: runs that were finished before, for other studies, as `lent` says
NOTE = "mlflow.note.content"  # what the UI shows as the description of a run, or of an experiment
LOOKS = "effv2.tested_runs"  # of a search's run: all trials that were looked at on the test set, separated by commas
REPORT = "effv2.report"  # of the run that an experiment's report is logged to
LONGEST_TAG = 8_000  # characters; MLflow cuts longer ones


MORE = ""  # the last name in a tag, where the list goes on in the next one


def as_tags(tag: str, names: Iterable[str]) -> dict[str, str]:
    """Write names as tags: `tag`, and as many as they need beside, `tag`.2 and so on."""
    parts: list[list[str]] = [[]]
    for name in names:
        if len(json.dumps([*parts[-1], name, MORE])) > LONGEST_TAG:
            parts[-1].append(MORE)
            parts.append([])
        parts[-1].append(name)
    return {_part(tag, number): json.dumps(part) for number, part in enumerate(parts, 1)}


def names_in(tags: Mapping[str, str], tag: str) -> list[str]:
    """Return the names that `as_tags` wrote."""
    found: list[str] = []
    for number in count(1):
        try:
            found += map(str, json.loads(tags.get(_part(tag, number), "[]")))
        except (ValueError, TypeError):  # somebody else's
            return []
        if found[-1:] != [MORE]:
            break
        found.pop()
    return found


def _part(tag: str, number: int) -> str:
    return tag if number == 1 else f"{tag}.{number}"


def lent(run_id: str, name: str) -> str:
    """Write that a study has a run of another one, and as what: the name that its own would have."""
    return f"{run_id} {name}"


def lent_in(tags: Mapping[str, str]) -> dict[str, str]:
    """Return the names that `lent` wrote by run, of a study's run with these tags."""
    return {run_id: name for run_id, _, name in (each.partition(" ") for each in names_in(tags, BORROWED))}
