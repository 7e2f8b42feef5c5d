"""From a trained network to the one file that the served model runs: bytes in, class probabilities out."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from effv2.data.images import CentreCrop, Square, to_rgb

OTHER = "other"


def fold_probabilities(probabilities: Tensor, classes: int) -> Tensor:
    """Sum what lies beyond the classes into one more column; (N, outputs) to (N, classes [+ 1])."""
    if probabilities.shape[1] == classes:
        return probabilities
    return torch.cat([probabilities[:, :classes], probabilities[:, classes:].sum(1, keepdim=True)], 1)


def fold_predictions(logits: Tensor, classes: int) -> Tensor:
    """Return the argmax over all outputs (N), whatever lies beyond the classes being the column `classes`.

    Of logits: close ones tie as probabilities.
    """
    return logits.argmax(1).clamp(max=classes)


def output_names(classes: Sequence[str], outputs: int) -> list[str]:
    """Name the columns of fold_probabilities: the classes and, where the head is wider, `other`."""
    other = OTHER
    while other in classes:
        other += "_"
    return [*classes, other] if outputs > len(classes) else list(classes)


class ServedNetwork(nn.Module):
    """Scaling, normalisation, network and softmax: uint8 (N, 3, size, size) in."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, classes: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network, self.classes = network, classes
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return class probabilities (N, names) and the column of the prediction (N), the argmax over all."""
        inputs = (images.float() / 255 - self.mean) / self.std
        logits = self.network(inputs)
        return fold_probabilities(F.softmax(logits, 1), self.classes), fold_predictions(logits, self.classes)


def write_served(
    folder: Path, network: ServedNetwork, preparation: Square | CentreCrop, names: Sequence[str]
) -> dict[str, Path]:
    """Write the files that the served model consists of, besides its code; return them by the names it knows."""
    files = {"program": folder / "program.pt2", "settings": folder / "settings.json"}
    settings: dict[str, Any] = {"image_size": preparation.size, "names": list(names)}
    if isinstance(preparation, CentreCrop):
        settings |= {"shorter_side": preparation.resize, "interpolation": preparation.interpolation.upper()}
    export_program(network, preparation.size, files["program"])
    files["settings"].write_text(json.dumps(settings), encoding="utf-8")
    return files


def as_base64(image: Image.Image) -> str:
    """Return an image as a request holds it."""
    buffer = io.BytesIO()
    to_rgb(image).save(buffer, "PNG")  # PNG knows no CMYK
    return base64.b64encode(buffer.getvalue()).decode()


def export_program(network: ServedNetwork, image_size: int, path: Path) -> None:
    """Write `network` to `path` as a torch.export program with a free batch size. Nothing in it is a pickle."""
    example = torch.zeros(2, 3, image_size, image_size, dtype=torch.uint8)  # 2: a batch of 1 would be frozen in
    program = torch.export.export(network.eval(), (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    program.example_inputs = None  # it would be stored as a pickle
    torch.export.save(program, path)
