"""What a run logs after its last epoch: its figures, predictions and their tables, its network."""

import tempfile
import warnings
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from scipy.special import softmax
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from torch import Tensor, nn

from effv2.architecture import build_model, count_gflops, count_parameters
from effv2.config.schema import TrainConfig
from effv2.core.figures import accuracy_curves, short
from effv2.core.paths import write_csv
from effv2.data.batches import NORMALISATIONS
from effv2.data.dataset import Dataset
from effv2.data.images import Square
from effv2.serving.export import as_base64, output_names, write_served
from effv2.tracking.read import download
from effv2.tracking.writer import TrackedRun
from effv2.training.loop import Training, evaluate, median_seconds

CURVES = {"train": "train/accuracy", "validation": "val/accuracy", "test": "test/accuracy"}
WEIGHTS = "selected.pt"  # artifact: weights of the selected epoch, until the study's best run is known


def log_end(run: TrackedRun, training: Training) -> dict[str, float]:
    """Log and return the summary of a training; log predictions and figures of its network at the selected epoch."""
    config, dataset, state = training.config, training.dataset, training.state
    history, network = state.progress.history, training.network_for_inference()
    selected = len(history) if state.selected is None else state.progress.best_epoch
    outputs = config.model.outputs or len(dataset.classes)
    summary: dict[str, float] = {}
    if config.evaluation.test_set:
        test = [metrics["test/accuracy"] for metrics in history]
        best = int(np.argmax(test)) + 1
        summary = {"best/test_accuracy": test[best - 1], "best/epoch": best, "final/test_accuracy": test[-1]}
        summary["selected/test_accuracy"] = log_test(run, training)
    if dataset.validation is not None:
        summary["selected/val_accuracy"] = history[selected - 1]["val/accuracy"]
    image = torch.zeros(1, 3, *2 * [config.data.image_size], dtype=torch.uint8)
    summary |= {
        "selected/epoch": selected,
        "time/total_train_seconds": state.progress.train_seconds,
        "inference/single_image_seconds": median_seconds(lambda: network(image).cpu()),
        "model/parameters": count_parameters(state.evaluated),
        "model/gflops": count_gflops(config.model.build_table(), outputs, config.data.image_size),
    }
    run.log_metrics(summary)
    curves = {
        name: [{epoch: metrics[key] for epoch, metrics in enumerate(history, 1)}]
        for name, key in CURVES.items()
        if key in history[0]
    }
    with run.new_artifacts() as folder:
        accuracy_curves(curves, "accuracy by epoch").savefig(folder / "curves.png", dpi=120)
    return summary


def log_test(run: TrackedRun, training: Training) -> float:
    """Log predictions on the test set of the network as it now is, and their tables; return the accuracy."""
    dataset = training.dataset
    result = evaluate(training.network_for_inference(), dataset.test, training.config.evaluation.batch_size)
    with run.new_artifacts() as folder:
        labels = dataset.test.labels.numpy()
        write_predictions(folder, dataset.classes, dataset.test.ids, labels, result.logits.numpy())
    return result.accuracy


def write_predictions(
    folder: Path,
    classes: Sequence[str],
    ids: Sequence[str],
    true: np.ndarray,
    logits: np.ndarray,
    *,
    present: Sequence[int] | np.ndarray = (),
    outputs: Sequence[str] = (),
) -> None:
    """Write what logits (N, outputs) predict of images, by argmax over all outputs; confusion matrix, per-class table.

    The classes, of which `true` (N) are the numbers, are the outputs `present`, the first ones unless given; outputs
    beyond them share a column. The outputs are called `outputs`, where these are given, else as their columns.
    """
    columns = output_names(classes, logits.shape[1])
    column = np.full(logits.shape[1], len(classes))
    column[present if len(present) else range(len(classes))] = range(len(classes))
    argmax = logits.argmax(1)  # not of probabilities: close logits tie there
    names = [outputs[each] if outputs else columns[column[each]] for each in argmax]
    images = zip(ids, true, names, softmax(logits, 1)[np.arange(len(argmax)), argmax], strict=True)
    matrix = confusion_matrix(true, column[argmax], labels=range(len(columns)))[: len(classes)]
    scores = precision_recall_fscore_support(true, column[argmax], labels=range(len(classes)), zero_division=0)
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
    columns = list(map(short, columns))
    rows = columns[: len(matrix)]
    side = min(14.0, 2.5 + 0.38 * len(columns) + 0.06 * max(0, max(map(len, columns)) - 10))
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
            axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=7, in_layout=False)
    return figure


def log_network(run: TrackedRun, training: Training) -> None:
    """Log a trained network, with its preprocessing, to its run, which may have ended."""
    config, dataset, classes = training.config, training.dataset, training.dataset.classes
    outputs = config.model.outputs or len(classes)
    own = build_model(config.model.build_table(), outputs)  # without the paths of the device it was trained on
    own.load_state_dict(training.state.evaluated.state_dict())
    first = dataset.test.images(torch.tensor([0]))[0].permute(1, 2, 0).contiguous().cpu().numpy()
    statistics, square = NORMALISATIONS[config.data.normalise], Square(config.data.image_size)
    with tempfile.TemporaryDirectory() as folder:
        files = write_served(Path(folder), own, statistics, square, output_names(classes, outputs))
        run.log_model(files, as_base64(Image.fromarray(first)))


def keep_weights(run: TrackedRun, network: nn.Module) -> None:
    """Log the weights of the selected epoch, so that they outlive the process that trained them."""
    with run.new_artifacts() as folder:
        torch.save(network.state_dict(), folder / WEIGHTS)


def whole_weights(path: Path | None) -> dict[str, Tensor] | None:
    """Read a file of weights; None without one, or where it is damaged. torch itself compares no checksums."""
    with suppress(Exception):  # of the many that damage leads to
        if path is not None:
            with zipfile.ZipFile(path) as file:
                damaged = file.testzip()
            return None if damaged else dict(torch.load(path, map_location="cpu", weights_only=True))
    return None


def restore(run_id: str, config: TrainConfig, dataset: Dataset) -> Training:
    """Return the training of a finished run, at the weights that it kept; trained again where none are kept whole."""
    training = Training(config, dataset)
    with tempfile.TemporaryDirectory() as folder:
        weights = whole_weights(download(run_id, WEIGHTS, Path(folder)))
        if weights is not None:
            training.state.evaluated.load_state_dict(weights)
            return training
    for _ in training:
        pass
    training.state.take_selected()
    return training
