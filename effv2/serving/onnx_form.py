"""The network of the served model as ONNX: the same bytes in, the same probabilities and predictions out."""

import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from effv2.core.errors import RunError
from effv2.core.processes import uninterrupted

OPSET = 18  # the lowest that torch writes
NEEDED = ("onnx", "onnxscript", "onnxruntime")  # packages, the extra `onnx`
INPUT, OUTPUTS, BATCH = "images", ("probabilities", "predicted"), "batch"
TOLERANCE = 1e-4  # that a probability may differ from torch's
MOST_BYTES = 2_000_000_000  # of one file, as ONNX's format has it


def missing_packages() -> list[str]:
    """Return the packages that writing ONNX needs and that aren't installed."""
    return [name for name in NEEDED if find_spec(name) is None]


def write_onnx(program: Path, target: Path) -> None:
    """Write a torch.export program of the served model as one ONNX file, for batches of any size.

    RunError where that would be too large, or where ONNX Runtime answers random images otherwise than torch.
    """
    import onnxruntime

    if program.stat().st_size > MOST_BYTES:
        raise RunError("The network has more than 2 GB, too much for an ONNX file; export a smaller one.")
    exported = torch.export.load(program)
    with uninterrupted(), warnings.catch_warnings():  # as when it was exported
        warnings.simplefilter("ignore")  # the exporter's remarks on torch's code
        written = torch.onnx.export(
            exported, input_names=[INPUT], output_names=OUTPUTS, opset_version=OPSET, dynamo=True, verbose=False
        )
    assert written is not None  # noqa: S101 (it is where no path is given)
    for node in written.model.graph.all_nodes():
        node.metadata_props.clear()  # the lines of files on this machine that it comes from
    for value in (*written.model.graph.inputs, *written.model.graph.outputs):
        value.shape[0] = BATCH
    written.save(target, external_data=False)
    session = onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).integers(0, 256, (3, *session.get_inputs()[0].shape[1:]), dtype=np.uint8)
    with torch.inference_mode():
        expected = exported.module()(torch.from_numpy(images))[0].numpy()
    difference = float(np.abs(session.run(None, {INPUT: images})[0] - expected).max())
    if not difference <= TOLERANCE:  # nor NaN
        raise RunError(f"ONNX Runtime's probabilities differ from torch's by {difference:.2g}; try other versions.")
