"""One published network evaluated in a tracked run of its own."""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

from effv2.architecture import count_parameters, gflops_of
from effv2.config.schema import ExecutionConfig
from effv2.core import provenance
from effv2.core.errors import is_out_of_memory, what_ran_out
from effv2.core.reporter import Reporter
from effv2.data.cache import Decoded, decode
from effv2.execution.device import Execution, make_execution
from effv2.pretrained.config import PretrainedConfig
from effv2.pretrained.images import TEST, EvaluationImages, class_names
from effv2.pretrained.measure import Network, all_logits, batch_size, bf16_differences, latency, scores, top1
from effv2.pretrained.weights import Requested, load_network
from effv2.run.records import Predictions, write_predictions
from effv2.run.run import Attempt, RunSpec, find_earlier
from effv2.serving.export import OTHER, ServedNetwork, as_base64, write_served
from effv2.tracking.tags import run_tags
from effv2.tracking.writer import TrackedRun

FULL_BATCH_IMAGES = 128
CODE = provenance.code_version(provenance.OF_EVALUATION)  # versions of what decides an evaluation


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated on which images, and how: plain data. `config` is resolved: no `auto`."""

    requested: Requested
    images: EvaluationImages
    config: PretrainedConfig

    @property
    def execution(self) -> Execution:
        """Return device and precision."""
        chosen = self.config.execution
        return make_execution(ExecutionConfig(device=chosen.device, precision=chosen.precision))

    @property
    def batch(self) -> int:
        """Return the images a pass."""
        return batch_size(self.config.execution.batch_size, self.requested.preparation.size, self.execution)

    @property
    def weights_name(self) -> str:
        """Return the name of published weights, or of the user's own file."""
        return str(self.requested.weights) if self.requested.file is None else self.requested.file.name

    def decode(self, reporter: Reporter) -> Decoded:
        """Return the images as the weights want them, decoded once."""
        return decode(self.images.part, self.requested.preparation, reporter.decoding)

    def data_digest(self, decoded: Decoded) -> str:
        """Hash the images: pixels, names and classes."""
        outputs = self.images.outputs[self.images.part.labels]
        return _hash([decoded.sha256, *self.images.part.ids, *map(str, outputs), self.images.tests])

    def definition(self) -> dict[str, Any]:
        """Return, as plain values, what decides the figures besides the images and the machine."""
        return {
            "network": self.requested.network,
            "weights": [self.requested.sha256, self.weights_name, self.requested.verified],
            "preparation": repr(self.requested.preparation),
            "normalisation": self.requested.normalisation,
            "device": self.execution.device.type,
            "bf16": self.execution.bf16,
            "batch": self.batch,
            "torchvision": torchvision.__version__,
        }

    def params(self) -> dict[str, Any]:
        """Return the parameters of the run."""
        requested, preset = self.requested, self.requested.weights.transforms()
        groups = self.config.model_dump()
        flat = {f"{group}.{name}": value for group, fields in groups.items() for name, value in fields.items()}
        return flat | {
            "model.name": requested.network,
            "weights.name": self.weights_name,
            "weights.file": str(requested.path),
            "weights.sha256": requested.sha256,
            "weights.verified": requested.verified,
            "weights.url": requested.weights.url if requested.file is None else "",
            "transforms.of": str(requested.weights),
            "transforms.resize": preset.resize_size[0],
            "transforms.crop": preset.crop_size[0],
            "transforms.interpolation": preset.interpolation.value,
            "transforms.antialias": preset.antialias,
            "transforms.mean": preset.mean,
            "transforms.std": preset.std,
            "evaluation.batch_size": self.batch,
        }


def evaluate(evaluation: Evaluation, spec: RunSpec) -> Attempt:
    """Find the run of a task finished, or evaluate from the beginning: it takes too little time to be resumed."""
    images, requested = evaluation.images, evaluation.requested
    decoded, ranked = evaluation.decode(spec.reporter), f"{images.ranked_on}/top1_accuracy"
    machine = [provenance.machine()[name] for name in ("processor", "accelerator", "threads")]  # speeds are figures too
    deciding = _hash(evaluation.definition() | {"machine": machine})
    digest = evaluation.data_digest(decoded)
    tags = run_tags(deciding, digest, CODE, requested.network, evaluation.config.data.seed)
    ranking = {"evaluation.ranked_on": images.ranked_on, "evaluation.ranked_origin": images.ranked_origin.value}
    done = find_earlier(tags, spec)
    if done is not None and done.status == "FINISHED":
        run = TrackedRun(done.run_id, spec.experiment_id)
        run.log_params({name: value for name, value in ranking.items() if name not in done.params})  # an older run
        return Attempt(run, done.metrics, done.metrics[ranked], was_finished=True)
    with spec.open_run(tags) as run, what_ran_out("execution.batch_size"):
        spec.run_opened(run.run_id)
        run.log_params(evaluation.params() | ranking)
        run.log_git()
        run.log_dataset(images.name, "test", digest, images.location, images.profile())
        run.sender.check()
        metrics = _measure(evaluation, decoded, run, spec.reporter)
        run.complete()
    return Attempt(run, metrics, metrics[ranked])


def _measure(evaluation: Evaluation, decoded: Decoded, run: TrackedRun, reporter: Reporter) -> dict[str, float]:
    """Log and return all figures; log the predictions, too."""
    requested, images, execution = evaluation.requested, evaluation.images, evaluation.execution
    module = load_network(requested)
    # What torchvision's builder does to inputs with these weights (inception_v3, googlenet): a network built without
    # them differs.
    run.log_params({"model.transform_input": bool(getattr(module, "transform_input", False))})
    metrics: dict[str, float] = {
        "model/parameters": count_parameters(module),
        "model/gflops": gflops_of(module, requested.preparation.size),
    }
    network = Network.prepare(module, requested.normalisation, execution)
    pixels, true = torch.from_numpy(decoded.pixels), images.outputs[images.part.labels]
    progress = partial(reporter.evaluating, requested.label, total=len(pixels))
    logits, rate = all_logits(network, pixels, evaluation.batch, progress)
    metrics["throughput/evaluate_images_per_second"] = rate
    if execution.bf16:
        metrics |= bf16_differences(network, pixels, logits, true, evaluation.batch)
    for name, members in images.sets.items():
        found = scores(logits[members], true[members], images.outputs)
        metrics |= {f"{name}/{figure}": value for figure, value in found.items()}
    metrics |= {f"published/{name}": value for name, value in requested.published.items()}
    with tempfile.TemporaryDirectory() as folder:
        for name in {TEST, images.ranked_on}:
            place = Path(folder) if name == TEST else Path(folder, name)
            place.mkdir(exist_ok=True)
            write_predictions(place, _predictions(images, logits, images.sets[name]))
        run.log_folder(Path(folder))
    metrics |= _latencies(requested.label, pixels, network, reporter)
    run.log_metrics(metrics)
    return metrics


def _latencies(label: str, pixels: torch.Tensor, network: Network, reporter: Reporter) -> dict[str, float]:
    """Return the seconds of one image and of a full batch, as far as the memory allows; timed last of all."""
    found: dict[str, float] = {}
    for name, images in (("single_image", 1), ("batch_128", FULL_BATCH_IMAGES)):
        try:
            found[f"inference/{name}_seconds"] = latency(network, pixels, images)
        except RuntimeError as error:  # torch's of memory among them, on CPUs a plain one
            if not is_out_of_memory(error):
                raise
            reporter.message(f"{label}: no memory to time {images} images at once; left out.")
    return found


def log_network(evaluation: Evaluation, run: TrackedRun) -> None:
    """Log the network with its preprocessing to the run that evaluated it, which may have ended."""
    requested = evaluation.requested
    module = load_network(requested)
    served = ServedNetwork(module, len(class_names()), *requested.normalisation)
    with tempfile.TemporaryDirectory() as folder:
        files = write_served(Path(folder), served, requested.preparation, class_names())
        run.log_model(files, as_base64(evaluation.images.part.open(0)), torch.__version__)


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


def _hash(value: Any) -> str:
    """Hash plain values to 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
