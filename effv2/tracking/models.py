"""Models logged to runs: MLflow's LoggedModels, whose file of code, program and settings hold no pickle."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelStatus
from mlflow.exceptions import MlflowException

from effv2.serving import image_classifier_path
from effv2.tracking.store import is_missing


def model_address(run_id: str) -> str:
    """Return the address of the model that was logged to a run, empty where none was, or not all of it."""
    ready = [model for model in _models(run_id) if model.status == LoggedModelStatus.READY]
    return f"models:/{ready[-1].model_id}" if ready else ""


def _models(run_id: str) -> list[LoggedModel]:
    """Return the models of a run that were not deleted."""
    client, found = MlflowClient(), []
    outputs = client.get_run(run_id).outputs
    for each in outputs.model_outputs if outputs else []:
        try:
            found.append(client.get_logged_model(each.model_id))
        except MlflowException as error:
            if not is_missing(error):
                raise
    return found


def log_served_model(run_id: str, files: Mapping[str, Path], example: str, torch_version: str) -> None:
    """Log the served model, image in, class names and probabilities out, unless the run has it.

    `files` are the artifacts that the serving file names, `example` is a base64 image. A model that an earlier attempt
    left unfinished is filled. The requirements are given, since inferring them takes MLflow several seconds.
    """
    there = _models(run_id)
    if any(model.status == LoggedModelStatus.READY for model in there):
        return
    unfinished = there[-1].model_id if there else None
    # MLflow remarks, past every filter, that the model's inputs are of any type; they are so on purpose. An unfinished
    # model is linked to the run already; linking it again is refused.
    with warnings.catch_warnings(record=True), nullcontext() if unfinished else _active(run_id):
        from mlflow import pyfunc

        pyfunc.log_model(
            name="model",
            model_id=unfinished,
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


@contextmanager
def _active(run_id: str) -> Iterator[None]:
    """Make a run the active one, which leaves it as it was."""
    client = MlflowClient()
    before = client.get_run(run_id).info
    mlflow.start_run(run_id, nested=True, log_system_metrics=False)
    try:
        yield
    finally:
        mlflow.end_run(before.status)
        if before.end_time:
            client.set_terminated(run_id, before.status, before.end_time)
