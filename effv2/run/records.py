"""What a run logs after its last epoch: what came out of it, and its network."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from scipy.special import softmax
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from torch import nn

from effv2.architecture import build_model, count_gflops, count_parameters
from effv2.config.schema import TrainConfig
from effv2.core.figures import accuracy_curves, plain
from effv2.core.paths import write_csv
from effv2.data.batches import NORMALISATIONS
from effv2.data.dataset import Dataset
from effv2.data.images import Square
from effv2.execution.device import Execution, Forward, make_execution
from effv2.serving.export import ServedNetwork, as_base64, output_names, write_served
from effv2.tracking.read import download
from effv2.tracking.writer import TrackedRun
from effv2.training.evaluate import evaluate, single_image_latency
from effv2.training.loop import Training
from effv2.training.state import TrainState

CURVES = {"train": "train/accuracy", "validation": "val/accuracy", "test": "test/accuracy"}
WEIGHTS = "selected.pt"  # artifact: weights of the selected epoch, until the study's best run is known


def log_end(run: TrackedRun, training: Training, dataset: Dataset) -> dict[str, float]:
    """Log and return the summary of a training; log predictions and figures of its network at the selected epoch."""
    config, state, execution = training.config, training.state, training.execution
    history, network = state.progress.history, state.evaluated
    form = execution.inference_factory(network)()
    selected = len(history) if state.selected is None else state.progress.best_epoch
    outputs = config.model.outputs or len(dataset.classes)
    summary: dict[str, float] = {}
    if config.evaluation.test_set:
        test = [metrics["test/accuracy"] for metrics in history]
        best = int(np.argmax(test)) + 1
        summary = {"best/test_accuracy": test[best - 1], "best/epoch": best, "final/test_accuracy": test[-1]}
        summary["selected/test_accuracy"] = log_test(run, config, dataset, execution, form)
    if dataset.validation is not None:
        summary["selected/val_accuracy"] = history[selected - 1]["val/accuracy"]
    summary |= {
        "selected/epoch": selected,
        "time/total_train_seconds": state.progress.train_seconds,
        "inference/single_image_seconds": single_image_latency(form, config, execution),
        "model/parameters": count_parameters(network),
        "model/gflops": count_gflops(config.model.build_table(), outputs, config.data.image_size),
    }
    run.log_metrics(summary)
    curves = {
        name: [{epoch: metrics[key] for epoch, metrics in enumerate(history, 1)}]
        for name, key in CURVES.items()
        if key in history[0]
    }
    with tempfile.TemporaryDirectory() as folder:
        accuracy_curves(curves, "accuracy by epoch").savefig(Path(folder, "curves.png"), dpi=120)
        run.log_folder(Path(folder))
    return summary


def log_test(run: TrackedRun, config: TrainConfig, dataset: Dataset, execution: Execution, form: Forward) -> float:
    """Log predictions on the test set at the selected epoch and their tables; return the accuracy."""
    columns = output_names(dataset.classes, config.model.outputs or len(dataset.classes))
    result = evaluate(form, dataset.test, config, execution)
    logits = result.logits.numpy()
    argmax = logits.argmax(1)  # not of probabilities: close logits tie there
    predictions = Predictions(
        dataset.classes,
        columns,
        dataset.test.ids,
        true=dataset.test.labels.numpy(),
        predicted=np.minimum(argmax, len(dataset.classes)),
        names=[columns[each] for each in np.minimum(argmax, len(dataset.classes))],
        probability=softmax(logits, 1)[np.arange(len(argmax)), argmax],
    )
    with tempfile.TemporaryDirectory() as folder:
        write_predictions(Path(folder), predictions)
        run.log_folder(Path(folder))
    return result.accuracy


@dataclass(frozen=True)
class Predictions:
    """What a network says of N images: ids, true classes (0 to K - 1) and predicted ones, with their probability.

    A prediction beyond the K classes is K; `names` says what each is called, `columns` what 0 to K are.
    """

    classes: Sequence[str]
    columns: Sequence[str]
    ids: Sequence[str]
    true: np.ndarray
    predicted: np.ndarray
    names: Sequence[str]
    probability: np.ndarray


def write_predictions(folder: Path, found: Predictions) -> None:
    """Write predictions, confusion matrix and per-class table."""
    classes, columns, true, predicted = found.classes, found.columns, found.true, found.predicted
    matrix = confusion_matrix(true, predicted, labels=range(len(columns)))[: len(classes)]
    scores = precision_recall_fscore_support(true, predicted, labels=range(len(classes)), zero_division=0)
    images = zip(found.ids, true, found.names, found.probability, strict=True)
    tables: dict[str, list[tuple[Any, ...]]] = {
        "predictions": [
            ("id", "true", "predicted", "probability"),
            *((id_, classes[t], name, f"{probability:.6f}") for id_, t, name, probability in images),
        ],
        "confusion_matrix": [
            ("true", *columns),
            *((name, *row) for name, row in zip(classes, matrix.tolist(), strict=True)),
        ],
        "per_class": [
            ("class", "images", "precision", "recall", "f1"),
            *(
                (name, support, f"{precision:.6f}", f"{recall:.6f}", f"{f1:.6f}")
                for name, precision, recall, f1, support in zip(classes, *scores, strict=True)
            ),
        ],
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a class name in a script that the font lacks
        _confusion_figure(matrix, columns).savefig(folder / "confusion_matrix.png", dpi=120)
    for name, rows in tables.items():
        write_csv(folder / f"{name}.csv", rows)


def _confusion_figure(matrix: np.ndarray, columns: Sequence[str]) -> Figure:
    """Draw a confusion matrix, rows being true classes and colours the share of the row."""
    columns = list(map(plain, columns))
    rows = columns[: len(matrix)]
    side = min(14.0, 2.5 + 0.38 * len(columns))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(columns)), columns, rotation=90)
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel="predicted", ylabel="true")
    if len(columns) <= 30:
        for (row, column), count in np.ndenumerate(matrix):
            colour = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=7)
    return figure


def log_network(run: TrackedRun, config: TrainConfig, dataset: Dataset, network: nn.Module) -> None:
    """Log a trained network, with its preprocessing, to its run, which may have ended."""
    classes, outputs = dataset.classes, config.model.outputs or len(dataset.classes)
    first = dataset.test.images(torch.tensor([0]))[0].permute(1, 2, 0).contiguous().numpy()
    own = build_model(config.model.build_table(), outputs)  # without the paths of the device it was trained on
    own.load_state_dict(network.state_dict())
    served = ServedNetwork(own, len(classes), *NORMALISATIONS[config.data.normalise])
    with tempfile.TemporaryDirectory() as folder:
        files = write_served(Path(folder), served, Square(config.data.image_size), output_names(classes, outputs))
        run.log_model(files, as_base64(Image.fromarray(first)), torch.__version__)


def keep_weights(run: TrackedRun, network: nn.Module) -> None:
    """Log the weights of the selected epoch, so that they outlive the process that trained them."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(network.state_dict(), Path(folder, WEIGHTS))
        run.log_folder(Path(folder))


def restore(run_id: str, config: TrainConfig, dataset: Dataset) -> nn.Module:
    """Return the network of a finished run, from the weights that it kept; trained again where it kept none."""
    execution = make_execution(config.execution)
    state = TrainState.create(config, dataset, execution)
    with tempfile.TemporaryDirectory() as folder:
        if path := download(run_id, WEIGHTS, Path(folder)):
            state.evaluated.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
            return state.evaluated
    for _ in Training(config, dataset, state, execution):
        pass
    state.take_selected()
    return state.evaluated


def score_on_test(run: TrackedRun, config: TrainConfig, dataset: Dataset, network: nn.Module) -> None:
    """Evaluate the network of a run on the test set, which the run has not seen, and log that to it."""
    execution = make_execution(config.execution)
    accuracy = log_test(run, config, dataset, execution, execution.inference_factory(network)())
    run.log_metrics({"selected/test_accuracy": accuracy})
