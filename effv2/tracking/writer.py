"""Writing to one run: params, metrics, tags, data sets, artifacts, its model and its status.

This module also writes the views of the experiment: MLflow's UI stores a shared view in a tag, listed under `Views`.
"""

import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from effv2.core.errors import InputError, LeaseLost, Terminated
from effv2.core.internals import latest_steps
from effv2.core.provenance import git_state
from effv2.core.secrets import masked_values
from effv2.tracking.addresses import shown_uri, ui_address
from effv2.tracking.models import log_served_model
from effv2.tracking.store import MlflowClient
from effv2.tracking.tags import CONTINUES, DATA_CONTEXT, GIT_COMMIT, GIT_DIRTY, LONGEST_TAG, NOTE, WRITTEN

Item = Metric | Param | RunTag | Callable[[], None]  # a value (a call takes many), or a separate call
LatestSteps = dict[str, int]  # the last step of each metric that the run has
TRAINING_VIEW = "workflowType=machine_learning"  # of the UI's addresses
SHARED_VIEW, CURVES = "mlflow.sharedViewState.", "effv2-curves"
# In the form that MLflow's UI writes when a user saves a view: answers of studies, training runs by best test accuracy,
# and the mean curves of arms.
VIEWS: dict[str, dict[str, Any]] = json.loads(files("effv2.tracking").joinpath("views.json").read_text("utf-8"))


def send(run_id: str, items: Sequence[Item], known: LatestSteps | None = None) -> None:
    """Make calls, which may be repeated, and send values together, without metrics that the run has (`known`).

    An empty `known` is filled from the store. There is one value per metric and step, and steps are sent in order.
    """
    client = MlflowClient()
    for item in items:
        if callable(item):
            item()
    metrics = [item for item in items if isinstance(item, Metric)]
    if known is not None and metrics:
        known |= {} if known else latest_steps(client.get_run(run_id))
        metrics = [item for item in metrics if item.step > known.get(item.key, -1)]
        known |= {item.key: item.step for item in metrics}
    params = {item.key: item for item in items if isinstance(item, Param)}
    tags = {item.key: item for item in items if isinstance(item, RunTag)}
    client.log_batch(run_id, metrics, [*params.values()], [*tags.values()])  # in parts that the server accepts


class TrackedRun:
    """Writes to one run, immediately."""

    def __init__(self, run_id: str, experiment_id: str) -> None:
        self.run_id, self.experiment_id = run_id, experiment_id

    def _send(self, *items: Item) -> None:
        send(self.run_id, items)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log parameters under dotted names, which never collide with those that `mlflow run` logs."""
        self._send(*(Param(name, str(value)) for name, value in params.items()))

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log metrics, at `step` if they belong to an epoch."""
        now = int(time.time() * 1000)
        self._send(*(Metric(name, float(value), now, step) for name, value in metrics.items()))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags. Long values are cut and secrets are masked."""
        self._send(*(RunTag(name, value[:LONGEST_TAG]) for name, value in masked_values(tags).items()))

    def describe(self, markdown: str) -> None:
        """Set the description that the UI shows, cut at the last line that fits."""
        fits = len(markdown) <= LONGEST_TAG
        self.set_tags({NOTE: markdown if fits else markdown[:LONGEST_TAG].rpartition("\n")[0]})

    def log_dataset(self, name: str, context: str, digest: str, location: str, profile: Mapping[str, Any]) -> None:
        """Record a data set that the run used as `context` (train, validation or test)."""
        source, about = json.dumps({"uri": location}), json.dumps(dict(profile))
        dataset = Dataset(name=name, digest=digest, source_type="local", source=source, profile=about)
        used = [DatasetInput(dataset, [InputTag(DATA_CONTEXT, context)])]
        self._send(lambda: MlflowClient().log_inputs(self.run_id, used))

    def log_git(self) -> None:
        """Record commit and dirty flag of the checkout as tags, the uncommitted changes as an artifact."""
        if (state := git_state()) is not None:
            commit, changes = state
            self.set_tags({GIT_COMMIT: commit, GIT_DIRTY: str(bool(changes)).lower()})
            if changes:
                self.log_text(changes, "source/uncommitted.diff")

    def log_text(self, text: str, name: str) -> None:
        """Store a text as an artifact."""
        self._send(lambda: MlflowClient().log_text(self.run_id, text, name))

    @contextmanager
    def new_artifacts(self) -> Iterator[Path]:
        """Open a folder for artifacts; those that are written into it are uploaded at the end."""
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
            self._send(lambda: MlflowClient().log_artifacts(self.run_id, folder))

    def log_model(self, files: Mapping[str, Path], example: str) -> None:
        """Log the served model, as log_served_model does."""
        self._send(lambda: log_served_model(self.run_id, files, example))

    def discard(self, name: str) -> None:
        """Delete an artifact, or a folder of artifacts, if it exists and the store permits it."""
        self._send(lambda: discard(self.run_id, name))

    def set_status(self, status: str) -> None:
        """Set the status of a run that isn't open here: RUNNING or how it ended. An equal status keeps the end time."""
        client = MlflowClient()
        if client.get_run(self.run_id).info.status == status:
            return
        if status == "RUNNING":
            client.update_run(self.run_id, status)
        else:
            client.set_terminated(self.run_id, status)

    def take_over_adopted(self) -> None:
        """Make the run that `mlflow run` opened, if any, a pointer to this earlier one."""
        if adopted := os.environ.pop("MLFLOW_RUN_ID", ""):
            pointer = TrackedRun(adopted, self.experiment_id)
            pointer.set_tags({CONTINUES: self.run_id})
            pointer.describe(f"This command resumed, or found finished, {run_address(self.run_id, self.experiment_id)}")


def check_metric_name(name: str) -> None:
    """Refuse the name of a metric that MLflow would refuse, after a split and a slash: InputError."""
    if not re.fullmatch(r"\w[\w .-]{0,99}(/\w[\w .-]{0,99})?", name):
        problem = "MLflow logs no metric of this name"
        raise InputError("EPOCH_METRICS", name, problem, "use letters, digits, spaces and _ . - alone")


def status_after(error: BaseException) -> str:
    """Return the status of a run that `error` ended."""
    return "KILLED" if isinstance(error, (KeyboardInterrupt, Terminated, LeaseLost)) else "FAILED"


def run_address(run_id: str, experiment_id: str) -> str:
    """Describe where to see the run: its page on a server, or the command that opens the UI on the store."""
    if server := ui_address():
        return f"{server}/{page_of(experiment_id, run_id)}"
    return f"run {run_id} in {shown_uri()}; see it with: effv2 ui"


def page_of(experiment_id: str, run_id: str, artifact: str = "") -> str:
    """Return the page of a run, or of an artifact of it, in the view for model training, not MLflow's default view."""
    return f"#/experiments/{experiment_id}/runs/{run_id}{artifact and f'/artifacts/{artifact}'}?{TRAINING_VIEW}"


def discard(run_id: str, name: str, but: str = "") -> None:
    """Delete an artifact of a run, or all artifacts in a folder except one, as far as the store permits it."""
    client = MlflowClient()
    here = [file for file in client.list_artifacts(run_id, name.rpartition("/")[0] or None) if file.path == name]
    found = client.list_artifacts(run_id, name) if here and here[0].is_dir else here
    repository = get_artifact_repository(client.get_run(run_id).info.artifact_uri)
    for file in found:
        if PurePosixPath(file.path).name != but:
            with suppress(MlflowException, NotImplementedError, OSError):
                repository.delete_artifacts(file.path)  # type: ignore[no-untyped-call]


def show_in_ui(experiment_id: str, run_id: str, page: str) -> str:
    """Save the views in the experiment, describe it by links to them and to an artifact of a run; return the links.

    Existing views are kept, because a user may have changed them. So is a description that effv2 didn't write, or that
    was changed.
    """
    client, now = MlflowClient(), int(time.time() * 1000)
    tags = client.get_experiment(experiment_id).tags
    runs = f"#/experiments/{experiment_id}/runs"
    links = [f"[Report]({page_of(experiment_id, run_id, page)})"]
    for key, view in VIEWS.items():
        if f"{SHARED_VIEW}{key}" not in tags:
            value = {"name": view["name"], "createdAt": now, "updatedAt": now, "state": json.dumps(view["state"])}
            client.set_experiment_tag(experiment_id, f"{SHARED_VIEW}{key}", json.dumps(value))
        charts = "&compareRunsMode=CHART" if key == CURVES else ""
        links.append(f"[{view['name']}]({runs}?{TRAINING_VIEW}{charts}&viewStateShareKey={key})")
    text = " · ".join(links)
    if tags.get(NOTE, "") in ("", tags.get(WRITTEN)):
        for tag in (NOTE, WRITTEN):
            client.set_experiment_tag(experiment_id, tag, text)
    return text
