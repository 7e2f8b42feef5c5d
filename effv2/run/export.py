"""A logged model in its ONNX form: converted, and saved as MLflow serves it, without torch."""

import tempfile
from pathlib import Path

from effv2.core.errors import InputError, joined
from effv2.serving.onnx_form import missing_packages, write_onnx
from effv2.tracking.models import fetch_served, save_served
from effv2.tracking.writer import ONNX, log_served_model, model_address


def export_onnx(address: str, folder: Path, log: bool) -> str:
    """Save the ONNX form of a logged model to a new or empty folder; log it to the same run, too, if `log` says so.

    `address` is one of MLflow's, as fetch_served takes it. Returns that of the form which was logged, else nothing.
    InputError for an address without a model, a folder that holds something, missing packages; RunError as write_onnx.
    """
    if missing := missing_packages():
        problem, remedy = f"ONNX needs the packages {joined(missing)}", "install them with: pip install 'effv2[onnx]'"
        raise InputError("model", address, problem, remedy)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError("folder", folder, "is there, and not empty", "name another one")
    with tempfile.TemporaryDirectory() as place:
        found = fetch_served(address, Path(place) / "logged")
        files = {**found.files, ONNX: Path(place) / "model.onnx"}
        write_onnx(files.pop("program"), files[ONNX])
        save_served(folder, files, found.example)
        if log:
            log_served_model(found.run_id, files, found.example)
    return model_address(found.run_id, ONNX) if log else ""
