"""What commands refuse within a moment, because this module imports neither torch nor MLflow: names and files."""

import os
import re

from effv2.architecture import NETWORKS
from effv2.config.schema import ModelConfig
from effv2.core.errors import InputError
from effv2.core.internals import classification_networks

LOGGED = ("runs:/", "models:/")  # prefixes of the addresses of logged models; their store is asked later


def refuse_missing_weights(model: ModelConfig) -> None:
    """Refuse initial weights that are no file, no logged model, and no published ones of the network: InputError."""
    known = model.weights_partial or (model.variant in NETWORKS and not model.table)
    if known and re.fullmatch(r"\w*", model.weights):  # not a path; perhaps none at all
        return
    if model.weights and not model.weights.startswith(LOGGED) and not is_file(model.weights):
        problem = f"no such file, and only {', '.join(NETWORKS)} have published weights"
        remedy = "give a file, runs:/ID or models:/ID; model.weights_sha256 finds finished runs without the file"
        raise InputError("model.weights", model.weights, problem, remedy)


def refuse_missing_networks(models: str) -> None:
    """Refuse networks that torchvision doesn't have, and files (`name=file`) that aren't there: InputError."""
    known = classification_networks()
    for entry in filter(None, map(str.strip, models.split(","))):
        named, own, file = map(str.strip, entry.partition("="))
        name = named.partition(":")[0]
        if file.startswith(LOGGED):  # a logged model may have any name
            continue
        if name not in known:
            problem = "torchvision has no classification network of this name"
            raise InputError("models", name, problem, choices=known)
        if own and not is_file(file):
            remedy = f"give the path of a state dict of {name} after the equals sign"
            raise InputError("models", entry, f"{file} is not a readable file", remedy)


def is_file(path: str) -> bool:
    """Say whether a path that the user wrote is a file."""
    return os.path.isfile(os.path.expanduser(path))  # noqa: PTH113 (pathlib raises where a folder can't be entered)
