"""Runs read back as plain data, for tables, figures and verdicts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from mlflow import MlflowClient


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
        info = run.info
        records.append(
            RunRecord(
                info.run_id, info.run_name, info.status, run.data.params, run.data.metrics, run.data.tags, history
            )
        )
    return records
