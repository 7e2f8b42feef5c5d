"""A logged model, found by its address, and its ONNX form, which MLflow serves without torch."""

import re
import tempfile
from importlib.util import find_spec
from pathlib import Path

import mlflow
from mlflow.artifacts import download_artifacts
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from effv2.core.errors import InputError, joined
from effv2.serving import onnx_form
from effv2.tracking.addresses import TRACKING_URI, shown_uri
from effv2.tracking.store import MISSING, REFUSALS, is_begun, open_store, reason, tracking_faults
from effv2.tracking.writer import ONNX, as_served, model_address

ADDRESS = re.compile(r"runs:/([^/]+)(?:/model)?|models:/.+")
PARTS = ("program", "settings", "decoder")  # artifacts of the served model of a run


def fetch_model(address: str, folder: Path) -> Model:
    """Download the served model of runs:/ID or models:/... to a folder; InputError if there is none; RunError."""
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
    if not set(PARTS) <= found.flavors.get("python_function", {}).get("artifacts", {}).keys():
        raise InputError("model", address, "is not a model of effv2", "give an address that a training printed")
    return found


def export_onnx(address: str, target: Path) -> None:
    """Save the ONNX form of a logged model to a new or empty folder.

    InputError as fetch_model, and if packages are missing or the folder isn't empty; RunError as write_onnx.
    """
    if missing := [name for name in onnx_form.NEEDED if find_spec(name) is None]:
        remedy = "install them with: pip install 'effv2[onnx]'"
        raise InputError("model", address, f"ONNX needs the packages {joined(missing)}", remedy)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError("folder", target, "exists and is not empty", "name another one")
    with tempfile.TemporaryDirectory() as place:
        found, written = fetch_model(address, Path(place, "logged")), Path(place, "model.onnx")
        artifacts = found.flavors["python_function"]["artifacts"]
        files = {name: Path(place, "logged", artifacts[name]["path"]) for name in PARTS} | {ONNX: written}
        onnx_form.write_onnx(files.pop("program"), written)
        example = (found.load_input_example(str(Path(place, "logged"))) or [""])[0]
        with as_served(files, example) as about_it:
            mlflow.pyfunc.save_model(target, **about_it)
