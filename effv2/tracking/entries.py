"""What is written to a run, as plain data, and how the tracking store takes it."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

import mlflow
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModel, LoggedModelStatus, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from effv2.serving import image_classifier_path
from effv2.tracking.tags import DATA_CONTEXT, LONGEST_TAG

VALUES = ("params", "metrics", "tags")  # kinds of which MLflow takes many in one call
MOST_IN_A_CALL = {"params": 100, "metrics": 900, "tags": 100}  # the server refuses more
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
REFUSING_STATUS = (400, 413, 422)
NO_ACCESS = ("PERMISSION_DENIED", "UNAUTHENTICATED")


@dataclass(frozen=True)
class Entry:
    """One thing written to a run.

    `kind` is params, metrics, tags, dataset, artifacts, discard, model or status;
    `content` is plain data that JSON holds;
    `folder` has the files of artifacts and of a model.
    """

    kind: str
    content: Mapping[str, Any]
    folder: Path | None = None


def params(values: Mapping[str, Any]) -> Entry:
    """Return parameters; their values are kept as text, as MLflow keeps them."""
    return Entry("params", {"values": {name: str(value) for name, value in values.items()}})


def metrics(values: Mapping[str, float], step: int | None) -> Entry:
    """Return metrics of one moment, at `step` where they belong to an epoch."""
    numbers = {name: float(value) for name, value in values.items()}
    return Entry("metrics", {"values": numbers, "step": step or 0, "timestamp": milliseconds()})


def tags(values: Mapping[str, str]) -> Entry:
    """Return tags, the longest cut."""
    return Entry("tags", {"values": {name: value[:LONGEST_TAG] for name, value in values.items()}})


def is_refusal(error: Exception) -> bool:
    """Say whether the store understood and refused, so that trying again won't help; a run that was deleted too."""
    if isinstance(error, MlflowException) and error.error_code in REFUSALS:
        return True
    status = getattr(getattr(error, "response", None), "status_code", 0)  # of an artifact
    return status in REFUSING_STATUS or bool(re.search(r"error code (400|413|422)", str(error)))


def is_missing(error: Exception) -> bool:
    """Say whether the store has no run, model or experiment of that id."""
    return isinstance(error, MlflowException) and error.error_code == "RESOURCE_DOES_NOT_EXIST"


def may_pass(error: Exception) -> bool:
    """Say whether the store failed in a way that it may not when it is asked again."""
    if not isinstance(error, MlflowException) or is_refusal(error) or is_missing(error):
        return False
    return error.error_code not in NO_ACCESS


def milliseconds() -> int:
    """Return the time as MLflow counts it."""
    return int(time.time() * 1000)


def deliver(run_id: str, entries: Sequence[Entry], again: bool = False) -> None:
    """Write entries to a run in their order.

    With `again`, what an earlier attempt may have brought there is not written a second time.
    """
    if again:
        entries = list(_without_known_metrics(run_id, entries))
    for are_values, group in groupby(entries, key=lambda entry: entry.kind in VALUES):
        if are_values:
            _deliver_values(run_id, list(group))
        else:
            for entry in group:
                _deliver_one(run_id, entry, again)


def _without_known_metrics(run_id: str, entries: Iterable[Entry]) -> Iterator[Entry]:
    """Yield the entries without the metrics that the run has: there is one value a metric and step."""
    client = mlflow.MlflowClient()
    known: dict[str, set[int]] = {}
    for entry in entries:
        if entry.kind != "metrics":
            yield entry
            continue
        missing = {}
        for name, value in entry.content["values"].items():
            if name not in known:
                known[name] = {each.step for each in client.get_metric_history(run_id, name)}
            if entry.content["step"] not in known[name]:
                missing[name] = value
        yield Entry("metrics", {**entry.content, "values": missing})


def _deliver_values(run_id: str, entries: Sequence[Entry]) -> None:
    """Write params, metrics and tags in as few calls as the server's limits allow."""
    found: dict[str, list[Any]] = {
        "params": [Param(*item) for item in _merged(entries, "params").items()],
        "tags": [RunTag(*item) for item in _merged(entries, "tags").items()],
        "metrics": [
            Metric(name, value, entry.content["timestamp"], entry.content["step"])
            for entry in entries
            if entry.kind == "metrics"
            for name, value in entry.content["values"].items()
        ],
    }
    client = mlflow.MlflowClient()
    while any(found.values()):
        now = {kind: items[: MOST_IN_A_CALL[kind]] for kind, items in found.items()}
        client.log_batch(run_id, now["metrics"], now["params"], now["tags"])
        found = {kind: items[MOST_IN_A_CALL[kind] :] for kind, items in found.items()}


def _merged(entries: Iterable[Entry], kind: str) -> dict[str, str]:
    """Return the values of a kind by name: the last one stands."""
    return {name: value for entry in entries if entry.kind == kind for name, value in entry.content["values"].items()}


def _deliver_one(run_id: str, entry: Entry, again: bool) -> None:
    client, content = mlflow.MlflowClient(), entry.content
    if entry.kind == "status":
        client.set_terminated(run_id, content["status"], content["end_time"])
    elif entry.kind == "dataset":
        names = ("name", "digest", "source", "profile")
        dataset = Dataset(source_type="local", **{name: content[name] for name in names})
        client.log_inputs(run_id, [DatasetInput(dataset, [InputTag(DATA_CONTEXT, content["context"])])])
    elif entry.kind == "artifacts" and entry.folder is not None:
        client.log_artifacts(run_id, str(entry.folder), content.get("place") or None)
    elif entry.kind == "discard":
        _discard(run_id, content["name"], content.get("but", ""))
    elif entry.kind == "model" and entry.folder is not None and not (again and model_address(run_id)):
        _log_model(run_id, entry.folder, content)


def _discard(run_id: str, name: str, but: str) -> None:
    """Delete an artifact, or all in a folder but one, where there are some and the store lets us."""
    client = mlflow.MlflowClient()
    above = name.rpartition("/")[0] or None
    here = [file for file in client.list_artifacts(run_id, above) if file.path == name]
    found = client.list_artifacts(run_id, name) if here and here[0].is_dir else here
    repository = get_artifact_repository(client.get_run(run_id).info.artifact_uri)
    for file in found:
        if PurePosixPath(file.path).name != but:
            with suppress(MlflowException, NotImplementedError, OSError):
                repository.delete_artifacts(file.path)  # type: ignore[no-untyped-call]


def model_address(run_id: str) -> str:
    """Return the address of the model that was logged to a run, empty where none was, or not all of it."""
    ready = [model for model in _models(run_id) if model.status == LoggedModelStatus.READY]
    return f"models:/{ready[-1].model_id}" if ready else ""


def _models(run_id: str) -> list[LoggedModel]:
    """Return the models of a run that were not deleted."""
    client, found = mlflow.MlflowClient(), []
    outputs = client.get_run(run_id).outputs
    for each in outputs.model_outputs if outputs else []:
        try:
            found.append(client.get_logged_model(each.model_id))
        except MlflowException as error:
            if not is_missing(error):
                raise
    return found


def _log_model(run_id: str, folder: Path, content: Mapping[str, Any]) -> None:
    """Log the served model: image in, class names and probabilities out, no pickle.

    The requirements are given, since inferring them takes MLflow several seconds.
    """
    cut_short = [model.model_id for model in _models(run_id) if model.status != LoggedModelStatus.READY]
    # MLflow remarks, past every filter, that the model's inputs are of any type; they are so on purpose. A model that
    # an earlier attempt linked to the run is filled now; linking it again is refused.
    with warnings.catch_warnings(record=True), nullcontext() if cut_short else _active(run_id):
        from mlflow import pyfunc

        pyfunc.log_model(
            name="model",
            model_id=cut_short[-1] if cut_short else None,
            python_model=str(image_classifier_path()),
            artifacts={name: str(folder / file) for name, file in content["files"].items()},
            input_example=[content["example"]],
            pip_requirements=[
                f"mlflow=={mlflow.__version__}",
                f"torch=={content['torch_version'].partition('+')[0]}",
                "numpy>=2.0",
                "pillow>=11",
            ],
        )


@contextmanager
def _active(run_id: str) -> Iterator[None]:
    """Make a run the active one, which leaves it as it was."""
    client = mlflow.MlflowClient()
    before = client.get_run(run_id).info
    mlflow.start_run(run_id, nested=True)
    try:
        yield
    finally:
        mlflow.end_run(before.status)
        if before.end_time:
            client.set_terminated(run_id, before.status, before.end_time)
