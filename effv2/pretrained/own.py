"""Networks with heads for the data's own classes: the user's state dicts, and logged models of trainings."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import nn
from torchvision import models

from effv2.architecture import build_model
from effv2.config.layers import validate
from effv2.config.schema import ModelConfig
from effv2.core.errors import InputError, listed
from effv2.data.images import Labels, Square
from effv2.pretrained.images import EvaluationImages, class_names
from effv2.run import weights
from effv2.run.initial import FoundWeights, read_served
from effv2.run.weights import Requested, find_all_weights, read_state
from effv2.serving.classifier import Classifier
from effv2.tracking.read import read_run

SHOWN = 5  # classes that a message names


def find_networks(
    requests: Sequence[Requested], folder: Path | None, progress: bool, images: EvaluationImages
) -> list[Requested]:
    """Find files as find_all_weights does, and logged models; InputError if the classes don't fit the images."""
    files = iter(find_all_weights([each for each in requests if not each.address], folder, progress))
    found = []
    for requested in requests:
        each = _logged(requested) if requested.address else next(files)
        if each.outputs != weights.OUTPUTS:
            each = replace(each, classes=each.classes or images.names)
        outputs_of(each, images)
        found.append(each)
    return found


def outputs_of(requested: Requested, images: EvaluationImages) -> Labels:
    """Return the outputs (K) of a network for the classes of the images; InputError."""
    own = requested.classes
    if not own:
        return images.outputs
    missing = [name for name in images.names if name not in own]
    if missing or (requested.outputs != len(own) and not requested.address):
        problem = f"it has {requested.outputs} outputs, but the data has {len(images.names)} classes"
        if missing:
            problem = f"it doesn't have the classes {listed(missing, SHOWN, ', ')}, but {listed(own, SHOWN, ', ')}"
        remedy = f"give a network for the classes of the data, or for ImageNet's {weights.OUTPUTS}"
        raise InputError("models", requested.text, problem, remedy)
    return np.array([own.index(name) for name in images.names], dtype=np.int64)


def load_network(requested: Requested) -> nn.Module:
    """Build the network in eval mode on the CPU; InputError for a file that is not a state dict of it."""
    if not requested.classes:
        return weights.load_network(requested)
    network: nn.Module
    if requested.address:
        state, run = _read(requested).state, read_run(requested.run_id)
        params = run.params if run else {}
        names = [name for name in ModelConfig.model_fields if f"model.{name}" in params]
        model = validate(ModelConfig, {name: params[f"model.{name}"] for name in names})
        network = build_model(model.build_table(), requested.outputs)
    else:
        network = models.get_model(requested.network, num_classes=requested.outputs)
        state = read_state(requested.path)
    try:
        network.load_state_dict(dict(state))
    except RuntimeError as error:
        problem = f"its parameters are not those of {requested.network} ({weights.in_short(error)})"
        raise InputError("models", requested.text, problem, "give a state dict, or a logged model") from error
    return network.eval().requires_grad_(False)


def _read(requested: Requested) -> FoundWeights:
    try:
        return read_served(requested.address)
    except InputError as error:
        raise InputError("models", requested.text, error.problem, error.remedy) from error


def _logged(requested: Requested) -> Requested:
    """Return the description in a logged model: its place, its classes, its preprocessing."""
    served = _read(requested)
    name = run.params.get("weights.name", "") if (run := read_run(served.run_id)) else ""
    if name or not served.outputs or "shorter_side" in served.settings:  # also if the evaluation's run was deleted
        problem = f"it was logged by an evaluation of weights{name and f' ({name})'}, not by a training"
        raise InputError("models", requested.text, problem, "name these weights or their file instead")
    return replace(
        requested,
        address=served.address,
        run_id=served.run_id,
        sha256=served.sha256,
        outputs=served.outputs,
        classes=served.classes,
        brings=(Square(served.settings["image_size"]), served.statistics),
    )


def open_network(requested: Requested) -> Classifier:
    """Return a found network with its preprocessing."""
    classes = requested.classes or class_names()
    return Classifier(load_network(requested), requested.preparation, requested.normalisation, classes)


def open_logged(address: str) -> Classifier:
    """Return the model of a training by its address; InputError if it is not one."""
    return open_network(_logged(Requested(address, "model", None, address=address, outputs=0)))
