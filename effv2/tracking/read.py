"""Runs read back as plain data, for tables, figures and verdicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field

from mlflow import MlflowClient
from mlflow.entities import Run

from effv2.tracking.run import OUTCOME

PARENT = "mlflow.parentRunId"


@dataclass(frozen=True)
class Identity:
    """What decides the numbers of a run."""

    config_hash: str
    data_digest: str
    code_version: str

    def tags(self) -> dict[str, str]:
        """Return it as tags of a run."""
        return {f"effv2.{name}": value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class RunRecord:
    """A tracked run: parameters, last metrics and tags as logged; `history` maps a metric to {epoch: value}."""

    run_id: str
    name: str
    status: str
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]
    history: dict[str, dict[int, float]] = field(default_factory=dict)


def find_finished(identity: Identity, experiment_id: str, parent: str = "") -> RunRecord | None:
    """Return the last run of the experiment that was finished, not pruned, with this identity; None without one.

    With `parent`, among the children of that run alone.
    """
    wanted = identity.tags() | ({PARENT: parent} if parent else {})
    found = _find(wanted, experiment_id, "attributes.status = 'FINISHED'")
    return next((_record(run, {}) for run in found if run.data.tags.get(OUTCOME) == "complete"), None)


def find_ended_early(identity: Identity, experiment_id: str) -> RunRecord | None:
    """Return the last run of the experiment with this identity that failed or was killed; None without one.

    Those that belong to a study are left to it.
    """
    found = _find(identity.tags(), experiment_id, "attributes.status != 'FINISHED'")
    ended = (run for run in found if run.info.status in ("FAILED", "KILLED") and PARENT not in run.data.tags)
    return next((_record(run, {}) for run in ended), None)


def find_outdated(identity: Identity, experiment_id: str) -> tuple[str, str] | None:
    """Return the last run that ended early with this configuration but other data or code, and how it differs."""
    tags = identity.tags()
    same = {"effv2.config_hash": tags["effv2.config_hash"]}
    for run in _find(same, experiment_id, "attributes.status != 'FINISHED'"):
        differing = [name for name, value in tags.items() if run.data.tags.get(name) != value]
        if run.info.status in ("FAILED", "KILLED") and differing and PARENT not in run.data.tags:
            words = (f"{name[6:]} was {run.data.tags.get(name)}, is {tags[name]}" for name in differing)
            return run.info.run_id, ", ".join(words)
    return None


def find_running(experiment_id: str, parent: str) -> list[RunRecord]:
    """Return a run's children that are marked as running."""
    condition = f"attributes.status = 'RUNNING' and tags.`{PARENT}` = '{parent}'"
    return [_record(run, {}) for run in MlflowClient().search_runs([experiment_id], condition)]


def _find(tags: Mapping[str, str], experiment_id: str, condition: str) -> list[Run]:
    wanted = " and ".join([condition, *(f"tags.`{name}` = '{value}'" for name, value in tags.items())])
    return list(MlflowClient().search_runs([experiment_id], wanted, order_by=["attributes.start_time DESC"]))


def read_runs(run_ids: Iterable[str], histories: Iterable[str]) -> list[RunRecord]:
    """Read runs with the histories of the named metrics."""
    client = MlflowClient()
    names = list(histories)
    records = []
    for run_id in run_ids:
        run = client.get_run(run_id)
        history = {
            name: {m.step: m.value for m in client.get_metric_history(run_id, name)}
            for name in names
            if name in run.data.metrics
        }
        records.append(_record(run, history))
    return records


def _record(run: Run, history: dict[str, dict[int, float]]) -> RunRecord:
    info, data = run.info, run.data
    return RunRecord(info.run_id, info.run_name, info.status, data.params, data.metrics, data.tags, history)
