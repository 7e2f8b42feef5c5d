"""Published networks evaluated under one parent run, and ranked there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from effv2.config.options import LogModel
from effv2.config.schema import ExecutionConfig
from effv2.core import provenance
from effv2.core.errors import RunError, is_out_of_memory
from effv2.core.processes import this_process
from effv2.core.reporter import Reporter
from effv2.core.resources import is_out_of_memory
from effv2.evidence.publication import publish_study, read_results
from effv2.evidence.study import StudyResults
from effv2.execution.device import make_execution
from effv2.execution.resolve import resolve_device
from effv2.pretrained.config import PretrainedConfig
from effv2.pretrained.evaluation import (
    KIND,
    Entry,
    Session,
    code_version,
    evaluate_one,
    log_network,
    run_tags,
    short_hash,
)
from effv2.pretrained.images import choose_images
from effv2.pretrained.weights import Requested, find_all_weights, load_network
from effv2.tracking.read import Identity, RunRecord, find_ended_early, find_finished
from effv2.tracking.recovery import open_experiment
from effv2.tracking.run import TrackedRun, open_parent, point_adopted_run_to, run_address, working_on
from effv2.tracking.store import TrackingError
from effv2.tracking.tags import COMMAND, FRESH, OUTCOME, PROCESS, VARIANT
from effv2.tracking.writer import TrackedRun

LONGEST_NAME = 200  # characters of a run's name


@dataclass(frozen=True)
class Ending:
    """The run of a comparison, its results where anything was evaluated, why networks failed, models now logged."""

    parent: TrackedRun
    results: StudyResults | None
    failed: Mapping[str, str]
    runs: Mapping[str, str]  # by label
    models: Mapping[str, str] = field(default_factory=dict)


def evaluate_pretrained(
    requests: Sequence[Requested],
    config: PretrainedConfig,
    reporter: Reporter,
    *,
    weights_dir: Path | None,
    experiment: str,
    fresh: bool,
    log_model: LogModel,
    show_downloads: bool,
) -> Ending:
    """Evaluate and rank networks; what was finished before with the same weights and images is not repeated.

    InputError, before any run is created, for wrong images and weights; RunError if the tracking store fails.
    """
    images = choose_images(config.data)
    device = resolve_device(config.execution.device)
    precision = "bf16" if config.execution.precision == "bf16" else "fp32"
    resolved = config.execution.model_copy(update={"device": device, "precision": precision})
    config = config.model_copy(update={"execution": resolved})
    session = Session(config, images, make_execution(ExecutionConfig(device=device, precision=precision)), reporter)
    files = find_all_weights(requests, weights_dir, show_downloads)
    for requested, file in zip(requests, files, strict=True):
        load_network(requested, file)  # so that what can't be loaded is known before anything is computed
    entries = [session.entry(requested, file) for requested, file in zip(requests, files, strict=True)]
    experiment_id = open_experiment(experiment, reporter.message)
    try:
        ending = _evaluate(session, entries, experiment_id, fresh)
        if ending.results is None:
            return ending
        return replace(ending, models=_log_models(session, entries, ending.runs, ending.results.order, log_model))
    except TrackingError as error:
        raise RunError(f"The tracking store failed ({error}); mend it and give the same command again.") from error


def _evaluate(session: Session, entries: Sequence[Entry], experiment_id: str, fresh: bool) -> Ending:
    labels = [entry.requested.label for entry in entries]
    deciding = [[entry.identity.config_hash, entry.identity.data_digest] for entry in entries]
    data = short_hash(sorted({entry.identity.data_digest for entry in entries}))
    identity = Identity(short_hash([labels, deciding]), data, code_version())
    finished = None if fresh else find_finished(identity, experiment_id)
    left = None if fresh else find_ended_early(identity, experiment_id, finished)
    among = left.run_id if left is not None and FRESH in left.tags else ""
    runs = {} if fresh else _finished(entries, experiment_id, among)
    if left is None and finished is not None and len(runs) == len(entries):
        parent = TrackedRun(finished.run_id, experiment_id)
        point_adopted_run_to(parent)
        session.reporter.message("Finished before, with the same weights, images and code; --fresh repeats it.")
        return Ending(parent, read_results(parent), {}, runs)

    parent = (
        _new_parent(session, identity, labels, experiment_id, fresh)
        if left is None
        else _taken_over(left, experiment_id)
    )
    point_adopted_run_to(parent)
    session.reporter.message(run_address(parent.run_id, parent.experiment_id))
    with working_on(parent):
        failed = _evaluate_all(session, entries, parent, runs)
        results = publish_study(parent, runs) if runs else None
        if not failed:
            parent.set_tags({OUTCOME: "complete"})
    if failed:
        parent.set_status("FAILED")
    return Ending(parent, results, failed, runs)


def _evaluate_all(
    session: Session, entries: Sequence[Entry], parent: TrackedRun, runs: dict[str, str]
) -> dict[str, str]:
    """Evaluate what `runs` lacks and add it there; return why networks failed: one doesn't cost the others."""
    failed: dict[str, str] = {}
    for entry in entries:
        label = entry.requested.label
        if label in runs:
            session.reporter.message(f"{label} was evaluated before, with the same weights, images and code.")
            continue
        try:
            runs[label] = evaluate_one(session, entry, parent)
        except RunError as error:
            failed[label] = str(error)
        except (RuntimeError, MemoryError, ValueError, OSError) as error:
            text = (
                "out of memory; lower --batch-size" if is_out_of_memory(error) else f"{type(error).__name__}: {error}"
            )
            failed[label] = " ".join(text.split())[:300]
    return failed


def _finished(entries: Sequence[Entry], experiment_id: str, parent: str) -> dict[str, str]:
    """Return the runs that evaluated the same before, by label; those of one comparison where `parent` is given."""
    found = {entry.requested.label: find_finished(entry.identity, experiment_id, parent) for entry in entries}
    return {label: record.run_id for label, record in found.items() if record is not None}


def _taken_over(left: RunRecord, experiment_id: str) -> TrackedRun:
    """Return the run of the same comparison that ended early, which is ours from now on."""
    run = TrackedRun(left.run_id, experiment_id)
    run.set_tags({PROCESS: this_process()})
    return run


def _new_parent(
    session: Session, identity: Identity, labels: Sequence[str], experiment_id: str, fresh: bool
) -> TrackedRun:
    tags = run_tags(identity, session) | {VARIANT: ",".join(labels), COMMAND: provenance.command()}
    tags |= {FRESH: "true"} if fresh else {}
    name = f"{KIND} {session.images.name}: {', '.join(labels)}"[:LONGEST_NAME]
    parent = open_parent(name, experiment_id, tags)
    parent.log_params(session.config.flat() | {"study.kind": KIND, "study.models": ",".join(labels)})
    parent.log_git(provenance.git_state())
    return parent


def _log_models(
    session: Session, entries: Sequence[Entry], runs: Mapping[str, str], order: Sequence[str], which: LogModel
) -> dict[str, str]:
    """Log the networks that are wanted to the runs that evaluated them, those that have none; return addresses."""
    logged: dict[str, str] = {}
    wanted = {"all": order, "best": order[:1], "none": []}[which]
    for entry in entries:
        label = entry.requested.label
        if label not in wanted:
            continue
        run = TrackedRun(runs[label], "")
        if not run.model_address():
            logged[label] = log_network(entry, session.images, run)
    return logged
