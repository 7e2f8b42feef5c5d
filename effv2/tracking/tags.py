"""The names of all tags that are written or read here, and lists of names kept in tags."""

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import count, takewhile

from effv2.core import provenance

# MLflow's own.
PARENT = "mlflow.parentRunId"
RUN_NAME = "mlflow.runName"
NOTE = "mlflow.note.content"  # what the UI shows as the description of a run, or of an experiment
DATA_CONTEXT = "mlflow.data.context"  # of a data set of a run: train, validation or test
# What a run is known by.
CONFIG_HASH = "effv2.config_hash"
DATA_DIGEST = "effv2.data_digest"
CODE_VERSION = "effv2.code_version"
IDENTITY = (CONFIG_HASH, DATA_DIGEST, CODE_VERSION)
# What it is, who works on it, and how it ended.
STUDY = "effv2.study"
ARM = "effv2.arm"
VARIANT = "effv2.variant"
SEED = "effv2.seed"
COMMAND = "effv2.command"  # of a study's run, and of a run of its own: the command that made it, as it was given
PID = "effv2.pid"
CREATION = "effv2.creation"  # unique, by which those are found that were created twice
PROCESS = "effv2.process"  # the process that works on the run
OUTCOME = "effv2.outcome"  # complete, pruned or failed
ERROR = "effv2.error"
WEIGHTS = "effv2.weights"  # that it started from, and which share of its parameters they gave
CONTINUES = "effv2.continues"  # of a run that `mlflow run` opened: the run that was resumed instead
# Where it was computed.
GIT_COMMIT = "effv2.git_commit"
GIT_DIRTY = "effv2.git_dirty"
MACHINE = "effv2.machine."  # and what of the machine it is, as processor
CALIBRATION = "effv2.calibration"
# Of a study's run.
QUEUE = "effv2.queue"  # the name of the study in Optuna's storage
PLANNED = "effv2.planned"  # the names of all runs that it is to have
SHOWN = "effv2.shown"  # the names of what its tables show besides the usual
REUSED = "effv2.borrowed"  # runs that were finished before, for other studies, as `reused` writes them
ANSWER = "effv2.answer"  # what came out, for MLflow's table of runs
BEST_RUN = "effv2.best_run"
LOOKS = "effv2.tested_runs"  # of a search: all trials that were looked at on the test set, separated by commas
REPORT = "effv2.report"  # of the run that an experiment's report is logged to
WRITTEN = "effv2.note"  # of an experiment: the description as we wrote it
# Of a version of a registered model.
PROMOTING = "effv2.promoting"  # it is being judged
PROMOTION = "effv2.promotion."  # and a figure that it was promoted for
LONGEST_TAG = 8_000  # characters; MLflow cuts longer ones


def run_tags(config_hash: str, data_digest: str, code_version: str, variant: str, seed: int) -> dict[str, str]:
    """Return the tags that a run is known by, and what it is computed on."""
    known = {CONFIG_HASH: config_hash, DATA_DIGEST: data_digest, CODE_VERSION: code_version}
    machine = {f"{MACHINE}{name}": value for name, value in provenance.machine().items()}
    return known | {VARIANT: variant, SEED: str(seed)} | machine


def as_tags(tag: str, names: Iterable[str]) -> dict[str, str]:
    """Write names as tags: `tag`, and as many as they need beside, `tag`.2 and so on."""
    text = json.dumps([*names])
    parts = (text[start : start + LONGEST_TAG] for start in range(0, len(text), LONGEST_TAG))
    return dict(zip(_parts(tag), parts, strict=False))


def names_in(tags: Mapping[str, str], tag: str) -> list[str]:
    """Return the names that `as_tags` wrote."""
    text = "".join(tags[name] for name in takewhile(tags.__contains__, _parts(tag)))
    try:
        names, _ = json.JSONDecoder().raw_decode(text)  # what follows is the rest of a longer list of before
        return list(map(str, names))
    except (ValueError, TypeError):  # none, or somebody else's
        return []


def _parts(tag: str) -> Iterator[str]:
    yield tag
    yield from (f"{tag}.{number}" for number in count(2))


def reused(run_id: str, name: str) -> str:
    """Write that a study reuses a run of another one, and under which name: that which its own would have."""
    return f"{run_id} {name}"


def reused_in(tags: Mapping[str, str]) -> dict[str, str]:
    """Return the names that `reused` wrote by run, of a study's run with these tags."""
    return {run_id: name for run_id, _, name in (each.partition(" ") for each in names_in(tags, REUSED))}
