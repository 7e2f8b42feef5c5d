"""The weights that a training starts from: found, verified, held against its network, put into it."""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effv2.architecture import build_model
from effv2.config.schema import ModelConfig, TrainConfig
from effv2.core.errors import InputError
from effv2.core.provenance import sha256_of_file
from effv2.core.reporter import Message
from effv2.data.batches import NORMALISATIONS, Statistics
from effv2.data.dataset import LoadData
from effv2.run.few_images import with_default
from effv2.run.weights import OR_THERE, find_all_weights, load_network, parse_models, read_state
from effv2.serving.export import read_program
from effv2.tracking.models import fetch_model

SETTING, PUBLISHED = "model.weights", "published"
# What torchvision calls the networks of these tables.
NETWORKS = {"default": "efficientnet_v2_s"} | {name: name for name in ("efficientnet_v2_m", "efficientnet_v2_l")}
HEAD = "classifier."  # how the names of its parameters begin
TELLING = r"\w+|(runs|models):/.+"  # weights that tell how they want images: published ones and logged models
WANTED = {"image_size", "normalise"}  # of the data, as weights want them
COUNT = "num_batches_tracked"  # of batch norm: decides nothing
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Initial:
    """Weights: state dict, SHA-256; as far as they tell classes, normalisation, image size, an address that stays."""

    state: State
    sha256: str
    classes: Sequence[str] = ()
    normalise: str = ""
    image_size: int = 0
    address: str = ""


class OtherWeights(InputError):
    """The weights are there, but aren't those of the given hash."""


def with_weights(configs: Sequence[TrainConfig], load: LoadData, message: Message) -> list[TrainConfig]:
    """Return configs with hash and lasting address of their weights, with normalisation and image size of these.

    What of the latter two is given stays.

    InputError for weights that don't fit, have another hash than is given, or aren't there, unless all that is to be
    known of them is given: then the training that begins with them will see, and one of before needs them no more.
    """
    said = dict[str, None]()

    def settled(config: TrainConfig) -> TrainConfig:
        if not config.model.weights:  # an arm that refuses those of its study, with what belongs to them
            none = config.model.model_copy(update={"weights_sha256": "", "weights_partial": False})
            return config.model_copy(update={"model": none})
        try:
            initial = find_weights(config.model)
        except InputError as error:
            given = config.data.model_fields_set >= WANTED or not re.fullmatch(TELLING, config.model.weights)
            known = given and re.fullmatch(r"[0-9a-f]{64}", config.model.weights_sha256)
            gone = not isinstance(error, OtherWeights) and not os.path.exists(os.path.expanduser(config.model.weights))  # noqa: PTH110
            if known and gone:
                return config
            raise
        for name in sorted(WANTED):
            if wanted := getattr(initial, name):
                config = with_default(config, "data", name, wanted)
        said[f"{origin(config, load(config.data).classes)}, images of {config.data.image_size} pixels"] = None
        now = {"weights": initial.address or config.model.weights, "weights_sha256": initial.sha256}
        return config.model_copy(update={"model": config.model.model_copy(update=now)})

    found = list(map(settled, configs))
    first = next((config.data for config in found if config.model.weights), None)
    for name in sorted(WANTED) if first else ():  # an arm without weights is compared on the same images
        wanted = getattr(first, name)
        found = [each if each.model.weights else with_default(each, "data", name, wanted) for each in found]
    for text in said:
        message(f"Starts from {text}.")
    return found


def origin(config: TrainConfig, classes: Sequence[str]) -> str:
    """Say which weights a training starts from, and which share of its parameters they give."""
    with torch.device("meta"):
        network = build_model(config.model.build_table(), config.model.outputs or len(classes))
    found = find_weights(config.model)
    taken = fitting(found, network.state_dict(), config.model, classes)
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    share = sum(size for name, size in sizes.items() if name in taken) / sum(sizes.values())
    new = "" if any(name.startswith(HEAD) for name in taken) else ", a new head"
    now = f"now {found.address}, " if found.address not in ("", config.model.weights) else ""
    return f"{config.model.weights} ({now}{found.sha256[:10]}): {share:.2%} of the parameters{new}"


def initialise(config: TrainConfig, classes: Sequence[str]) -> Callable[[nn.Module], None]:
    """Return what puts the weights that a resolved config names into a network of it; the rest stays as it is."""

    def put(network: nn.Module) -> None:
        if config.model.weights:
            taken = fitting(find_weights(config.model), network.state_dict(), config.model, classes)
            network.load_state_dict(taken, strict=False)

    return put


def fitting(initial: Initial, network: State, config: ModelConfig, classes: Sequence[str]) -> State:
    """Return what of the weights a network takes: all of its body, and its head where that is of the same classes.

    With `weights_partial` what has the same name and shape. InputError where that isn't all, or is nothing.
    """
    alike = {name for name in network if name in initial.state and network[name].shape == initial.state[name].shape}
    head = {name for name in network if name.startswith(HEAD)}
    if not head <= alike or (initial.classes and tuple(initial.classes) != tuple(classes)):
        alike -= head
    differing = [name for name in (*network, *initial.state) if name not in alike | head and not name.endswith(COUNT)]
    if differing and not config.weights_partial:
        name = differing[0]
        theirs, ours = (
            str(tuple(each[name].shape)) if name in each else "not there" for each in (initial.state, network)
        )
        problem = f"they are of another network: {name} is {theirs} in them, {ours} in {config.variant}"
        raise InputError(SETTING, config.weights, problem, "give others, or model.weights_partial to take what fits")
    if all(name.endswith(COUNT) for name in alike):
        raise InputError(SETTING, config.weights, "nothing of them fits", "give those of a network that is more alike")
    return {name: initial.state[name] for name in alike}


def find_weights(config: ModelConfig) -> Initial:
    """Return the weights that a config names; InputError, also for those of another hash than it has."""
    path = os.path.expanduser(config.weights)
    written = os.stat(path).st_mtime_ns if os.path.isfile(path) else 0  # noqa: PTH113, PTH116 (as in _found)
    variant = "" if config.table else config.variant
    if config.weights_partial and variant not in NETWORKS:
        variant = "default"  # whose stages others share
    found = _found(config.weights, variant, written)
    if config.weights_sha256 and not found.sha256.startswith(config.weights_sha256):
        problem = f"their SHA-256 begins with {found.sha256[:10]}, not {config.weights_sha256[:10]}"
        raise OtherWeights(SETTING, config.weights, problem, "give those that were meant")
    return found


@lru_cache(maxsize=2)
def _found(weights: str, variant: str, _written: int) -> Initial:
    """Find weights; those that were read last are kept in memory."""
    try:
        if weights.startswith(("runs:/", "models:/")):
            served = read_served(weights)
            wanted = _name_of(*served.statistics), served.settings["image_size"]
            return Initial(served.state, served.sha256, served.classes, *wanted, served.address)
        path = os.path.expanduser(weights)
        if os.path.isfile(path):  # noqa: PTH113 (pathlib raises where a folder can't be entered)
            return Initial(read_state(Path(path)), sha256_of_file(Path(path)))
        if variant not in NETWORKS or not re.fullmatch(r"\w+", weights):  # the latter of a path
            problem = f"no such file, and published weights are of {', '.join(NETWORKS)} alone"
            remedy = "give a file, runs:/ID or models:/ID; a run that had them is found by its model.weights_sha256"
            raise InputError(SETTING, weights, problem, remedy)
        name = NETWORKS[variant] if weights == PUBLISHED else f"{NETWORKS[variant]}:{weights}"
        (found,) = find_all_weights(parse_models(name), None, progress=False)
        wanted = _name_of(*found.normalisation), found.preparation.size
        return Initial(load_network(found).state_dict(), found.sha256, (), *wanted)
    except InputError as error:
        raise InputError(SETTING, weights, error.problem, error.remedy.removesuffix(OR_THERE)) from error


@dataclass(frozen=True)
class Served:
    """A logged model: its address and run, weights with their SHA-256, normalisation, settings of the server."""

    address: str
    run_id: str
    state: State
    sha256: str
    statistics: Statistics
    settings: Mapping[str, Any]

    @property
    def outputs(self) -> int:
        """Return the width of its head."""
        return len(self.state[f"{HEAD}1.bias"])

    @property
    def classes(self) -> tuple[str, ...]:
        """Return its classes; where the head is wider, the last of its columns is all other outputs."""
        names = tuple(self.settings["names"])
        return names if len(names) == self.outputs else names[:-1]


def read_served(address: str) -> Served:
    """Read a logged model; InputError as fetch_model."""
    with tempfile.TemporaryDirectory() as place:
        found = fetch_model(address, Path(place))
        artifacts = found.flavors["python_function"]["artifacts"]
        program = read_program(Path(place, artifacts["program"]["path"]))
        settings = json.loads(Path(place, artifacts["settings"]["path"]).read_text("utf-8"))
    state = {name.removeprefix("network."): value.detach() for name, value in program.state_dict.items()}
    mean, std = (state.pop(name).flatten().tolist() for name in ("mean", "std"))
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode() + value.contiguous().numpy().tobytes())
    return Served(f"models:/{found.model_id}", str(found.run_id), state, digest.hexdigest(), (mean, std), settings)


def _name_of(mean: Sequence[float], std: Sequence[float]) -> str:
    """Return the name of a normalisation, empty for none that has one."""
    for name, known in NORMALISATIONS.items():
        if torch.allclose(torch.tensor([mean, std]), torch.tensor(known)):
            return name
    return ""
