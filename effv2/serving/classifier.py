"""A trained network with its preprocessing, as a module of PyTorch."""

from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from effv2.core.errors import InputError
from effv2.data.batches import Statistics
from effv2.data.decoder import open_image
from effv2.data.images import Preparation
from effv2.serving.export import Normalised

# A path, an image, or bytes (height, width) or (height, width, 3).
Picture = str | PathLike[str] | Image.Image | np.ndarray[Any, Any]


class Classifier(Normalised):
    """From images of any size and mode to logits (N, outputs), the first ones of `classes`. It starts in eval mode.

    `network` itself takes normalised images, and can be trained further.
    """

    def __init__(
        self, network: nn.Module, preparation: Preparation, statistics: Statistics, classes: Sequence[str]
    ) -> None:
        super().__init__(network.requires_grad_(True), statistics)
        self.preparation, self.classes = preparation, tuple(classes)
        self.eval()

    def preprocess(self, images: Picture | Iterable[Picture]) -> Tensor:
        """Return images, or one, as bytes (N, 3, size, size): decoded, upright, in RGB, resized.

        InputError for an array that is no image.
        """
        if isinstance(images, str | PathLike | Image.Image) or getattr(images, "ndim", 0) in (2, 3):
            images = [cast(Picture, images)]
        pixels = np.stack([self.preparation(_opened(image)) for image in images])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)

    def forward(self, images: Tensor | Picture | Iterable[Picture]) -> Tensor:
        """Return logits (N, outputs) of images, or of bytes from `preprocess`."""
        pixels = images if isinstance(images, Tensor) else self.preprocess(images)
        logits: Tensor = super().forward(pixels.to(self.mean.device))
        return logits

    @torch.inference_mode()
    def predict(self, images: Picture | Iterable[Picture]) -> list[tuple[str, float]]:
        """Return the most likely class of each image and its probability, over all outputs."""
        found = self(images).softmax(1)[:, : len(self.classes)].max(1)
        return [(self.classes[int(index)], float(p)) for p, index in zip(*found, strict=True)]


def _opened(image: Picture) -> Image.Image:
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,), (4,)):
            given = f"an array of {image.dtype}, {image.shape}"
            remedy = "give bytes (uint8) of shape (height, width) or (height, width, 3)"
            raise InputError("images", given, "is no image", remedy)
        return Image.fromarray(image)
    return image if isinstance(image, Image.Image) else open_image(Path(image))
