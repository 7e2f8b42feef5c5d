"""torchvision's classification networks and their published weights: named, found, verified, loaded.

torchvision checks the hash of a file only when it downloads it. effv2 verifies every published file.
"""

import argparse
import os
import re
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torchvision import models

from effv2.core.errors import InputError, nearest
from effv2.core.internals import imagenet_metrics
from effv2.core.provenance import sha256_of_file
from effv2.data.batches import Statistics
from effv2.data.images import CentreCrop, Preparation
from effv2.run.early import LOGGED

OUTPUTS = 1000
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network")  # keys of whole checkpoints
HOLDERS = ("module.", "_orig_mod.", "model.", "net.", "network.")  # prefixes of the names of parameters
LONGEST_STEM = 60  # characters of a file name in a label, which becomes part of the names of metrics
OR_THERE = ", or into the folder `weights_dir`"
SILENT_SECONDS = 20  # seconds without an answer after which a download fails


class SeveralNetworks(ValueError):
    """A file of weights holds more than one network."""


@dataclass(frozen=True)
class Requested:
    """A requested network, the published weights whose transforms apply, and the user's own file or None.

    Once found, the file is at `path`. It is `verified` if its SHA-256 begins as in the published name. A logged model
    has the given `address` instead (later its own, with the run that logged it), and its own preprocessing. If its
    `outputs` aren't ImageNet's, `classes` names the first of them.
    """

    text: str
    network: str
    weights: Any  # of WeightsEnum; None of a logged model
    file: Path | None = None
    path: Path = Path()
    sha256: str = ""
    verified: bool = False
    address: str = ""
    run_id: str = ""
    outputs: int = OUTPUTS
    classes: tuple[str, ...] = ()
    brings: tuple[Preparation, Statistics] | None = None

    @property
    def label(self) -> str:
        """Return a short name: the network, and the weights if they aren't the default."""
        if self.file is not None:
            stem = re.sub(r"[^A-Za-z0-9_. -]", "_", self.file.stem)[:LONGEST_STEM]
            return stem if stem.startswith(self.network) else f"{self.network} {stem}"
        return self.network if ":" not in self.text or self.address else f"{self.network}:{self.weights.name}"

    @property
    def preparation(self) -> Preparation:
        """Return how the weights require an image to be resized and cropped."""
        if self.brings:
            return self.brings[0]
        preset = self.weights.transforms()
        return CentreCrop(preset.crop_size[0], preset.resize_size[0], preset.interpolation.value)

    @property
    def normalisation(self) -> Statistics:
        """Return the mean and standard deviation per channel with which the weights require images to be normalised."""
        return self.brings[1] if self.brings else (self.weights.transforms().mean, self.weights.transforms().std)

    @property
    def weights_name(self) -> str:
        """Return the name of published weights, or of the user's own file or model."""
        return self.address or (str(self.weights) if self.file is None else self.file.name)

    @property
    def hash_head(self) -> str:
        """Return the first digits of the published file's SHA-256, from the end of its name."""
        return str(self.weights.url).rpartition("-")[2].removesuffix(".pth")

    @property
    def published(self) -> dict[str, float]:
        """Return torchvision's published accuracies, as fractions; empty for a file of the user's own."""
        metrics = imagenet_metrics(self.weights) if self.file is None and not self.address else {}
        return {f"top{k}_accuracy": metrics[f"acc@{k}"] / 100 for k in (1, 5) if f"acc@{k}" in metrics}


def parse_models(text: str) -> list[Requested]:
    """Read `name`, `name:WEIGHTS`, `name=file`, `name:WEIGHTS=file`, `name=runs:/ID` or such, separated by commas.

    InputError for anything else, but unknown networks and missing files are refused earlier (effv2.run.early).
    """
    found = [_parse(word.strip()) for word in text.split(",") if word.strip()]
    if not found:
        raise InputError("models", text, "names no network", "give some, separated by commas, such as resnet50")
    for one in found:
        twins = [each.text for each in found if _source_of(each) == _source_of(one)]
        if len(twins) > 1:
            raise InputError("models", text, f"{' and '.join(twins)} are the same weights", "name each once")
        if [other.label for other in found].count(one.label) > 1:
            raise InputError("models", text, f"two files would both be named {one.label!r}", "rename one of them")
    return found


def _source_of(requested: Requested) -> tuple[Any, ...]:
    return requested.weights, requested.file, requested.address


def _parse(entry: str) -> Requested:
    named, own, file = entry.partition("=")
    network, _, name = (part.strip() for part in named.partition(":"))
    if file.strip().startswith(LOGGED):
        if not re.fullmatch(r"\w[A-Za-z0-9_. -]{0,59}", named, re.ASCII):
            raise InputError("models", entry, "a logged model needs a name", "write it as mine=runs:/ID")
        return Requested(entry, network, None, address=file.strip(), outputs=0)
    default = models.get_model_weights(network).DEFAULT
    published = {each.name: each for each in type(default) if len(each.meta.get("categories") or ()) == OUTPUTS}
    weights = default if name in ("", "DEFAULT") else published.get(name)
    if weights is None:
        problem = f"{network} has no published weights {name!r}"
        raise InputError("models", entry, problem, nearest(name, list(published)))
    if not own:
        return Requested(entry, network, weights)
    path = Path(os.path.expanduser(file.strip()))
    outputs = OUTPUTS
    with suppress(Exception), torch.device("meta"):  # loading refuses anything but a state dict
        *_, (head, _) = models.get_model(network, weights=None).named_parameters()
        outputs = len(_read(path)[head])
    return Requested(entry, network, weights, path.absolute(), outputs=outputs)


def find_all_weights(requests: Sequence[Requested], weights_dir: Path | None, progress: bool) -> list[Requested]:
    """Find the files in `weights_dir` or torchvision's cache, or download them there; `progress` shows downloads.

    All are hashed, and published ones are verified. InputError for a missing folder, a file that differs from the
    published one, and for all unavailable files in one message.
    """
    # os.path here and below, because pathlib raises if a folder can't be entered.
    if weights_dir is not None and not os.path.isdir(weights_dir):  # noqa: PTH112
        remedy = "give the folder with the weight files"
        raise InputError("weights_dir", weights_dir, "it is not a readable folder", remedy)
    folders = [*filter(None, [weights_dir]), Path(torch.hub.get_dir(), "checkpoints")]
    paths, missing = [], []
    for requested in requests:
        places = [folder / requested.weights.url.rpartition("/")[2] for folder in folders]
        found = requested.file or next(filter(os.path.isfile, places), None)
        paths.append(found or places[-1])
        if found is None:
            missing.append((requested, places[-1]))
    for index, (requested, path) in enumerate(missing):
        _download(requested, path, [each.weights.url for each, _ in missing[index:]], progress)
    return list(map(_verified, requests, paths))


def _verified(requested: Requested, path: Path) -> Requested:
    try:
        sha256 = sha256_of_file(path)
    except OSError as error:
        problem = f"{path} can't be read ({error.strerror})"
        raise InputError("models", requested.text, problem, "give yourself access") from error
    published, head = requested.file is None, requested.hash_head
    if published and not sha256.startswith(head):
        problem = f"{path} is not the published file (its SHA-256 begins with {sha256[:10]}, not {head})"
        own = f"or, if it is your own, give it as {requested.network}={path}"
        remedy = f"delete it and download {requested.weights.url} again, {own}"
        raise InputError("models", requested.text, problem, remedy)
    return replace(requested, path=path, sha256=sha256, verified=published)


def _download(requested: Requested, path: Path, missing: Sequence[str], progress: bool) -> None:
    """Let torch download a published file, whole and verified or not at all. An error names all addresses `missing`."""
    patience = socket.getdefaulttimeout()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(SILENT_SECONDS)
        torch.hub.download_url_to_file(requested.weights.url, str(path), requested.hash_head, progress)
    except Exception as error:
        reason = str(getattr(error, "reason", None) or getattr(error, "strerror", None) or error).rstrip(".")
        problem = f"its weights can't be downloaded ({reason})"
        into = f"put the files into {path.parent}{OR_THERE}"
        raise InputError("models", requested.text, problem, f"download {', '.join(missing)} and {into}") from error
    finally:
        socket.setdefaulttimeout(patience)


def load_network(requested: Requested) -> nn.Module:
    """Build the network in eval mode on the CPU; InputError for a file that is not a state dict of it.

    torchvision's builders handle renamed keys, auxiliary heads and image sizes of transformers. Instead of a download,
    they get the verified file, loaded without running the code that a pickle may hold.
    """
    weights = requested.weights
    try:
        state = _read(requested.path)
        weights.get_state_dict = lambda *_, **__: state  # only of this member of the enumeration
        network: nn.Module = models.get_model(requested.network, weights=weights, progress=False)
    except Exception as error:  # torch and Python raise many errors for files that aren't state dicts
        problem = f"{requested.path} can't be loaded as weights of {requested.network} ({in_short(error)})"
        remedy = f"give its state dict with {OUTPUTS} outputs, as torch.save(model.state_dict(), FILE) writes it"
        raise InputError("models", requested.text, problem, remedy) from error
    finally:
        vars(weights).pop("get_state_dict", None)
    return network.eval().requires_grad_(False)


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """Return the state dict in a file of the user's own, as torch or safetensors writes it; InputError."""
    try:
        state = dict(_read(path))
        if state and all(isinstance(value, torch.Tensor) for value in state.values()):
            return state
        problem = "it doesn't hold a state dict"
    except Exception as error:  # torch and Python raise many errors for files that aren't state dicts
        problem = f"it can't be loaded ({in_short(error)})"
    raise InputError("weights", path, problem, "give a state dict, as torch.save(model.state_dict(), FILE) writes it")


def _read(path: Path) -> Any:
    """Return the parameters in a file, without running the code that a pickle may hold."""
    if path.suffix == ".safetensors":
        return _unwrapped(load_file(path))
    with torch.serialization.safe_globals([argparse.Namespace, type(Path())]):  # options that programs also save
        return _unwrapped(torch.load(path, map_location="cpu", weights_only=True))


def _unwrapped(state: Any) -> Any:
    """Return the parameters of a network from the checkpoint of a training program.

    They are in Lightning's `state_dict` or torchvision's `model`, next to the optimiser's state. DataParallel,
    Lightning and torch.compile add prefixes to their names. SeveralNetworks if different prefixes name several.
    """
    if not isinstance(state, Mapping):
        return {}
    state = next((state[key] for key in WRAPPERS if isinstance(state.get(key), Mapping)), state)
    while held := [each for each in HOLDERS if any(name.startswith(each) for name in state)]:
        if len(held) > 1:
            raise SeveralNetworks(f"it holds several networks: {', '.join(held)}; keep the parameters of one")
        state = {name.removeprefix(held[0]): value for name, value in state.items() if name.startswith(held[0])}
    return state


def in_short(error: Exception) -> str:
    """Shorten a long error message of torch."""
    if isinstance(error, SeveralNetworks):
        return str(error)
    text = f"{type(error).__name__}: {error}"
    if any(mark in text for mark in ("UnpicklingError", "KeyError", "weights_only")):
        return "it holds something other than tensors, or is damaged"
    kinds = {"Missing key": "parameters are missing", "Unexpected key": "it has parameters of another network",
             "size mismatch": "shapes differ", "PytorchStreamReader": "it is damaged or cut short"}  # fmt: skip
    return ", ".join(words for mark, words in kinds.items() if mark in text) or " ".join(text.split())[:120]
