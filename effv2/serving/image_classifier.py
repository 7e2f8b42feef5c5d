"""The served model, as MLflow loads it (models from code): this file, a torch.export program, a few settings.

Settings (JSON): image_size in pixels, names of the columns; and, where the central square is taken of an image whose
shorter side was resized, shorter_side in pixels and Pillow's name of the interpolation.

It answers without the rest of the package. A request holds images: base64 text over HTTP; from Python also bytes, paths
(pathlib), PIL images and arrays. A string is never a path: callers over HTTP could read the server's files.
"""

import base64
import binascii
import io
import json
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from PIL import Image, UnidentifiedImageError

LONGEST = 100  # times its width that an image may be high, or the other way round: it is enlarged as a whole
MOST = {"images": 1_000, "bytes": 200_000_000, "pixels": 300_000_000}  # of a request, all images together
# What Pillow and NumPy raise for something that is no image, or one that is too large to be honest.
BROKEN = (OSError, ValueError, SyntaxError, TypeError, Image.DecompressionBombWarning, Image.DecompressionBombError)
PLAINLY = {binascii.Error: "it is not base64", UnidentifiedImageError: "it is in no image format that Pillow knows"}


class Refused(MlflowException):
    """A request that isn't answered: HTTP status 400."""

    def __init__(self, text: str) -> None:
        self._text = text
        super().__init__(self._text, error_code=INVALID_PARAMETER_VALUE)

    # MLflow would prefix the whole request to a message that it can write to.
    message = property(lambda self: self._text, lambda self, _: None)


class BadImage(Refused):
    """An input that is no image."""

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(f"Image {position} of the request can't be read: {reason}.")


class ImageClassifier(PythonModel):
    """Images of any size and mode to class names and probabilities."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the program and the settings."""
        self.settings: dict[str, Any] = json.loads(Path(context.artifacts["settings"]).read_text(encoding="utf-8"))
        self.network = torch.export.load(context.artifacts["program"]).module()

    def predict(self, model_input: list[Any]) -> list[dict[str, Any]]:  # type: ignore[override]
        """Return, for each image, `label`, its `probability`, and `probabilities` of all classes by name."""
        if not model_input:
            return []
        _must_fit(model_input)
        names = self.settings["names"]
        pixels = np.stack([_pixels(item, i, self.settings) for i, item in enumerate(model_input)])
        with torch.inference_mode():
            table, predicted = self.network(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous())
        return [
            {"label": names[column], "probability": row[column], "probabilities": dict(zip(names, row, strict=True))}
            for row, column in zip(table.tolist(), predicted.tolist(), strict=True)
        ]


def _must_fit(items: list[Any]) -> None:
    """Refuse a request that would take too long or too much memory, before a pixel of it is decoded."""
    held = {"images": len(items), "bytes": sum(len(item) for item in items if isinstance(item, (str, bytes)))}
    _must_be_few(held)
    for item in items:
        with warnings.catch_warnings(), suppress(*BROKEN):  # which is told when it is decoded
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            width, height = _open(item).size
            held["pixels"] = held.get("pixels", 0) + width * height
    _must_be_few(held)


def _must_be_few(held: dict[str, int]) -> None:
    for unit, count in held.items():
        if count > MOST[unit]:
            raise Refused(f"The request holds {count:,} {unit}, more than {MOST[unit]:,}: send fewer images at once.")


def to_pixels(image: Image.Image, settings: dict[str, Any]) -> Any:
    """Turn an image of any mode into RGB bytes (size, size, 3) as training did; ValueError if too long to enlarge."""
    if image.mode.startswith("I;16"):  # Pillow would clip 16-bit greys at 255
        image = Image.fromarray((np.asarray(image, dtype=np.uint16) >> 8).astype(np.uint8))
    image, size = image.convert("RGB"), settings["image_size"]
    if "shorter_side" not in settings:
        return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR), dtype=np.uint8)
    side, (width, height) = settings["shorter_side"], image.size
    longer = int(side * max(width, height) / min(width, height))
    if longer > LONGEST * side:
        raise ValueError(f"an image of {width}x{height} pixels is too long for its width")
    shape = (side, longer) if width <= height else (longer, side)
    image = image.resize(shape, Image.Resampling[settings["interpolation"]])
    left, top = (round((length - size) / 2) for length in shape)
    return np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.uint8)


def _pixels(item: Any, position: int, settings: dict[str, Any]) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return to_pixels(_open(item), settings)
    except BROKEN as error:
        reason = PLAINLY.get(type(error)) or str(error).rstrip(".") or type(error).__name__
        raise BadImage(position, reason) from None


def _open(item: Any) -> Image.Image:
    if isinstance(item, Image.Image):
        return item
    if isinstance(item, np.ndarray):
        if item.dtype != np.uint8:
            raise ValueError("an array must hold bytes (uint8)")
        return Image.fromarray(item)
    if isinstance(item, str):
        text = item.partition("base64,")[2] or item  # a data URL brings a head along
        item = base64.b64decode("".join(text.split()), validate=True)
    elif isinstance(item, Path):
        item = item.read_bytes()
    image = Image.open(io.BytesIO(item))
    if image.format in ("EPS", "IPTC"):
        raise ValueError("PostScript, or what may hold it, is a program that Pillow would have run")
    return image


mlflow.models.set_model(ImageClassifier())
