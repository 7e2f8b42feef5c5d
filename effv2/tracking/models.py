"""Logged models: written for a run, found by their addresses, downloaded, and exported to ONNX."""

import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlflow
from mlflow.artifacts import download_artifacts
from mlflow.entities import LoggedModel, LoggedModelStatus
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.tracking.context.registry import resolve_tags

from effv2 import serving
from effv2.core.errors import InputError, joined
from effv2.core.provenance import machine
from effv2.core.secrets import masked_values
from effv2.tracking.addresses import TRACKING_URI, shown_uri
from effv2.tracking.read import if_there
from effv2.tracking.store import MISSING, REFUSALS, MlflowClient, is_begun, open_store, reason, tracking_faults

ADDRESS = re.compile(r"runs:/([^/]+)(?:/model)?|models:/.+")
PARTS = ("program", "settings", "decoder")  # artifacts of the served model of a run
ONNX = "onnx"  # the artifact in the place of the program


def model_address(run_id: str) -> str:
    """Return the address of the model of a run; empty if there is none, or an incomplete one."""
    ready = [model for model in _models(run_id) if model.status == LoggedModelStatus.READY]
    return f"models:/{ready[-1].model_id}" if ready else ""


def _models(run_id: str) -> list[LoggedModel]:
    """Return the models of a run, without deleted ones."""
    client = MlflowClient()
    outputs = client.get_run(run_id).outputs
    found = [if_there(client.get_logged_model, each.model_id) for each in (outputs.model_outputs if outputs else ())]
    return [model for model in found if model is not None]


def find_model(address: str) -> tuple[LoggedModel, float]:
    """Return the model of an address, runs:/ID or models:/ID, and its MB; InputError if it is missing or incomplete."""
    kind, _, wanted = address.partition(":/")
    if kind not in ("runs", "models") or not re.fullmatch(r"[\w-]+", wanted):
        raise InputError("model", address, "is not the address of a logged model", "give runs:/ID or models:/ID")
    found = address if kind == "models" else if_there(model_address, wanted)
    model = if_there(MlflowClient().get_logged_model, found.removeprefix("models:/")) if found else None
    if model is None and found != "":
        raise InputError("model", address, "the tracking store has no model of that id", "correct it")
    size = _bytes(model.model_id) if model else 0
    if model is None or model.status != LoggedModelStatus.READY or not size:
        raise InputError("model", address, "no model was logged there, or it is incomplete", "give another one")
    return model, size / 1e6


def _bytes(model_id: str, folder: str | None = None) -> int:
    files = MlflowClient().list_logged_model_artifacts(model_id, folder)
    return sum(_bytes(model_id, file.path) if file.is_dir else file.file_size or 0 for file in files)


def log_served_model(run_id: str, files: Mapping[str, Path], example: str) -> None:
    """Log the served model, image in, class names and probabilities out, unless the run has it. No part is a pickle.

    `files` and `example` are those of as_served. A model that an earlier attempt left incomplete is completed.
    """
    there = _models(run_id)
    if any(model.status == LoggedModelStatus.READY for model in there):
        return
    client, new = MlflowClient(), None
    if not there:
        run = client.get_run(run_id)
        about = masked_values(resolve_tags()), masked_values(run.data.params)
        new = client.create_logged_model(run.info.experiment_id, "model", run_id, *about)
        for twin in client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run_id}'"):
            if twin.model_id != new.model_id:  # created before an answer was lost, or before a kill
                client.delete_logged_model(twin.model_id)
    with as_served(files, example) as about_it:
        Model.log(
            artifact_path=None,
            flavor=mlflow.pyfunc,
            model_id=(new or there[-1]).model_id,
            run_id=run_id if new else None,  # links run and model; a second link is refused
            **about_it,
        )


@contextmanager
def as_served(files: Mapping[str, Path], example: str) -> Iterator[dict[str, Any]]:
    """Pass the parts of the served model to MLflow under the names of its arguments, and hide its remarks.

    `files` are the artifacts that the serving file names, and `example` is a base64 image. The requirements are given,
    because inferring them takes seconds. mlflow-skinny does not include pandas, though serving needs it.
    """
    needed = [f"mlflow=={mlflow.__version__}", f"torch=={machine()['torch'].partition('+')[0]}"]
    if ONNX in files:
        needed = [f"mlflow-skinny=={mlflow.__version__}", "pandas>=2", f"onnxruntime=={version('onnxruntime')}"]
    with warnings.catch_warnings(record=True):  # MLflow warns about inputs of any type, which are intended
        yield {
            "python_model": str(Path(serving.__file__).with_name("image_classifier.py")),
            "artifacts": {name: str(path) for name, path in files.items()},
            "input_example": ([example], {"top_k": 0}),
            "pip_requirements": [*needed, "numpy>=2.0", "pillow>=11"],
        }


def fetch_model(address: str, folder: Path) -> tuple[Model, dict[str, Path]]:
    """Download the served model of runs:/ID or models:/... to a folder. Return it with its files by name.

    InputError if there is none; RunError.
    """
    if (form := ADDRESS.fullmatch(address)) is None:
        raise InputError("model", address, "is not an address", "give runs:/ID, models:/ID or models:/NAME@ALIAS")
    if not is_begun():
        problem, remedy = f"there is no tracking store {shown_uri()}", f"set {TRACKING_URI}, or work in its folder"
        raise InputError("model", address, problem, remedy)
    open_store("", create=False)
    with tracking_faults():
        try:
            if not (source := model_address(form[1]) if form[1] else address):
                raise InputError("model", address, "that run logged no model", "name another one")
            found = Model.load(download_artifacts(artifact_uri=source, dst_path=str(folder)))
        except MlflowException as error:
            if error.error_code not in (MISSING, *REFUSALS):
                raise
            problem = f"{shown_uri()} has no model there ({reason(error)})"
            raise InputError("model", address, problem, "correct the address") from error
    files = found.flavors.get("python_function", {}).get("artifacts", {})
    if not set(PARTS) <= files.keys():
        raise InputError("model", address, "is not a model of effv2", "give an address that a training printed")
    return found, {name: folder / file["path"] for name, file in files.items()}


def export_onnx(address: str, target: Path) -> None:
    """Save the ONNX form of a logged model to a new or empty folder.

    InputError as fetch_model, and if packages are missing or the folder isn't empty; RunError as write_onnx.
    """
    from effv2.serving.export import ONNX_NEEDS, write_onnx

    if missing := [name for name in ONNX_NEEDS if find_spec(name) is None]:
        remedy = "install them with: pip install 'effv2[onnx]'"
        raise InputError("model", address, f"ONNX needs the packages {joined(missing)}", remedy)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError("folder", target, "exists and is not empty", "name another one")
    with tempfile.TemporaryDirectory() as place:
        found, files = fetch_model(address, Path(place, "logged"))
        write_onnx(files.pop("program"), written := Path(place, "model.onnx"))
        files[ONNX] = written
        example = (found.load_input_example(str(Path(place, "logged"))) or [""])[0]
        with as_served(files, example) as about_it:
            mlflow.pyfunc.save_model(target, **about_it)
