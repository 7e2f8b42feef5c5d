"""The images of evaluations: ImageNet's classes, the origin of files, and the sets that are reported separately.

The order of the outputs is that of the sorted WordNet ids of ILSVRC 2012, which imagenet_wnids.txt lists. The names are
torchvision's. Tests compare the two for the classes of which torchvision has both.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib.resources import files
from pathlib import PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torchvision.models import ResNet50_Weights

from effv2.config.schema import DataConfig
from effv2.core.errors import InputError, close_names
from effv2.core.randomness import stream_seed
from effv2.data.dataset import Positions, sample_per_class
from effv2.data.folders import left_out_note, unreadable_note
from effv2.data.images import LabelledImages, Labels
from effv2.data.sources import open_source
from effv2.pretrained.config import ImagesConfig

TEST = "eval"  # the set of all test images; other sets are named by their origin
# The origin of an image: ImageNet's validation set, which was held out when published weights were trained, or its
# training set, on which they were trained.
UNSEEN, SEEN, UNKNOWN = "unseen", "seen", "unknown"


@cache
def origin(file: str) -> str:
    """Return the origin of an image, from ImageNet's names: ILSVRC2012_val_00000293.JPEG or n01440764_10026.JPEG."""
    name = PurePath(file).name
    if re.match(r"ILSVRC2012_val_\d{8}\b", name):
        return UNSEEN
    return SEEN if re.match(r"n\d{8}_\d+\b", name) else UNKNOWN


@cache
def wnids() -> tuple[str, ...]:
    """Return the WordNet ids of the 1000 classes, in the order of the outputs."""
    return tuple(files("effv2.pretrained").joinpath("imagenet_wnids.txt").read_text("ascii").split())


@cache
def class_names() -> tuple[str, ...]:
    """Return torchvision's names of the 1000 classes, in the order of the outputs."""
    return tuple(ResNet50_Weights.DEFAULT.meta["categories"])


def outputs_of(names: Sequence[str], config: ImagesConfig) -> Labels:
    """Return the output (0 to 999) of each class, by its WordNet id or torchvision's name; InputError."""
    known = {name: index for names in (class_names(), wnids()) for index, name in enumerate(names)}
    what, value = ("data.dir", config.dir) if config.dir else ("data.dataset", config.dataset)
    found = [known.get(name.replace("_", " ")) for name in names]  # French_horn is French horn
    for name, output in zip(names, found, strict=True):
        if output is None:
            hint = f" (did you mean {near}?)" if (near := close_names(name, class_names())) else ""
            problem = f"the class {name!r} is not one of ImageNet's{hint}"
            remedy = "name every class by its WordNet id, such as n01440764, or by torchvision's name, such as tench"
            raise InputError(what, value, problem, remedy)
    twice = [name for name, output in zip(names, found, strict=True) if found.count(output) > 1]
    if twice:
        raise InputError(what, value, f"{' and '.join(twice)} are the same class of ImageNet", "merge them")
    return np.array(found, dtype=np.int64)


@dataclass(frozen=True)
class EvaluationImages:
    """Test images, followed by other images from ImageNet's validation set.

    `part` holds files and labels 0 to K - 1, of the data's classes `names` (K). `outputs` (K) are the outputs of
    ImageNet's networks for these, empty if no such network is evaluated. `note` describes files that were left out,
    and `broken` names unreadable images.
    """

    name: str
    location: str
    part: LabelledImages
    outputs: Labels
    tests: int
    note: str = ""
    names: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()

    def without(self, broken: set[int]) -> "EvaluationImages":
        """Return these images without unreadable positions; InputError if no test image is left."""
        kept = np.setdiff1d(np.arange(len(self.part)), sorted(broken))
        if not (tests := int((kept < self.tests).sum())):
            raise InputError("data.dir", self.location, "no test image can be read", "add images")
        names = tuple(self.part.ids[at] for at in sorted(broken))
        note = f"{self.note} {unreadable_note(names)}".strip()
        return replace(self, part=self.part.take(kept), tests=tests, note=note, broken=names)

    @property
    def classes(self) -> tuple[str, ...]:
        """Return torchvision's names of the K present classes, or the data's names if they aren't ImageNet's."""
        return tuple(class_names()[output] for output in self.outputs) or self.names

    @cached_property
    def origins(self) -> NDArray[np.str_]:
        """Return the origin of each image."""
        return np.array([origin(file) for file in self.part.ids])

    @cached_property
    def sets(self) -> dict[str, Positions]:
        """Return the positions of the images of each set.

        `eval`: the test images. The others exist if they differ from this. `unseen`: images of ImageNet's validation
        set, including those in the training part. `seen`: test images of ImageNet's training set. `unknown`, if some
        names don't show their origin: test images that are not known to be seen.
        """
        tests = np.arange(self.tests)
        members = {name: np.flatnonzero(self.origins == name) for name in (UNSEEN, SEEN)}
        if UNKNOWN in self.origins:
            members[UNKNOWN] = np.setdiff1d(tests, members[SEEN])
        others = {name: each for name, each in members.items() if len(each) and not np.array_equal(each, tests)}
        return {TEST: tests} | others

    @property
    def ranked(self) -> tuple[str, str]:
        """Return the set that networks are ranked on, and the origin of its images.

        As far as known, weights were not trained on these images. They are those of ImageNet's validation set, unless
        more test images are of unknown origin.
        """
        unseen, unknown = ((self.origins == name).sum() for name in (UNSEEN, UNKNOWN))
        where = SEEN if not unseen + unknown else UNSEEN if unseen >= unknown else UNKNOWN
        return where if where in self.sets else TEST, where

    def profile(self) -> dict[str, Any]:
        """Return the number of images per set, and per class."""
        counts = np.bincount(self.part.labels, minlength=len(self.classes)).tolist()
        images = {name: len(members) for name, members in self.sets.items()}
        return {"images": images, "classes": dict(zip(self.classes, counts, strict=True))}


def choose_images(config: ImagesConfig, imagenet: bool = True, own: bool = False) -> EvaluationImages:
    """Find the test part of the set, or all of it without a test part, and all images of ImageNet's validation set.

    With a limit, as many of each are drawn. InputError if the set is missing or, for networks of `imagenet`, its
    classes aren't ImageNet's. If networks were trained on the data's `own` classes, the training part is left out.
    """
    there = {"dir": config.dir, "download": config.download}
    source = open_source(DataConfig(dataset=config.dataset, allow_incomplete_classes=True, **there))
    outputs = outputs_of(source.classes, config) if imagenet else np.array([], dtype=np.int64)
    test = source.train if source.test is None else source.test
    images = test if source.test is None else test.join(source.train)

    def draw(positions: Positions, stream: str) -> Positions:
        """Return a random choice, in order, of as many as the limit allows."""
        if not 0 < config.limit < len(positions):
            return positions
        generator = np.random.default_rng(stream_seed(config.seed, stream))
        return positions[np.sort(generator.choice(len(positions), config.limit, replace=False))]

    tests = draw(sample_per_class(test.labels, config.per_class, source.classes, config.seed), "limit")
    rest = np.setdiff1d(np.arange(len(images)), tests)
    unseen = rest[np.array([origin(images.ids[i]) == UNSEEN and not own for i in rest], dtype=bool)]
    if config.per_class:
        mixed = np.random.default_rng(stream_seed(config.seed, "unseen")).permutation(unseen)
        firsts = [mixed[images.labels[mixed] == label][: config.per_class] for label in range(len(source.classes))]
        unseen = np.sort(np.concatenate(firsts))
    chosen = images.take(np.concatenate([tests, draw(unseen, "unseen limit")]))
    note = left_out_note(source.location, source.left_out)
    return EvaluationImages(config.dataset, source.location, chosen, outputs, len(tests), note, source.classes)
