"""One MLflow run: opened or adopted, filled, and ended with the status it deserves."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Dataset as TrackedDataset
from mlflow.entities import DatasetInput, InputTag, RunInfo, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking.context.registry import resolve_tags

from effv2.errors import Abandoned, Terminated
from effv2.liveness import this_process
from effv2.provenance import GitState
from effv2.serving import image_classifier_path
from effv2.tracking.store import TRACKING_ERRORS, impatient, shown_uri

OUTCOME = "effv2.outcome"  # tag: complete, pruned or failed
PROCESS = "effv2.process"  # tag: the process that works on the run
NOTE = "mlflow.note.content"  # the tag that the UI shows as the run's description
LONGEST_TAG = 8_000  # characters; MLflow cuts longer ones
GENERATED_NAME = re.compile(r"[a-z]+-[a-z]+-\d+")  # what MLflow calls a run that nobody named


class TrackedRun:
    """Writes to one open run."""

    def __init__(self, run_id: str, experiment_id: str) -> None:
        self.run_id, self.experiment_id = run_id, experiment_id

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log parameters under dotted names, which never collide with those that `mlflow run` logs."""
        mlflow.log_params(dict(params), run_id=self.run_id)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics in one call, at `step` where they belong to an epoch."""
        mlflow.log_metrics(dict(metrics), step=step, run_id=self.run_id)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags in one call."""
        entities = [RunTag(name, value[:LONGEST_TAG]) for name, value in tags.items()]
        mlflow.MlflowClient().log_batch(self.run_id, tags=entities)

    def describe(self, markdown: str) -> None:
        """Set the description that the UI shows, cut at the last line that fits."""
        if len(markdown) > LONGEST_TAG:
            markdown = markdown[:LONGEST_TAG].rpartition("\n")[0]
        self.set_tags({NOTE: markdown})

    def log_dataset(self, name: str, context: str, digest: str, location: str, profile: Mapping[str, Any]) -> None:
        """Record a data set that the run used as `context` (train, validation or test)."""
        dataset = TrackedDataset(
            name=name,
            digest=digest,
            source_type="local",
            source=json.dumps({"uri": location}),
            schema=None,
            profile=json.dumps(dict(profile)),
        )
        tag = InputTag("mlflow.data.context", context)
        mlflow.MlflowClient().log_inputs(self.run_id, [DatasetInput(dataset, [tag])])

    def log_git(self, state: GitState | None) -> None:
        """Record commit and dirty flag as tags, the uncommitted changes as an artifact."""
        if state is None:
            return
        self.set_tags({"effv2.git_commit": state.commit, "effv2.git_dirty": str(state.dirty).lower()})
        if state.dirty:
            self.log_text(state.diff, "source/uncommitted.diff")

    def log_text(self, text: str, name: str) -> None:
        """Store a text as an artifact."""
        mlflow.log_text(text, name, run_id=self.run_id)

    def log_folder(self, folder: Path) -> None:
        """Upload everything in `folder` as the run's artifacts."""
        mlflow.log_artifacts(str(folder), run_id=self.run_id)

    def last_step(self, name: str) -> int:
        """Return the last step at which a metric was logged, 0 where it never was."""
        return max((each.step for each in mlflow.MlflowClient().get_metric_history(self.run_id, name)), default=0)

    def metrics(self) -> dict[str, float]:
        """Return the last value of each metric."""
        values: dict[str, float] = mlflow.MlflowClient().get_run(self.run_id).data.metrics
        return values

    def fetch(self, name: str, folder: Path) -> Path | None:
        """Download an artifact into `folder`; None where the run has none of that name."""
        client = mlflow.MlflowClient()
        above = name.rpartition("/")[0] or None
        if name not in {file.path for file in client.list_artifacts(self.run_id, above)}:
            return None
        return Path(client.download_artifacts(self.run_id, name, str(folder)))

    def discard(self, name: str) -> None:
        """Delete an artifact where there is one and the store lets us."""
        client = mlflow.MlflowClient()
        if name in {file.path for file in client.list_artifacts(self.run_id)}:
            with suppress(MlflowException, NotImplementedError, OSError):
                get_artifact_repository(client.get_run(self.run_id).info.artifact_uri).delete_artifacts(name)  # type: ignore[no-untyped-call]

    def set_status(self, status: str) -> None:
        """Set the status of a run that isn't open in this process: RUNNING, FINISHED, FAILED or KILLED.

        One that has it already keeps its end time.
        """
        client = mlflow.MlflowClient()
        if client.get_run(self.run_id).info.status == status:
            return
        if status == "RUNNING":
            client.update_run(self.run_id, status)
        else:
            client.set_terminated(self.run_id, status)

    def end_left_open(self) -> bool:
        """End a run that its process left open: FINISHED if all was logged, which is returned, KILLED otherwise."""
        run = mlflow.MlflowClient().get_run(self.run_id)
        complete = run.data.tags.get(OUTCOME) == "complete"
        if run.info.status == "RUNNING":
            self.set_status("FINISHED" if complete else "KILLED")
        return complete

    def is_running(self) -> bool:
        """Say whether the run is marked as running."""
        return bool(mlflow.MlflowClient().get_run(self.run_id).info.status == "RUNNING")

    def tag(self, name: str) -> str:
        """Return a tag, empty where it isn't set."""
        return str(mlflow.MlflowClient().get_run(self.run_id).data.tags.get(name, ""))

    def has_model(self) -> bool:
        """Say whether a model was logged."""
        outputs = mlflow.MlflowClient().get_run(self.run_id).outputs
        return bool(outputs and outputs.model_outputs)

    def log_model(self, files: Mapping[str, Path], example: str, torch_version: str) -> str:
        """Log the served model: image in, class names and probabilities out, no pickle; return its address.

        Opens the run again where it has ended. `files` are the artifacts that the serving file names, `example` is
        a base64 image. The requirements are given, since inferring them takes MLflow several seconds.
        """
        # MLflow remarks, past every filter, that the model's inputs are of any type; they are so on purpose.
        with warnings.catch_warnings(record=True), self._open():
            from mlflow import pyfunc

            logged = pyfunc.log_model(
                name="model",
                python_model=str(image_classifier_path()),
                artifacts={name: str(path) for name, path in files.items()},
                input_example=[example],
                pip_requirements=[
                    f"mlflow=={mlflow.__version__}",
                    f"torch=={torch_version.partition('+')[0]}",
                    "numpy>=2.0",
                    "pillow>=11",
                ],
            )
        return f"models:/{logged.model_id}"

    @contextmanager
    def _open(self) -> Iterator[None]:
        """Make this the active run, reopening it where it has ended: it keeps its status, whatever happens inside."""
        active = mlflow.active_run()
        if active is not None and active.info.run_id == self.run_id:
            yield
            return
        self.end_left_open()
        status = mlflow.MlflowClient().get_run(self.run_id).info.status
        mlflow.start_run(self.run_id, nested=True)
        try:
            yield
        finally:
            mlflow.end_run(status)


@contextmanager
def start_run(
    name: str, experiment_id: str, tags: Mapping[str, str], parent: str = "", continues: str = ""
) -> Iterator[TrackedRun]:
    """Open a run, a child of `parent` where that is given, and end it FINISHED, FAILED or KILLED.

    With `continues`, the run of that id is opened again. A run without a parent adopts the one that `mlflow run` made.
    """
    with _ending():
        if continues:
            active = mlflow.start_run(continues, nested=True)
        elif parent:
            active = mlflow.start_run(experiment_id=experiment_id, run_name=name, nested=True, parent_run_id=parent)
        elif os.environ.get("MLFLOW_RUN_ID"):
            active = mlflow.start_run()
            _name_adopted(active.info, name)
        else:
            active = mlflow.start_run(experiment_id=experiment_id, run_name=name)
        run = TrackedRun(active.info.run_id, active.info.experiment_id)
        run.set_tags(dict(tags) | {"effv2.pid": str(os.getpid()), PROCESS: this_process()})
        yield run


def open_parent(name: str, experiment_id: str, tags: Mapping[str, str]) -> TrackedRun:
    """Create the run of a study, or adopt the one that `mlflow run` made.

    Several processes may work on a study, so its run belongs to none of them: whoever ends the study ends it.
    """
    client, adopted = mlflow.MlflowClient(), os.environ.pop("MLFLOW_RUN_ID", "")
    if not adopted:
        info = client.create_run(experiment_id, run_name=name, tags={**resolve_tags(), **tags}).info
        return TrackedRun(info.run_id, info.experiment_id)
    info = client.get_run(adopted).info
    _name_adopted(info, name)
    run = TrackedRun(info.run_id, info.experiment_id)
    run.set_tags(tags)
    return run


@contextmanager
def working_on(run: TrackedRun) -> Iterator[None]:
    """Mark a run that isn't the active one as running inside, and end it as the way out of the block deserves."""
    run.set_status("RUNNING")
    try:
        yield
    except BaseException as error:
        with impatient(), suppress(*TRACKING_ERRORS):  # a store that is away must not hide why the run ends
            run.set_status(status_after(error))
        raise
    run.set_status("FINISHED")


def status_after(error: BaseException) -> str:
    """Return the status of a run that `error` ended."""
    return "KILLED" if isinstance(error, (KeyboardInterrupt, Terminated, Abandoned)) else "FAILED"


def find_run(run_id: str) -> TrackedRun | None:
    """Return a run of the tracking store; None where it has none of that id, or the run was deleted."""
    try:
        info = mlflow.MlflowClient().get_run(run_id).info
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return TrackedRun(info.run_id, info.experiment_id) if info.lifecycle_stage == "active" else None


def point_adopted_run_to(run: TrackedRun) -> None:
    """Make the run that `mlflow run` opened, if it did, a pointer to the one that this command goes on with."""
    adopted = os.environ.pop("MLFLOW_RUN_ID", "")
    if adopted:
        pointer = TrackedRun(adopted, run.experiment_id)
        pointer.set_tags({"effv2.continues": run.run_id})
        pointer.describe(f"This command went on with {run_address(run.run_id, run.experiment_id)}")


def _name_adopted(info: RunInfo, name: str) -> None:
    """Name a run that `mlflow run` made, unless the user did."""
    if GENERATED_NAME.fullmatch(info.run_name or ""):
        mlflow.MlflowClient().set_tag(info.run_id, "mlflow.runName", name)


@contextmanager
def _ending() -> Iterator[None]:
    """End the run that is opened inside with the status that the way out of the block deserves."""
    outer = mlflow.active_run()
    status = "FINISHED"
    try:
        yield
    except BaseException as error:
        status = status_after(error)
        if status == "FAILED" and _opened(outer):
            with impatient(), suppress(*TRACKING_ERRORS):
                said = f"{type(error).__name__}: {error}"[:LONGEST_TAG]
                mlflow.set_tags({"effv2.error": said, OUTCOME: "failed"})
        raise
    finally:
        if _opened(outer):
            if status == "FINISHED":
                mlflow.end_run(status)
            else:  # a store that is away must not hide why the run ends
                with impatient(), suppress(*TRACKING_ERRORS):
                    mlflow.end_run(status)


def _opened(outer: mlflow.ActiveRun | None) -> bool:
    active = mlflow.active_run()
    return active is not None and (outer is None or active.info.run_id != outer.info.run_id)


def run_address(run_id: str, experiment_id: str) -> str:
    """Say where the run can be seen: its page on a server, else the command that opens the UI on the store."""
    uri = shown_uri()
    if uri.startswith("http"):
        return f"{uri.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"
    return f"run {run_id}; see it with: mlflow ui --backend-store-uri {uri}"
