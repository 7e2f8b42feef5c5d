"""The images that networks are evaluated on, and the sets of them that are reported apart."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from effv2.config import DataConfig
from effv2.data.images import Labels, Part
from effv2.data.sources import open_source
from effv2.data.splits import Positions, sample_per_class
from effv2.errors import InputError
from effv2.pretrained.config import ImagesConfig
from effv2.pretrained.imagenet import Origin, class_names, origin, outputs_of
from effv2.randomness import stream_seed

TEST = "eval"  # the set of all test images; the others are named by their origin


@dataclass(frozen=True)
class EvaluationImages:
    """Test images, and behind them those of the training part that ImageNet held out.

    `part` holds files and labels 0 to K - 1; `outputs` (K) are the networks' outputs that the labels mean.
    """

    name: str
    location: str
    part: Part
    outputs: Labels
    tests: int

    @property
    def classes(self) -> tuple[str, ...]:
        """Return torchvision's names of the K classes present."""
        return tuple(class_names()[output] for output in self.outputs)

    @cached_property
    def sets(self) -> dict[str, Positions]:
        """Return the positions of the images of each set.

        `eval`: the test images. By origin, where not all test images are of that one: `unseen`, of ImageNet's
        validation set, here also those of the training part; `seen`, test images of ImageNet's training set;
        `unknown`, the other test images.
        """
        origins = np.array([origin(file).value for file in self.part.ids])
        found = {TEST: np.arange(self.tests)}
        for each in Origin:
            members = np.flatnonzero(origins == each.value)
            if each is not Origin.UNSEEN:
                members = members[members < self.tests]
            if len(members) and not np.array_equal(members, found[TEST]):
                found[each.value] = members
        return found

    @property
    def basis(self) -> str:
        """Return the set that rankings rest on: images that the weights were not fitted to, as far as is known."""
        return next((each.value for each in (Origin.UNSEEN, Origin.UNKNOWN) if each.value in self.sets), TEST)

    @property
    def basis_origin(self) -> Origin:
        """Return where the images of the basis come from."""
        return origin(self.part.ids[self.sets[self.basis][0]])

    def profile(self) -> dict[str, Any]:
        """Return the number of images of each set, and of each class."""
        counts = np.bincount(self.part.labels, minlength=len(self.outputs)).tolist()
        return {"images": {name: len(members) for name, members in self.sets.items()}} | {
            "classes": dict(zip(self.classes, counts, strict=True))
        }


def choose_images(config: ImagesConfig) -> EvaluationImages:
    """Find the images: the test part of the set, or all of it where it has none.

    Images of the training part that are of ImageNet's validation set come along, unless a quick look was asked for.
    InputError for a folder that isn't there, or whose classes are not ImageNet's.
    """
    try:
        source = open_source(DataConfig(dataset=config.dataset, dir=config.dir, download=config.download))
    except OSError as error:
        raise InputError(
            f"--data-dir {config.dir}: {error.filename} can't be read ({error.strerror}); give yourself access."
        ) from error
    outputs = outputs_of(source.classes, config.dir)
    test = source.train if source.test is None else source.test
    chosen = sample_per_class(test.labels, config.per_class, source.classes, config.seed)
    if 0 < config.limit < len(chosen):
        generator = np.random.default_rng(stream_seed(config.seed, "limit"))
        chosen = np.sort(generator.choice(chosen, config.limit, replace=False))
    part = test.take(chosen)
    if source.test is not None and not config.per_class and not config.limit:
        held_out = [i for i, file in enumerate(source.train.ids) if origin(file) is Origin.UNSEEN]
        part = part.join(source.train.take(held_out))
    return EvaluationImages(source.name, source.location, part, outputs, len(chosen))
