"""The served model, as MLflow loads it (models from code): this file, its decoder, a network, settings.

The network is a torch.export program, or an equal ONNX file, which needs no torch: whichever of the two is there.

The decoder is the file that also decodes images for training. Settings (JSON): image_size in pixels, and names of the
columns. If the shorter side is resized and the central square is cropped: shorter_side in pixels, and Pillow's name of
the interpolation.

The rest of the package is not needed. A request holds images: base64 text over HTTP; from Python also bytes, paths
(pathlib), PIL images and arrays. A string is never a path: callers over HTTP could read the server's files.
"""

import base64
import binascii
import importlib.util
import io
import json
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from PIL import Image, UnidentifiedImageError

AT_ONCE = 64  # images per forward pass
MOST = {"images": 1_000, "bytes": 200_000_000, "pixels": 300_000_000}  # limits per request, all images together
PLAINLY = {binascii.Error: "it is not base64 or a Path", UnidentifiedImageError: "Pillow doesn't know its format"}


class Refused(MlflowException):
    """A refused request: HTTP status 400."""

    def __init__(self, text: str) -> None:
        self._text = text
        super().__init__(self._text, error_code=INVALID_PARAMETER_VALUE)

    # MLflow would prefix the whole request to a writable message.
    message = property(lambda self: self._text, lambda self, _: None)


class ImageClassifier(PythonModel):
    """Images of any size and mode to class names and probabilities."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the decoder, the network and the settings."""
        spec: Any = importlib.util.spec_from_file_location("decoder", context.artifacts["decoder"])
        self.decoder: Any = importlib.util.module_from_spec(spec)  # the decoder of this model
        spec.loader.exec_module(self.decoder)
        self.settings: dict[str, Any] = json.loads(Path(context.artifacts["settings"]).read_text(encoding="utf-8"))
        self.network = _load_network(context.artifacts)

    def predict(  # type: ignore[override]
        self, model_input: list[Any], params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Return, for each image, `label`, its `probability`, and `probabilities` of classes by name.

        The parameter `top_k` is the number of classes: the label first, then the most likely others. 0 means all.
        """
        top_k = (params or {}).get("top_k") or 0
        if top_k < 0:
            raise Refused(f"top_k is {top_k}: give the number of classes in the answer, or 0 for all.")
        if not model_input:
            return []
        self._must_fit(model_input)
        pixels = np.stack([self.pixels(item, i) for i, item in enumerate(model_input)])
        answers = []
        for first in range(0, len(pixels), AT_ONCE):
            images = np.ascontiguousarray(pixels[first : first + AT_ONCE].transpose(0, 3, 1, 2))
            table, predicted = self.network(images)
            answers += [self._answer(*each, top_k) for each in zip(table.tolist(), predicted.tolist(), strict=True)]
        return answers

    def _answer(self, row: list[float], column: int, top_k: int) -> dict[str, Any]:
        names, columns = self.settings["names"], range(len(row))
        told = sorted(columns, key=lambda each: (each != column, -row[each]))[:top_k] if top_k else columns
        probabilities = {names[each]: row[each] for each in told}
        return {"label": names[column], "probability": row[column], "probabilities": probabilities}

    def pixels(self, item: Any, position: int = 0) -> Any:
        """Return an image as the network's bytes (size, size, 3); Refused if it can't be read."""
        how = [self.settings[name] for name in ("shorter_side", "interpolation") if name in self.settings]
        self.decoder.allow(MOST["pixels"] / 1e6)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                return self.decoder.prepare(self._open(item), self.settings["image_size"], *how)
        except (*self.decoder.BROKEN, *self.decoder.TOO_LARGE) as error:
            reason = PLAINLY.get(type(error)) or str(error).rstrip(".") or type(error).__name__
            raise Refused(f"Image {position} of the request can't be read: {reason}.") from None

    def _must_fit(self, items: list[Any]) -> None:
        """Refuse a request that would take too long or too much memory, before any decoding."""
        held = {"images": len(items), "bytes": sum(len(item) for item in items if isinstance(item, (str, bytes)))}
        _must_be_few(held)
        self.decoder.allow(MOST["pixels"] / 1e6)
        told_later = (*self.decoder.BROKEN, *self.decoder.TOO_LARGE)
        for item in items:
            with warnings.catch_warnings(), suppress(*told_later):
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                image = self._open(item)
                frames = min(getattr(image, "n_frames", 1), self.decoder.FRAMES)  # all may be decoded
                held["pixels"] = held.get("pixels", 0) + image.width * image.height * frames
        _must_be_few(held)

    def _open(self, item: Any) -> Image.Image:
        if isinstance(item, Image.Image):
            return item
        if isinstance(item, np.ndarray):
            if item.dtype != np.uint8:
                raise ValueError("an array must hold bytes (uint8)")
            return Image.fromarray(item)
        if isinstance(item, str):
            text = item.partition("base64,")[2] or item  # a data URL has a head
            item = base64.b64decode("".join(text.split()), validate=True)
        opened: Image.Image = self.decoder.open_image(io.BytesIO(item.read_bytes() if isinstance(item, Path) else item))
        return opened


def _load_network(artifacts: dict[str, str]) -> Callable[[Any], Any]:
    """Return a NumPy function from bytes (N, 3, size, size) to probabilities (N, columns) and predicted columns (N)."""
    if "onnx" in artifacts:
        import onnxruntime

        session = onnxruntime.InferenceSession(artifacts["onnx"], providers=["CPUExecutionProvider"])
        return lambda images: session.run(None, {"images": images})

    import torch

    program = torch.export.load(artifacts["program"]).module()

    def run(images: Any) -> list[Any]:
        with torch.inference_mode():
            return [each.numpy() for each in program(torch.from_numpy(images))]

    return run


def _must_be_few(held: dict[str, int]) -> None:
    for unit, count in held.items():
        if count > MOST[unit]:
            raise Refused(f"The request holds {count:,} {unit}, more than {MOST[unit]:,}: send fewer images at once.")


mlflow.models.set_model(ImageClassifier())
