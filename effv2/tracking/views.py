"""MLflow's saved views of an experiment: its runs by best test accuracy, and the curves of all arms.

MLflow's UI keeps a view that somebody shares in a tag of the experiment, and lists it under `Views`; a link opens it.
"""

from __future__ import annotations

import json
import time
from typing import Any

from mlflow import MlflowClient

from effv2.tracking.store import shown_uri
from effv2.tracking.tags import ARM, NOTE, WRITTEN

KEY = "mlflow.sharedViewState."
TABLE, CURVES = "effv2-table", "effv2-curves"
NAMES = {TABLE: "Runs by best test accuracy", CURVES: "Curves of all arms"}
BEST = "metrics.`best/test_accuracy`"
COLUMNS = (
    f"tags.`{ARM}`",
    "tags.`effv2.seed`",
    BEST,
    "metrics.`selected/test_accuracy`",
    "metrics.`time/total_train_seconds`",
)
DRAWN = ("test/accuracy", "train/accuracy", "val/accuracy", "test/loss")
# Training runs alone, without those of studies: sorted by a metric, they aren't folded away.
FACETS = {
    "searchFilter": "metrics.`selected/epoch` > 0",
    "orderByKey": BEST,
    "orderByAsc": False,
    "startTime": "ALL",
    "lifecycleFilter": "Active",
    "datasetsFilter": [],
    "modelVersionFilter": "All Runs",
    "selectedColumns": COLUMNS,
    "columnOrder": COLUMNS,
}


def save_views(experiment_id: str) -> None:
    """Save both views in the experiment, unless they are there, maybe changed by somebody."""
    client = MlflowClient()
    experiment = client.get_experiment(experiment_id)
    now = int(time.time() * 1000)
    for key, state in ((TABLE, _table()), (CURVES, _curves())):
        if f"{KEY}{key}" not in experiment.tags:
            value = {"name": NAMES[key], "createdAt": now, "updatedAt": now, "state": json.dumps(state)}
            client.set_experiment_tag(experiment_id, f"{KEY}{key}", json.dumps(value))


def describe_experiment(experiment_id: str, words: str) -> None:
    """Set the description of an experiment, unless the user wrote one, or something into ours."""
    client = MlflowClient()
    tags = client.get_experiment(experiment_id).tags
    if tags.get(NOTE, "") in ("", tags.get(WRITTEN)):
        client.set_experiment_tag(experiment_id, NOTE, words)
        client.set_experiment_tag(experiment_id, WRITTEN, words)


def view_links(experiment_id: str) -> str:
    """Return links to both views, in Markdown."""
    base = f"#/experiments/{experiment_id}/runs?workflowType=machine_learning"
    return (
        f"[{NAMES[TABLE]}]({base}&viewStateShareKey={TABLE}) · "
        f"[{NAMES[CURVES]}]({base}&compareRunsMode=CHART&viewStateShareKey={CURVES})"
    )


def artifact_link(experiment_id: str, run_id: str, name: str) -> str:
    """Return where the UI shows an artifact of a run, relative to the server."""
    return f"#/experiments/{experiment_id}/runs/{run_id}/artifacts/{name}?workflowType=machine_learning"


def ui_address() -> str:
    """Return the address of the server's pages; empty where the tracking store is no server."""
    uri = shown_uri()
    return uri.rstrip("/") if uri.startswith("http") else ""


def _table() -> dict[str, Any]:
    return {**FACETS, "columnWidths": {COLUMNS[0]: 160, BEST: 170, COLUMNS[3]: 190, COLUMNS[4]: 200}}


def _curves() -> dict[str, Any]:
    section = {"uuid": "curves", "name": "Curves", "display": True, "columns": 2, "cardHeight": 420}
    return {
        **FACETS,
        "runsHiddenMode": "SHOW_ALL",
        "groupBy": {"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": ARM}]},
        "useGroupedValuesInCharts": True,
        "isAccordionReordered": True,
        "hideEmptyCharts": True,
        "compareRunSections": [{**section, "isReordered": True, "deleted": False, "isGenerated": False}],
        "compareRunCharts": [_line(metric) for metric in DRAWN],
    }


def _line(metric: str) -> dict[str, Any]:
    return {
        "uuid": f"line-{metric}",
        "type": "LINE",
        "metricSectionId": "curves",
        "displayName": metric,
        "metricKey": metric,
        "selectedMetricKeys": [metric],
        "deleted": False,
        "isGenerated": False,
        "runsCountToCompare": 100,
        "xAxisKey": "step",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "scaleType": "linear",
        "xAxisScaleType": "linear",
        "lineSmoothness": 0,
        "selectedXAxisMetricKey": "",
        "range": {},
        "ignoreOutliers": False,
        "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
    }
