"""ImageNet's 1000 classes: which output of a network a class folder means, and where an image file comes from.

The order of the outputs is that of the sorted WordNet ids of ILSVRC 2012, which imagenet_wnids.txt lists; the names are
torchvision's. Tests hold the two together by the classes of which torchvision knows both.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum
from functools import cache
from importlib.resources import files
from pathlib import PurePath

import numpy as np

from effv2.core.errors import InputError, close_names
from effv2.data.images import Labels


class Origin(Enum):
    """Where an image comes from, as ImageNet's own file names tell."""

    UNSEEN = "unseen"  # of ImageNet's validation set: held out when published weights were trained
    SEEN = "seen"  # of ImageNet's training set: published weights were fitted to it
    UNKNOWN = "unknown"


def origin(file: str) -> Origin:
    """Tell by the name, as ILSVRC2012_val_00000293.JPEG or n01440764_10026.JPEG."""
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
