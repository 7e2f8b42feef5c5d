"""The network of the served model as ONNX: the same bytes in, the same probabilities and predictions out."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from effv2.core.errors import RunError
from effv2.core.processes import uninterrupted
from effv2.serving.export import read_program

NEEDED = ("onnx", "onnxscript", "onnxruntime")  # packages, the extra `onnx`
OPSET = 18  # the lowest that torch writes
TOLERANCE = 1e-4  # tolerance of a probability's difference from torch's


def write_onnx(program: Path, target: Path) -> None:
    """Write a torch.export program as one ONNX file, for batches of any size; RunError if their answers differ."""
    import onnxruntime

    exported = read_program(program)
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["probabilities", "predicted"]}
    with uninterrupted(), warnings.catch_warnings():  # as at the export
        warnings.simplefilter("ignore")  # the exporter's warnings about torch's code
        written: Any = torch.onnx.export(exported, opset_version=OPSET, dynamo=True, verbose=False, **names)
    for node in written.model.graph.all_nodes():
        node.metadata_props.clear()  # source lines and paths on this machine
    for value in (*written.model.graph.inputs, *written.model.graph.outputs):
        value.shape[0] = "batch"
    written.save(target, external_data=False)
    session = onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).integers(0, 256, (3, *session.get_inputs()[0].shape[1:]), dtype=np.uint8)
    with torch.inference_mode():
        expected = exported.module()(torch.from_numpy(images))[0].numpy()
    difference = float(np.abs(session.run(None, {"images": images})[0] - expected).max())
    if not difference <= TOLERANCE:  # also refuses NaN
        raise RunError(f"ONNX Runtime's probabilities differ from torch's by {difference:.2g}; try other versions.")
