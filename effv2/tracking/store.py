"""The tracking store that MLflow's own settings name, checked before anything is trained."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from effv2.errors import InputError

# MLflow's own limits let a dead server block for minutes; a check may be impatient.
IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


def open_store(experiment: str) -> str:
    """Answer with the id of the experiment to log to; InputError if the store doesn't answer.

    An empty name leaves the choice to MLflow: that of `mlflow run`, of MLFLOW_EXPERIMENT_NAME or _ID, or
    `Default`. A database is created, and migrated, here and nowhere later.
    """
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    uri = mlflow.get_tracking_uri()
    try:
        with _environment(IMPATIENT):
            return _experiment_id(MlflowClient(), experiment)
    except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:
        raise InputError(_explain(uri, error)) from error


def _experiment_id(client: MlflowClient, name: str) -> str:
    adopted = os.environ.get("MLFLOW_RUN_ID")
    if adopted:
        given = client.get_run(adopted).info.experiment_id
        if name and client.get_experiment(given).name != name:
            raise InputError(
                f"--experiment {name}: `mlflow run` already opened a run in another experiment; give the name to "
                "`mlflow run` itself, as --experiment-name."
            )
        return str(given)
    if not name:
        from mlflow.tracking.fluent import _get_experiment_id

        client.search_experiments(max_results=1)
        return str(_get_experiment_id())
    found = client.get_experiment_by_name(name)
    if found is not None and found.lifecycle_stage != "active":
        raise InputError(f"--experiment {name}: that experiment was deleted; restore it or choose another name.")
    if found is not None:
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(name))
    except MlflowException:  # another process was quicker
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)


def _explain(uri: str, error: Exception) -> str:
    if "MLFLOW_ALLOW_FILE_STORE" in str(error):
        return (
            f"MLFLOW_TRACKING_URI {uri}: MLflow keeps runs in plain files only where MLFLOW_ALLOW_FILE_STORE=true is "
            "set; set it, or use sqlite:///mlflow.db."
        )
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return (
        f"MLFLOW_TRACKING_URI {uri}: the tracking store doesn't answer ({reason}); start the server or correct the "
        "address."
    )


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update({name: value for name, value in values.items() if before[name] is None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
