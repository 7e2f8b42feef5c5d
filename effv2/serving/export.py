"""From a trained network to the files of the served model: bytes in, class probabilities out. Its ONNX form."""

import base64
import io
import json
import re
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional as F

from effv2.core.errors import InputError, RunError
from effv2.core.processes import uninterrupted
from effv2.data import decoder
from effv2.data.batches import Statistics
from effv2.data.images import CentreCrop, Preparation

OTHER = "other"
ONNX_NEEDS = ("onnx", "onnxscript", "onnxruntime")  # packages, the extra `onnx`
OPSET = 18  # the lowest that torch writes
TOLERANCE = 1e-4  # tolerance of a probability's difference from torch's
# The files of write_served. torch reads none of them as a pickle, unless its configuration is changed.
PROGRAM_FILE = re.compile(
    r"[^/]+/(data/weights/(weight_\d+|model_weights_config\.json)|data/constants/(tensor_\d+|model_constants_config\.json)"
    r"|data/sample_inputs/model\.pt|models/model\.json|archive_format|archive_version|byteorder|version"
    r"|\.data/(version|serialization_id))"
)


def output_names(classes: Sequence[str], outputs: int) -> list[str]:
    """Name the columns of probabilities: the classes and, if the head is wider, one for all other outputs."""
    other = OTHER
    while other in classes:
        other += "_"
    return [*classes, other] if outputs > len(classes) else list(classes)


class Normalised(nn.Module):
    """A network with its normalisation: bytes (N, 3, size, size) to logits (N, outputs)."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, statistics: Statistics) -> None:
        super().__init__()
        self.network = network
        for name, numbers in zip(("mean", "std"), statistics, strict=True):
            self.register_buffer(name, torch.tensor(numbers).view(3, 1, 1))

    def forward(self, images: Any) -> Any:
        """Return the logits."""
        return self.network((images.float() / 255 - self.mean) / self.std)


class _Served(Normalised):
    """Bytes (N, 3, size, size) to probabilities (N, columns) and the columns of the predictions (N).

    The last column sums all outputs from there on. Predicted is the largest logit: close ones have equal probabilities.
    """

    def __init__(self, network: nn.Module, statistics: Statistics, columns: int) -> None:
        super().__init__(network, statistics)
        self.last = columns - 1

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = super().forward(images)
        table = F.softmax(logits, 1)
        if table.shape[1] > self.last + 1:
            table = torch.cat([table[:, : self.last], table[:, self.last :].sum(1, keepdim=True)], 1)
        return table, logits.argmax(1).clamp(max=self.last)


def write_served(
    folder: Path,
    network: nn.Module,
    statistics: Statistics,
    preparation: Preparation,
    *,
    classes: Sequence[str],
    outputs: int,
) -> dict[str, Path]:
    """Write the served model's other files, without a pickle. The network has `outputs`, the first of `classes`.

    Returns the files by their names.
    """
    names = output_names(classes, outputs)
    files = {"program": folder / "program.pt2", "settings": folder / "settings.json", "decoder": Path(decoder.__file__)}
    settings: dict[str, Any] = {"image_size": preparation.size, "names": names, "classes": len(classes)}
    if isinstance(preparation, CentreCrop):
        settings |= {"shorter_side": preparation.resize, "interpolation": preparation.interpolation.upper()}
    files["settings"].write_text(json.dumps(settings), encoding="utf-8")
    example = torch.zeros(2, 3, preparation.size, preparation.size, dtype=torch.uint8)  # 2: a batch of 1 would be fixed
    served = _Served(network, statistics, len(names)).eval()
    with uninterrupted():  # an exception within torch's tracing may abort the process
        program = torch.export.export(served, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        program.example_inputs = None  # it would be stored as a pickle
        torch.export.save(program, files["program"])
    return files


def read_program(path: Path) -> ExportedProgram:
    """Read the network of a served model; InputError for an archive with a pickle that torch would run."""
    with zipfile.ZipFile(path) as archive:
        files = {each.filename: each.file_size for each in archive.infolist()}
        configs = [json.loads(archive.read(name))["config"] for name in files if name.endswith("_config.json")]
    pickled = any(each["use_pickle"] for config in configs for each in config.values())
    inputs = any(size for name, size in files.items() if name.endswith(".pt"))  # write_served leaves these empty
    if pickled or inputs or not all(map(PROGRAM_FILE.fullmatch, files)):
        raise InputError("model", path.name, "holds more than tensors and a graph", "give a model that effv2 logged")
    return torch.export.load(path)


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


def as_base64(image: Image.Image) -> str:
    """Return an image in the form of a request."""
    buffer = io.BytesIO()
    decoder.to_rgb(image).save(buffer, "PNG")  # PNG has no CMYK
    return base64.b64encode(buffer.getvalue()).decode()
