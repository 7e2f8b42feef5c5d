"""The images that networks are evaluated on: ImageNet's classes, where files come from, and what is reported apart.

The order of the outputs is that of the sorted WordNet ids of ILSVRC 2012, which imagenet_wnids.txt lists; the names are
torchvision's. Tests hold the two together by the classes of which torchvision knows both.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache, cached_property
from importlib.resources import files
from pathlib import PurePath
from typing import Any

import numpy as np

from effv2.config.schema import DataConfig
from effv2.core.errors import InputError, close_names
from effv2.core.randomness import stream_seed
from effv2.data.dataset import Positions, sample_per_class
from effv2.data.images import LabelledImages, Labels
from effv2.data.sources import open_source
from effv2.pretrained.config import ImagesConfig

TEST = "eval"  # the set of all test images; the others are named by their origin


class Origin(Enum):
    """Where an image comes from, as ImageNet's own file names say."""

    UNSEEN = "unseen"  # of ImageNet's validation set: held out when published weights were trained
    SEEN = "seen"  # of ImageNet's training set: published weights were fitted to it
    UNKNOWN = "unknown"


@cache
def origin(file: str) -> Origin:
    """Return it by the name, as ILSVRC2012_val_00000293.JPEG or n01440764_10026.JPEG."""
    name = PurePath(file).name
    if re.match(r"ILSVRC2012_val_\d{8}\b", name):
        return Origin.UNSEEN
    return Origin.SEEN if re.match(r"n\d{8}_\d+\b", name) else Origin.UNKNOWN


@cache
def wnids() -> tuple[str, ...]:
    """Return the WordNet ids of the 1000 classes, in the order of the outputs."""
    return tuple(files("effv2.pretrained").joinpath("imagenet_wnids.txt").read_text("ascii").split())


@cache
def class_names() -> tuple[str, ...]:
    """Return torchvision's names of the 1000 classes, in the order of the outputs."""
    from torchvision.models import ResNet50_Weights

    return tuple(ResNet50_Weights.DEFAULT.meta["categories"])


def outputs_of(folders: Sequence[str], location: str) -> Labels:
    """Return the output (0 to 999) that each class folder means by its WordNet id or torchvision's name of the class.

    InputError for a folder that means none, or two that mean the same.
    """
    known = {name: index for names in (class_names(), wnids()) for index, name in enumerate(names)}
    names = [folder.replace("_", " ") for folder in folders]  # French_horn is French horn
    for folder, name in zip(folders, names, strict=True):
        if name not in known:
            hint = f" (did you mean {near}?)" if (near := close_names(name, class_names())) else ""
            problem = f"the folder {folder!r} is no class of ImageNet{hint}"
            remedy = "name every class folder by its WordNet id, as n01440764, or by torchvision's name, as tench"
            raise InputError("data.dir", location, problem, remedy)
    found = [known[name] for name in names]
    twice = [folder for folder, output in zip(folders, found, strict=True) if found.count(output) > 1]
    if twice:
        raise InputError("data.dir", location, f"{' and '.join(twice)} are the same class of ImageNet", "merge them")
    return np.array(found, dtype=np.int64)


@dataclass(frozen=True)
class EvaluationImages:
    """Test images, and behind them others that are of ImageNet's validation set.

    `part` holds files and labels 0 to K - 1; `outputs` (K) are the networks' outputs that the labels mean.
    """

    name: str
    location: str
    part: LabelledImages
    outputs: Labels
    tests: int

    @property
    def classes(self) -> tuple[str, ...]:
        """Return torchvision's names of the K classes present."""
        return tuple(class_names()[output] for output in self.outputs)

    def _of(self, wanted: Origin) -> Positions:
        return np.flatnonzero([origin(file) is wanted for file in self.part.ids])

    @cached_property
    def sets(self) -> dict[str, Positions]:
        """Return the positions of the images of each set.

        `eval`: the test images. Then, where they aren't all of the test images: `unseen`, of ImageNet's validation set,
        also those that came along from the training part; `seen`, test images of ImageNet's training set; `unknown`,
        where the names of some don't say, the test images that are not known to be seen.
        """
        tests = np.arange(self.tests)
        seen = np.intersect1d(self._of(Origin.SEEN), tests)
        members = {Origin.UNSEEN: self._of(Origin.UNSEEN), Origin.SEEN: seen}
        if np.isin(self._of(Origin.UNKNOWN), tests).any():
            members[Origin.UNKNOWN] = np.setdiff1d(tests, seen)
        others = {name.value: each for name, each in members.items() if len(each) and not np.array_equal(each, tests)}
        return {TEST: tests} | others

    @property
    def ranked_on(self) -> str:
        """Return the set that networks are ranked on: images that the weights were not fitted to, as far as is known.

        Those of ImageNet's validation set, unless more test images are of unknown origin.
        """
        return self.ranked_origin.value if self.ranked_origin.value in self.sets else TEST

    @property
    def ranked_origin(self) -> Origin:
        """Return where those images come from; unknown if that holds for any of them."""
        unseen, unknown = len(self._of(Origin.UNSEEN)), np.isin(self._of(Origin.UNKNOWN), np.arange(self.tests)).sum()
        if not unseen and not unknown:
            return Origin.SEEN
        return Origin.UNSEEN if unseen >= unknown else Origin.UNKNOWN

    def profile(self) -> dict[str, Any]:
        """Return the number of images of each set, and of each class."""
        counts = np.bincount(self.part.labels, minlength=len(self.outputs)).tolist()
        return {"images": {name: len(members) for name, members in self.sets.items()}} | {
            "classes": dict(zip(self.classes, counts, strict=True))
        }


def choose_images(config: ImagesConfig) -> EvaluationImages:
    """Find the images: the test part of the set, or all of it where it has none, and all of ImageNet's validation set.

    For a quick look, test images are drawn, and as many of the images of ImageNet's validation set. InputError for a
    folder that isn't there, or whose classes are not ImageNet's.
    """
    source = open_source(DataConfig(dataset=config.dataset, dir=config.dir, download=config.download))
    outputs = outputs_of(source.classes, config.dir)
    test = source.train if source.test is None else source.test
    chosen = sample_per_class(test.labels, config.per_class, source.classes, config.seed)
    chosen = chosen[_draw(len(chosen), config, "limit")]
    more = test.take(np.setdiff1d(np.arange(len(test)), chosen))
    more = more if source.test is None else more.join(source.train)
    more = more.take([i for i, file in enumerate(more.ids) if origin(file) is Origin.UNSEEN])
    if config.per_class:
        generator = np.random.default_rng(stream_seed(config.seed, "unseen"))
        mixed = generator.permutation(len(more))
        firsts = [mixed[more.labels[mixed] == label][: config.per_class] for label in range(len(outputs))]
        more = more.take(np.sort(np.concatenate(firsts)))
    more = more.take(_draw(len(more), config, "unseen limit"))
    return EvaluationImages(source.name, source.location, test.take(chosen).join(more), outputs, len(chosen))


def _draw(count: int, config: ImagesConfig, stream: str) -> Positions:
    """Return the positions of as many images as the limit allows, drawn at random, in order."""
    if not 0 < config.limit < count:
        return np.arange(count)
    generator = np.random.default_rng(stream_seed(config.seed, stream))
    return np.sort(generator.choice(count, config.limit, replace=False))
