"""The names of all tags that effv2 writes or reads, and lists of names in tags."""

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import count, takewhile

from effv2.core import provenance

# MLflow's own.
PARENT = "mlflow.parentRunId"
RUN_NAME = "mlflow.runName"
NOTE = "mlflow.note.content"  # the description of a run or experiment in the UI
DATA_CONTEXT = "mlflow.data.context"  # the use of a run's data set: train, validation or test
# The identity of a run.
CONFIG_HASH = "effv2.config_hash"
DATA_DIGEST = "effv2.data_digest"
CODE_VERSION = "effv2.code_version"
IDENTITY = (CONFIG_HASH, DATA_DIGEST, CODE_VERSION)
# What a run is, which process works on it, and how it ended.
STUDY = "effv2.study"
ARM = "effv2.arm"
GROUP = "effv2.group"  # for MLflow's views: the arm, the study, the data and the number of epochs
VARIANT = "effv2.variant"
SEED = "effv2.seed"
COMMAND = "effv2.command"  # of a study's run, or a single run: the command that made it
PID = "effv2.pid"
CREATION = "effv2.creation"  # unique, to find runs that were created twice
PROCESS = "effv2.process"  # the process that works on the run
OUTCOME = "effv2.outcome"  # complete, pruned or failed
ERROR = "effv2.error"
WEIGHTS = "effv2.weights"  # that it started from, and the share of parameters that they supplied
CONTINUES = "effv2.continues"  # of a run that `mlflow run` opened: the run that was resumed instead
# Where a run was computed.
GIT_COMMIT = "effv2.git_commit"
GIT_DIRTY = "effv2.git_dirty"
MACHINE = "effv2.machine."  # followed by the fact about the machine, such as processor
CALIBRATION = "effv2.calibration"
NORMS = "effv2.norms"  # on a CPU: `compiled`, or `torch` without a C++ compiler; they differ by rounding
# Of a study's run.
QUEUE = "effv2.queue"  # the name of the study in Optuna's storage
PLANNED = "effv2.planned"  # the names of all planned runs
SHOWN = "effv2.shown"  # the names of additional columns of its tables
REUSED = "effv2.borrowed"  # finished runs of other studies, in the form of `reused`
ANSWER = "effv2.answer"  # the results, for MLflow's table of runs
BEST_RUN = "effv2.best_run"
LOOKS = "effv2.tested_runs"  # of a search: all trials that were evaluated on the test set, separated by commas
REPORT = "effv2.report"  # of the run that an experiment's report is logged to
WRITTEN = "effv2.note"  # of an experiment: the description that effv2 wrote
# Of a version of a registered model.
PROMOTING = "effv2.promoting"  # its judgement is in progress
PROMOTION = "effv2.promotion."  # followed by a figure of its promotion
LONGEST_TAG = 8_000  # characters; MLflow cuts longer ones


def run_tags(config_hash: str, data_digest: str, code_version: str, variant: str, seed: int) -> dict[str, str]:
    """Return the tags of a run's identity, and of the machine that computes it."""
    known = {CONFIG_HASH: config_hash, DATA_DIGEST: data_digest, CODE_VERSION: code_version}
    machine = {f"{MACHINE}{name}": value for name, value in provenance.machine().items()}
    return known | {VARIANT: variant, SEED: str(seed)} | machine


def as_tags(tag: str, names: Iterable[str]) -> dict[str, str]:
    """Write names as tags: `tag` and, if needed, `tag`.2 and so on."""
    text = json.dumps([*names])
    parts = (text[start : start + LONGEST_TAG] for start in range(0, len(text), LONGEST_TAG))
    return dict(zip(_parts(tag), parts, strict=False))


def names_in(tags: Mapping[str, str], tag: str) -> list[str]:
    """Return the names that `as_tags` wrote."""
    text = "".join(tags[name] for name in takewhile(tags.__contains__, _parts(tag)))
    try:
        names, _ = json.JSONDecoder().raw_decode(text)  # what follows is from an earlier, longer list
        return list(map(str, names))
    except (ValueError, TypeError):  # none, or another program's
        return []


def _parts(tag: str) -> Iterator[str]:
    yield tag
    yield from (f"{tag}.{number}" for number in count(2))


def reused(run_id: str, name: str) -> str:
    """Write that a study reuses a run of another one, with the name that its own run would have."""
    return f"{run_id} {name}"


def reused_in(tags: Mapping[str, str]) -> dict[str, str]:
    """Return the names that `reused` wrote, by run, from the tags of a study's run."""
    return {run_id: name for run_id, _, name in (each.partition(" ") for each in names_in(tags, REUSED))}
