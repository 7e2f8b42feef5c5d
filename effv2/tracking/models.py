"""The served model fetched from where it was logged, and saved to a folder."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow.artifacts import download_artifacts
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from effv2.core.errors import InputError
from effv2.tracking.addresses import TRACKING_URI, shown_uri
from effv2.tracking.store import MISSING, REFUSALS, is_begun, open_store, reason, tracking_faults
from effv2.tracking.writer import as_served, model_address

ADDRESS = re.compile(r"runs:/([^/]+)(?:/model)?|models:/.+")
PARTS = ("program", "settings", "decoder")  # artifacts of the served model as a run logs it


@dataclass(frozen=True)
class Served:
    """A served model that was fetched: its artifacts by name, an image in base64 as example, the run that logged it."""

    files: dict[str, Path]
    example: str
    run_id: str


def fetch_served(address: str, folder: Path) -> Served:
    """Download the served model at an address of MLflow's, runs:/ID or models:/..., to a folder.

    InputError where there is none, RunError where the store fails.
    """
    if (form := ADDRESS.fullmatch(address)) is None:
        raise InputError("model", address, "is no address", "give runs:/ID, models:/ID or models:/NAME@ALIAS")
    if not is_begun():
        remedy = f"set {TRACKING_URI}, or work in the folder of the store"
        raise InputError("model", address, f"there is no tracking store {shown_uri()}", remedy)
    open_store("", create=False)
    with tracking_faults():
        try:
            if not (source := model_address(form[1]) if form[1] else address):
                raise InputError("model", address, "that run logged no model", "name another")
            download_artifacts(artifact_uri=source, dst_path=str(folder))
            about = Model.load(str(folder))
            example = about.load_input_example(str(folder))
        except MlflowException as error:
            if error.error_code not in (MISSING, *REFUSALS):
                raise
            problem = f"{shown_uri()} has none there ({reason(error)})"
            raise InputError("model", address, problem, "correct the address") from error
    artifacts = about.flavors.get("python_function", {}).get("artifacts", {})
    if not example or not set(PARTS) <= artifacts.keys():
        raise InputError("model", address, "is no model that effv2 logged", "give the address that a training printed")
    return Served({name: folder / artifacts[name]["path"] for name in PARTS}, example[0], about.run_id)


def save_served(folder: Path, files: Mapping[str, Path], example: str) -> None:
    """Save the served model, as `mlflow models serve` takes it; `files` and `example` are those of as_served."""
    with as_served(files, example) as about_it:
        mlflow.pyfunc.save_model(folder, **about_it)
