"""MLflow's saved views of an experiment: its runs by best test accuracy, and the curves of all arms.

MLflow's UI keeps a view that somebody shares in a tag of the experiment, and lists it under `Views`; a link opens it.
"""

import json
import time
from importlib.resources import files
from typing import Any

from mlflow import MlflowClient

from effv2.tracking.tags import NOTE, WRITTEN

KEY = "mlflow.sharedViewState."
TABLE, CURVES = "effv2-table", "effv2-curves"
# What MLflow's UI writes when somebody saves a view: training runs by best test accuracy, and the mean curves of arms.
VIEWS: dict[str, dict[str, Any]] = json.loads(files("effv2.tracking").joinpath("views.json").read_text("utf-8"))


def show_in_ui(experiment_id: str, run_id: str, page: str) -> str:
    """Save both views in the experiment, describe it by links to them and to an artifact of a run; return the links.

    Views that are there stay, as somebody may have changed them; so does a description that isn't ours, or was changed.
    """
    client, now = MlflowClient(), int(time.time() * 1000)
    tags = client.get_experiment(experiment_id).tags
    for key, view in VIEWS.items():
        if f"{KEY}{key}" not in tags:
            value = {"name": view["name"], "createdAt": now, "updatedAt": now, "state": json.dumps(view["state"])}
            client.set_experiment_tag(experiment_id, f"{KEY}{key}", json.dumps(value))
    runs, kind = f"#/experiments/{experiment_id}/runs", "workflowType=machine_learning"
    links = (
        f"[Report]({runs}/{run_id}/artifacts/{page}?{kind}) · "
        f"[{VIEWS[TABLE]['name']}]({runs}?{kind}&viewStateShareKey={TABLE}) · "
        f"[{VIEWS[CURVES]['name']}]({runs}?{kind}&compareRunsMode=CHART&viewStateShareKey={CURVES})"
    )
    if tags.get(NOTE, "") in ("", tags.get(WRITTEN)):
        for tag in (NOTE, WRITTEN):
            client.set_experiment_tag(experiment_id, tag, links)
    return links
