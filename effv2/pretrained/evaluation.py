"""One published network evaluated in a tracked run of its own."""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

from effv2.architecture import count_parameters, gflops_of
from effv2.core import provenance
from effv2.core.processes import this_process
from effv2.core.reporter import Reporter
from effv2.data.cache import Decoded, decode
from effv2.execution.device import Execution
from effv2.pretrained.config import PretrainedConfig
from effv2.pretrained.imagenet import class_names
from effv2.pretrained.images import TEST, EvaluationImages
from effv2.pretrained.measure import (
    Network,
    all_logits,
    batch_size,
    bf16_differences,
    latency,
    scores,
    top1,
)
from effv2.pretrained.weights import Requested, WeightsFile, load_network
from effv2.run.artifacts import Predictions, write_predictions
from effv2.serving.export import OTHER, ServedNetwork, as_base64, write_served
from effv2.tracking.read import Identity
from effv2.tracking.run import open_run
from effv2.tracking.tags import PROCESS, SEED, STUDY, VARIANT
from effv2.tracking.writer import TrackedRun

KIND = "evaluate-pretrained"
FULL_BATCH_IMAGES = 128
ONE_IMAGE, FULL_BATCH = "inference/single_image_seconds", "inference/batch_128_seconds"


@dataclass(frozen=True)
class Entry:
    """A network to evaluate: its weights, the images as it wants them, and what decides its figures."""

    requested: Requested
    file: WeightsFile
    decoded: Decoded
    batch: int
    identity: Identity


@dataclass(frozen=True)
class Session:
    """What all networks of a comparison share."""

    config: PretrainedConfig
    images: EvaluationImages
    execution: Execution
    reporter: Reporter

    def entry(self, requested: Requested, file: WeightsFile) -> Entry:
        """Decode the images as the weights want them, and name what decides the figures."""
        decoded = decode(self.images.part, requested.preparation, self.reporter.decoding)
        batch = batch_size(self.config.execution.batch_size, requested.preparation.size, self.execution)
        deciding = {
            "network": requested.network,
            "weights": [file.sha256, _weights_name(requested), file.verified],
            "preparation": repr(requested.preparation),
            "normalisation": requested.normalisation,
            "device": self.execution.device.type,
            "bf16": self.execution.bf16,
            "batch": batch,
            "torchvision": torchvision.__version__,
            "machine": [provenance.machine()[name] for name in ("processor", "accelerator", "threads")],  # for speeds
        }
        seen = [decoded.sha256, *self.images.part.ids, *map(str, self.images.outputs[self.images.part.labels])]
        data = short_hash([*seen, self.images.tests])
        return Entry(requested, file, decoded, batch, Identity(short_hash(deciding), data, code_version()))


def evaluate_one(session: Session, entry: Entry, parent: TrackedRun) -> str:
    """Evaluate a network in a run of its own; return the run's id."""
    requested, images = entry.requested, session.images
    tags = run_tags(entry.identity, session) | {VARIANT: requested.network}
    message = session.reporter.message
    with open_run(requested.label, parent.experiment_id, tags, parent=parent.run_id, message=message) as run:
        run.log_params(session.config.flat() | _params(entry))
        run.log_git(provenance.git_state())
        digest = entry.identity.data_digest
        run.log_dataset(images.name, "test", digest, images.location, images.profile())
        run.check()
        network, figures = _prepare(session, entry, run)
        run.log_metrics(figures)
        logits, figures = _evaluate(session, entry, network)
        true = images.outputs[images.part.labels]
        for name, members in images.sets.items():
            found = scores(logits[members], true[members], images.outputs)
            figures |= {f"{name}/{figure}": value for figure, value in found.items()}
        run.log_metrics(figures | {f"published/{name}": value for name, value in requested.published.items()})
        with tempfile.TemporaryDirectory() as folder:
            for name in {TEST, images.basis}:
                place = Path(folder) if name == TEST else Path(folder, name)
                place.mkdir(exist_ok=True)
                write_predictions(place, _predictions(images, logits, images.sets[name]))
            run.log_folder(Path(folder))
        run.log_metrics(_latencies(session, entry, network))
        run.complete()
    return run.run_id


def _weights_name(requested: Requested) -> str:
    return str(requested.weights) if requested.file is None else requested.file.name


def _params(entry: Entry) -> dict[str, Any]:
    requested, preset = entry.requested, entry.requested.weights.transforms()
    return {
        "model.name": requested.network,
        "weights.name": _weights_name(requested),
        "weights.file": str(entry.file.path),
        "weights.sha256": entry.file.sha256,
        "weights.verified": entry.file.verified,
        "weights.url": requested.weights.url if requested.file is None else "",
        "transforms.of": str(requested.weights),
        "transforms.resize": preset.resize_size[0],
        "transforms.crop": preset.crop_size[0],
        "transforms.interpolation": preset.interpolation.value,
        "transforms.antialias": preset.antialias,
        "transforms.mean": preset.mean,
        "transforms.std": preset.std,
        "evaluation.batch_size": entry.batch,
    }


def _prepare(session: Session, entry: Entry, run: TrackedRun) -> tuple[Network, dict[str, float]]:
    """Return the network on its device, and its size as metrics.

    What torchvision's builder does to inputs with these weights (inception_v3, googlenet) is logged: a network built
    without them differs.
    """
    requested = entry.requested
    module = load_network(requested, entry.file)
    run.log_params({"model.transform_input": bool(getattr(module, "transform_input", False))})
    size = {
        "model/parameters": count_parameters(module),
        "model/gflops": gflops_of(module, requested.preparation.size),
    }
    return Network.prepare(module, requested.normalisation, session.execution), size


def _evaluate(session: Session, entry: Entry, network: Network) -> tuple[torch.Tensor, dict[str, float]]:
    """Return logits of all images (N, 1000), the rate and what bf16 changes as metrics."""
    pixels, done = torch.from_numpy(entry.decoded.pixels), 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        session.reporter.evaluating(entry.requested.label, done, len(pixels))

    advance(0)
    logits, rate = all_logits(network, pixels, entry.batch, advance)
    figures = {"throughput/evaluate_images_per_second": rate}
    if session.execution.bf16:
        true = session.images.outputs[session.images.part.labels]
        figures |= bf16_differences(network, pixels, logits, true, entry.batch)
    return logits, figures


def _latencies(session: Session, entry: Entry, network: Network) -> dict[str, float]:
    """Return the seconds of one image and of a full batch, as far as the memory allows; timed last of all."""
    pixels = torch.from_numpy(entry.decoded.pixels)
    found: dict[str, float] = {}
    for name, images in ((ONE_IMAGE, 1), (FULL_BATCH, FULL_BATCH_IMAGES)):
        try:
            found[name] = latency(network, pixels, images)
        except RuntimeError as error:  # torch's of memory among them, on CPUs a plain one
            if not is_out_of_memory(error):
                raise
            session.reporter.message(f"{entry.requested.label}: no memory to time {images} images at once; left out.")
    return found


def log_network(entry: Entry, images: EvaluationImages, run: TrackedRun) -> str:
    """Log the network with its preprocessing to the run that evaluated it, ended or not; return its address."""
    requested = entry.requested
    module = load_network(requested, entry.file)
    served = ServedNetwork(module, len(class_names()), *requested.normalisation)
    with tempfile.TemporaryDirectory() as folder:
        files = write_served(Path(folder), served, requested.preparation, class_names())
        run.log_model(files, as_base64(images.part.open(0)), torch.__version__)
    return run.model_address()


def _predictions(images: EvaluationImages, logits: torch.Tensor, members: np.ndarray) -> Predictions:
    """Return the top-1 predictions of a set over all 1000 classes, those of no class present as `other`."""
    predicted, probability = top1(logits[members])
    column = np.full(logits.shape[1], len(images.outputs))
    column[images.outputs] = np.arange(len(images.outputs))
    return Predictions(
        classes=images.classes,
        columns=(*images.classes, OTHER),
        ids=[images.part.ids[i] for i in members],
        true=images.part.labels[members],
        predicted=column[predicted.numpy()],
        names=[class_names()[output] for output in predicted.tolist()],
        probability=probability.numpy(),
    )


def run_tags(identity: Identity, session: Session) -> dict[str, str]:
    """Return the tags of every run of a comparison."""
    machine = {f"effv2.machine.{name}": value for name, value in provenance.machine().items()}
    own = {STUDY: KIND, SEED: str(session.config.data.seed), PROCESS: this_process()}
    return identity.tags() | own | machine


def short_hash(value: Any) -> str:
    """Hash plain values to 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def code_version() -> str:
    """Return the versions of what decides an evaluation."""
    return provenance.code_version(provenance.OF_EVALUATION)
