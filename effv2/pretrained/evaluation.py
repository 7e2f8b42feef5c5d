"""The evaluation of one published network in a tracked run: its logits, their accuracy, and times."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

from effv2.architecture import count_parameters, gflops_of
from effv2.core import provenance
from effv2.core.calibration import calibration_error
from effv2.core.errors import RunError, is_out_of_memory, what_ran_out
from effv2.core.reporter import Reporter
from effv2.data.batches import Statistics
from effv2.data.images import Decoded, Labels, decode
from effv2.execution.device import Execution, Forward, fold_batch_norm
from effv2.pretrained.config import PretrainedConfig
from effv2.pretrained.images import TEST, EvaluationImages, class_names
from effv2.pretrained.own import load_network, outputs_of
from effv2.run.records import write_predictions
from effv2.run.run import Attempt, RunSpec, find_earlier
from effv2.run.weights import Requested
from effv2.serving.export import as_base64, write_served
from effv2.tracking.read import reached_accuracy
from effv2.tracking.tags import run_tags
from effv2.tracking.writer import TrackedRun
from effv2.training.evaluation import median_seconds

# On a CPU, a pass over few images stays in caches and in memory that the process already has: 2 to 4 times the rate of
# batches of 128 (benchmarks/pretrained.md).
CPU_BATCH_PIXELS = 8 * 224**2
FULL_BATCH_IMAGES = 128
COMPARED_IMAGES = 512  # images on which bf16 is compared with float32
Progress = Callable[[int], None]  # called with the number of finished images
CODE = provenance.code_version(provenance.OF_EVALUATION)  # versions of the parts that decide an evaluation


@dataclass(frozen=True)
class Evaluation:
    """The network, the images and the settings of an evaluation, as plain data. `config` is resolved: no `auto`."""

    requested: Requested
    images: EvaluationImages
    config: PretrainedConfig

    @property
    def outputs(self) -> Labels:
        """Return the outputs (K) of the network for the classes of the images."""
        return outputs_of(self.requested, self.images)

    @property
    def true(self) -> Labels:
        """Return the correct output of each image."""
        return self.outputs[self.images.part.labels]

    @property
    def execution(self) -> Execution:
        """Return device and precision."""
        chosen = self.config.execution
        return Execution(torch.device(chosen.device), chosen.precision == "bf16", channels_last=True)

    @property
    def batch(self) -> int:
        """Return the images per pass: as given, or suitable for the device and this image size."""
        on_cpu = max(1, round(CPU_BATCH_PIXELS / self.requested.preparation.size**2))
        return self.config.execution.batch_size or (on_cpu if self.execution.device.type == "cpu" else 128)

    def decode(self, reporter: Reporter) -> Decoded:
        """Return the images as the weights require them, decoded once."""
        tell, chosen = partial(reporter.progress, "decoding images"), self.config.data
        return decode(self.images.part, self.requested.preparation, tell, chosen.max_megapixels, chosen.skip_broken)

    def data_digest(self, decoded: Decoded) -> str:
        """Hash the images: pixels, names and classes."""
        about = [decoded.sha256, *self.images.part.ids, *map(str, self.true), self.images.tests]
        return provenance.sha256_of_values(about)[:16]

    def definition(self) -> dict[str, Any]:
        """Return, as plain values, everything that decides the figures, except the images and the machine."""
        requested = self.requested
        return {
            "network": requested.network,
            "weights": [requested.sha256, requested.weights_name, requested.verified],
            "preparation": repr(requested.preparation),
            "normalisation": requested.normalisation,
            "device": self.execution.device.type,
            "bf16": self.execution.bf16,
            "batch": self.batch,
            "torchvision": torchvision.__version__,
        } | ({"classes": list(requested.classes)} if requested.classes else {})

    def params(self) -> dict[str, Any]:
        """Return the parameters of the run."""
        requested, wanted = self.requested, self.requested.preparation
        ranked_on, ranked_origin = self.images.ranked
        return self.config.flat() | {
            "model.name": requested.network,
            "weights.name": requested.weights_name,
            "weights.file": str(requested.path),
            "weights.sha256": requested.sha256,
            "weights.verified": requested.verified,
            "weights.url": requested.weights.url if requested.weights and requested.file is None else "",
            "transforms.of": requested.address or str(requested.weights),
            "transforms.resize": getattr(wanted, "resize", wanted.size),
            "transforms.crop": wanted.size,
            "transforms.interpolation": getattr(wanted, "interpolation", "bilinear"),
            "transforms.antialias": True,
            "transforms.mean": requested.normalisation[0],
            "transforms.std": requested.normalisation[1],
            "evaluation.outputs": requested.outputs,
            "evaluation.batch_size": self.batch,
            "evaluation.ranked_on": ranked_on,
            "evaluation.ranked_origin": ranked_origin,
        }


def evaluate(evaluation: Evaluation, spec: RunSpec) -> Attempt:
    """Find the finished run of a task, or evaluate from the beginning: this is too fast to need resuming."""
    images, requested, params = evaluation.images, evaluation.requested, evaluation.params()
    decoded = evaluation.decode(spec.reporter)
    machine = [provenance.machine()[name] for name in ("processor", "accelerator", "threads")]  # speeds count, too
    deciding = provenance.sha256_of_values(evaluation.definition() | {"machine": machine})[:16]
    digest = evaluation.data_digest(decoded)
    tags = run_tags(deciding, digest, CODE, requested.network, evaluation.config.data.seed)
    done = find_earlier(tags, spec)
    if done is not None and done.status == "FINISHED":
        return Attempt(TrackedRun(done.run_id, spec.experiment_id), done.metrics, reached_accuracy(done), found=done)
    with spec.open_run(tags) as run, what_ran_out("execution.batch_size"):
        spec.run_opened(run.run_id)
        run.log_params(params)
        run.log_git()
        if images.note:
            run.log_text("\n".join([images.note, *images.broken, ""]), "data_notes.txt")
        run.log_dataset(images.name, "test", digest, images.location, images.profile())
        run.sender.check()
        metrics = _measure(evaluation, decoded, run, spec.reporter)
        run.complete()
    return Attempt(run, metrics, metrics[f"{params['evaluation.ranked_on']}/top1_accuracy"])


def _measure(evaluation: Evaluation, decoded: Decoded, run: TrackedRun, reporter: Reporter) -> dict[str, float]:
    """Log and return all figures. Also log the predictions."""
    requested, images, execution = evaluation.requested, evaluation.images, evaluation.execution
    module = load_network(requested)
    # torchvision's builder transforms inputs only with these weights (inception_v3, googlenet).
    run.log_params({"model.transform_input": bool(getattr(module, "transform_input", False))})
    metrics: dict[str, float] = {
        "model/parameters": count_parameters(module),
        "model/gflops": gflops_of(module, requested.preparation.size),
    }
    fold_batch_norm(module)
    network = partial(logits_of, execution, execution.place(module), requested.normalisation)
    pixels, true, outputs = torch.from_numpy(decoded.pixels), evaluation.true, evaluation.outputs
    progress = partial(reporter.progress, f"evaluating {requested.label}", total=len(pixels))
    logits, rate = all_logits(network, pixels, evaluation.batch, progress)
    metrics["throughput/evaluate_images_per_second"] = rate
    if execution.bf16:
        exact = replace(execution, bf16=False)
        exact.set_float32()
        in_float32 = partial(logits_of, exact, module, requested.normalisation)
        metrics |= bf16_differences(in_float32, pixels, logits, true, evaluation.batch)
        execution.set_float32()
    for name, members in images.sets.items():
        found = scores(logits[members], true[members], outputs)
        metrics |= {f"{name}/{figure}": value for figure, value in found.items()}
    metrics |= {f"published/{name}": value for name, value in requested.published.items()}
    with run.new_artifacts() as folder:
        for name in {TEST, images.ranked[0]}:
            place = folder if name == TEST else folder / name
            place.mkdir(exist_ok=True)
            part, of_set = images.part.take(images.sets[name]), logits[images.sets[name]].numpy()
            about = images.classes, part.ids, part.labels, of_set
            named = () if requested.classes else class_names()
            write_predictions(place, *about, present=outputs, outputs=named)
    for name, count in (("single_image", 1), ("batch_128", FULL_BATCH_IMAGES)):  # last, if the memory suffices
        try:
            again = pixels[torch.arange(count) % len(pixels)]
            metrics[f"inference/{name}_seconds"] = median_seconds(partial(network, again))
        except RuntimeError as error:  # includes torch's memory errors, which are plain ones on CPUs
            if not is_out_of_memory(error):
                raise
            reporter.message(f"{requested.label}: not enough memory to time {count} images at once; left out.")
    run.log_metrics(metrics)
    return metrics


def log_network(evaluation: Evaluation, run: TrackedRun) -> None:
    """Log the network with its preprocessing to the run that evaluated it. The run may have ended."""
    requested = evaluation.requested
    module, statistics = load_network(requested), requested.normalisation
    with tempfile.TemporaryDirectory() as folder:
        served, classes = (module, statistics, requested.preparation), requested.classes or class_names()
        files = write_served(Path(folder), *served, classes=classes, outputs=requested.outputs)
        with evaluation.images.part.open(0) as image:
            run.log_model(files, as_base64(image))


def logits_of(execution: Execution, network: Forward, statistics: Statistics, pixels: Tensor) -> Tensor:
    """Return logits (B, outputs), on the CPU, of bytes (B, size, size, 3)."""
    return execution.logits(network, statistics, pixels.permute(0, 3, 1, 2)).cpu()


def all_logits(network: Forward, pixels: Tensor, batch: int, progress: Progress) -> tuple[Tensor, float]:
    """Return logits (N, outputs) of bytes, and images/s of the median pass without the first, including transfers.

    RunError for logits that aren't finite.
    """
    logits: list[Tensor] = []
    rates: list[float] = []
    progress(0)
    for part in pixels.split(batch):
        started = time.perf_counter()
        logits.append(network(part))
        rates.append(len(part) / (time.perf_counter() - started))
        progress(sum(map(len, logits)))
    everything = torch.cat(logits)
    if not everything.isfinite().all():
        problem = "The outputs are not all finite numbers"
        raise RunError(f"{problem}; the weights are damaged, or need execution.precision fp32.")
    return everything, median(rates[1:] or rates)


def scores(logits: Tensor, true: Labels, present: Labels) -> dict[str, float]:
    """Return the figures of a set: `true` (N) and `present` (K) are outputs of the network.

    top1_accuracy and top5_accuracy are over all outputs, and top1_present only over those of the present classes. loss
    is the mean cross-entropy over all outputs, and ece the calibration error of the top-1 prediction. Accuracies are
    fractions.
    """
    targets = torch.from_numpy(true)
    predicted = logits.argmax(1)  # not of probabilities, where close logits can be equal
    confidence = logits.softmax(1).gather(1, predicted[:, None])[:, 0]
    right = predicted == targets
    own = logits.gather(1, targets[:, None])
    ahead = (logits > own) | ((logits == own) & (torch.arange(logits.shape[1]) < targets[:, None]))  # as argmax ties
    among_present = torch.from_numpy(present)[logits[:, present].argmax(1)]
    return {
        "images": len(true),
        "top1_accuracy": right.double().mean().item(),
        "top1_present": (among_present == targets).double().mean().item(),
        "top5_accuracy": (ahead.sum(1) < 5).double().mean().item(),
        "loss": F.cross_entropy(logits, targets).item(),
        "ece": calibration_error(confidence.double().numpy(), right.numpy()),
    }


def bf16_differences(in_float32: Forward, pixels: Tensor, logits: Tensor, true: Labels, batch: int) -> dict[str, float]:
    """Return the changes by bf16: its `logits` of all images against float32 logits of at most 512, evenly spaced."""
    chosen = np.unique(np.linspace(0, len(pixels) - 1, min(len(pixels), COMPARED_IMAGES)).round().astype(int))
    exact, _ = all_logits(in_float32, pixels[chosen], batch, lambda _: None)
    before, after = exact.argmax(1).numpy(), logits[chosen].argmax(1).numpy()
    return {
        "bf16/compared_images": len(chosen),
        "bf16/top1_difference": float((after == true[chosen]).mean() - (before == true[chosen]).mean()),
        "bf16/predictions_changed": float((after != before).mean()),
    }
