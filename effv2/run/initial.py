"""The initial weights of a training: found, verified, compared with its network and loaded into it."""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effv2.architecture import NETWORKS, build_model
from effv2.config.schema import ModelConfig, TrainConfig
from effv2.core.errors import InputError
from effv2.core.provenance import sha256_of_file
from effv2.core.reporter import Message
from effv2.data.batches import NORMALISATIONS, Statistics
from effv2.data.dataset import LoadData
from effv2.run.early import LOGGED, is_file, refuse_missing_weights
from effv2.run.few_images import with_default
from effv2.run.weights import OR_THERE, find_all_weights, load_network, parse_models, read_state
from effv2.serving.export import read_program
from effv2.tracking.models import fetch_model

SETTING, PUBLISHED = "model.weights", "published"
HEAD = "classifier."  # prefix of the names of its parameters
TELLING = r"\w+|(runs|models):/.+"  # weights that know their preprocessing: published ones and logged models
WANTED = {"image_size", "normalise"}  # settings of the data that weights choose
COUNT = "num_batches_tracked"  # of batch norm: without influence
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class FoundWeights:
    """A state dict and its SHA-256. Published weights and logged models also have a normalisation and an image size.

    A logged model has a permanent address, the run that logged it, and the settings of its server.
    """

    state: State
    sha256: str
    statistics: Statistics = (), ()
    image_size: int = 0
    address: str = ""
    run_id: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def normalise(self) -> str:
        """Return the name of the normalisation; empty if it has none."""
        for name, known in NORMALISATIONS.items() if any(self.statistics) else ():
            if torch.allclose(torch.tensor(self.statistics), torch.tensor(known)):
                return name
        return ""

    @property
    def outputs(self) -> int:
        """Return the width of the head; 0 if it is not that of an EfficientNet."""
        return len(self.state.get(f"{HEAD}1.bias", ()))

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the classes of a logged model. If the head is wider, a last name stands for all other outputs.

        Older models don't say whether it does. It did if the head has more outputs than there are names.
        """
        names = tuple(self.settings.get("names", ()))
        return names[: self.settings.get("classes", len(names) - (len(names) < self.outputs))]


class OtherWeights(InputError):
    """The weights exist, but have another hash than the given one."""


def with_weights(configs: Sequence[TrainConfig], load: LoadData, message: Message) -> list[TrainConfig]:
    """Return configs with the hash, the permanent address, the normalisation and the image size of their weights.

    Given values of the latter two don't change.

    InputError for weights that don't fit or have another hash than the given one. The same for missing weights, unless
    all facts about them are given: then a new training checks them, and an earlier one no longer needs them.
    """
    said = dict[str, None]()

    def settled(config: TrainConfig) -> TrainConfig:
        if not config.model.weights:  # an arm that refuses the weights of its study, and their preprocessing
            return config.updated("model", weights_sha256="", weights_partial=False)
        try:
            initial = find_weights(config.model)
        except InputError as error:
            given = config.data.model_fields_set >= WANTED or not re.fullmatch(TELLING, config.model.weights)
            known = given and re.fullmatch(r"[0-9a-f]{64}", config.model.weights_sha256)
            gone = not isinstance(error, OtherWeights) and not is_file(config.model.weights)
            if known and gone:
                return config
            raise
        for name in sorted(WANTED):
            if wanted := getattr(initial, name):
                config = with_default(config, "data", name, wanted)
        said[f"{origin(config, load(config.data).classes)}, images of {config.data.image_size} pixels"] = None
        return config.updated("model", weights=initial.address or config.model.weights, weights_sha256=initial.sha256)

    found = list(map(settled, configs))
    first = next((config.data for config in found if config.model.weights), None)
    for name in sorted(WANTED) if first else ():  # an arm without weights gets the same images
        wanted = getattr(first, name)
        found = [each if each.model.weights else with_default(each, "data", name, wanted) for each in found]
    for text in said:
        message(f"Starts from {text}.")
    return found


def origin(config: TrainConfig, classes: Sequence[str]) -> str:
    """Describe the weights that a training starts from, and the share of parameters that they supply."""
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
    """Return a function that loads the weights of a resolved config into its network. Other parameters don't change."""

    def put(network: nn.Module) -> None:
        if config.model.weights:
            taken = fitting(find_weights(config.model), network.state_dict(), config.model, classes)
            network.load_state_dict(taken, strict=False)

    return put


def fitting(initial: FoundWeights, network: State, config: ModelConfig, classes: Sequence[str]) -> State:
    """Return the weights that a network takes: its whole body, and its head if the classes are the same.

    With `weights_partial`, those of equal name and shape. InputError if these don't suffice.
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
        problem = f"they belong to another network: {name} is {theirs} there and {ours} in {config.variant}"
        raise InputError(SETTING, config.weights, problem, "give others, or model.weights_partial to take what fits")
    if all(name.endswith(COUNT) for name in alike):
        raise InputError(SETTING, config.weights, "none of them fits", "give those of a more similar network")
    return {name: initial.state[name] for name in alike}


def find_weights(config: ModelConfig) -> FoundWeights:
    """Return the weights that a config names; InputError, also for another hash than that of the config."""
    refuse_missing_weights(config)
    path = Path(os.path.expanduser(config.weights))
    written = path.stat().st_mtime_ns if is_file(config.weights) else 0
    variant = "" if config.table else config.variant
    if config.weights_partial and variant not in NETWORKS:
        variant = "default"  # other tables share these stages
    found = _found(config.weights, variant, written)
    if config.weights_sha256 and not found.sha256.startswith(config.weights_sha256):
        problem = f"their SHA-256 begins with {found.sha256[:10]}, not {config.weights_sha256[:10]}"
        raise OtherWeights(SETTING, config.weights, problem, "give the intended weights")
    return found


@lru_cache(maxsize=2)
def _found(weights: str, variant: str, _written: int) -> FoundWeights:
    """Find weights. The last ones are kept in memory."""
    try:
        if weights.startswith(LOGGED):
            return read_served(weights)
        if is_file(weights):
            path = Path(os.path.expanduser(weights))
            return FoundWeights(read_state(path), sha256_of_file(path))
        name = NETWORKS[variant] if weights == PUBLISHED else f"{NETWORKS[variant]}:{weights}"
        (found,) = find_all_weights(parse_models(name), None, progress=False)
        state, size = load_network(found).state_dict(), found.preparation.size
        return FoundWeights(state, found.sha256, found.normalisation, size)
    except InputError as error:
        raise InputError(SETTING, weights, error.problem, error.remedy.removesuffix(OR_THERE)) from error


def read_served(address: str) -> FoundWeights:
    """Read a logged model; InputError as fetch_model."""
    with tempfile.TemporaryDirectory() as place:
        found, files = fetch_model(address, Path(place))
        program, settings = read_program(files["program"]), json.loads(files["settings"].read_text("utf-8"))
    state = {name.removeprefix("network."): value.detach() for name, value in program.state_dict.items()}
    mean, std = (state.pop(name).flatten().tolist() for name in ("mean", "std"))
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode() + value.contiguous().numpy().tobytes())
    about = settings["image_size"], f"models:/{found.model_id}", str(found.run_id), settings
    return FoundWeights(state, digest.hexdigest(), (mean, std), *about)
