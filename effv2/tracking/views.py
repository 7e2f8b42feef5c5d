"""MLflow's saved views of an experiment: its runs by best test accuracy, and the curves of all arms.

MLflow's UI keeps a view that somebody shares in a tag of the experiment, and lists it under `Views`; a link opens it.
"""

import json
import time
from importlib.resources import files
from typing import Any

from mlflow import MlflowClient

from effv2.tracking.store import shown_uri
from effv2.tracking.tags import NOTE, WRITTEN

KEY = "mlflow.sharedViewState."
TABLE, CURVES = "effv2-table", "effv2-curves"
# What MLflow's UI writes when somebody saves a view: training runs by best test accuracy, and the mean curves of arms.
VIEWS: dict[str, dict[str, Any]] = json.loads(files("effv2.tracking").joinpath("views.json").read_text("utf-8"))


def save_views(experiment_id: str) -> None:
    """Save both views in the experiment, unless they are there, maybe changed by somebody."""
    client = MlflowClient()
    experiment = client.get_experiment(experiment_id)
    now = int(time.time() * 1000)
    for key, view in VIEWS.items():
        if f"{KEY}{key}" not in experiment.tags:
            value = {"name": view["name"], "createdAt": now, "updatedAt": now, "state": json.dumps(view["state"])}
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
        f"[{VIEWS[TABLE]['name']}]({base}&viewStateShareKey={TABLE}) · "
        f"[{VIEWS[CURVES]['name']}]({base}&compareRunsMode=CHART&viewStateShareKey={CURVES})"
    )


def artifact_link(experiment_id: str, run_id: str, name: str) -> str:
    """Return where the UI shows an artifact of a run, relative to the server."""
    return f"#/experiments/{experiment_id}/runs/{run_id}/artifacts/{name}?workflowType=machine_learning"


def ui_address() -> str:
    """Return the address of the server's pages; empty where the tracking store is no server."""
    uri = shown_uri()
    return uri.rstrip("/") if uri.startswith("http") else ""
