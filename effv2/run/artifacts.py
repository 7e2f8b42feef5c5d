"""The files that a run describes itself by: predictions, per-class table, confusion matrix, curves."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.special import softmax
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from effv2.core.figures import accuracy_curves, plain
from effv2.core.paths import write_csv
from effv2.serving.export import output_names

CURVES = {"train": "train/accuracy", "validation": "val/accuracy", "test": "test/accuracy"}


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


def argmax_over_all(classes: Sequence[str], ids: Sequence[str], true: np.ndarray, logits: np.ndarray) -> Predictions:
    """Return the predictions of a head whose first outputs are the classes: the argmax over all of them."""
    columns = output_names(classes, logits.shape[1])
    argmax = logits.argmax(1)  # not of probabilities: close logits tie there
    predicted = np.minimum(argmax, len(classes))
    names = [columns[each] for each in predicted]
    return Predictions(
        classes, columns, ids, true, predicted, names, softmax(logits, 1)[np.arange(len(argmax)), argmax]
    )


def write_curves(folder: Path, history: Sequence[dict[str, float]]) -> None:
    """Draw accuracy by epoch from the metrics of each epoch."""
    curves = {
        name: [{epoch: metrics[key] for epoch, metrics in enumerate(history, 1)}]
        for name, key in CURVES.items()
        if key in history[0]
    }
    accuracy_curves(curves, "accuracy by epoch").savefig(folder / "curves.png", dpi=120)


def write_predictions(folder: Path, predictions: Predictions) -> None:
    """Write predictions, confusion matrix and per-class table."""
    classes, columns, true = predictions.classes, predictions.columns, predictions.true
    write_csv(
        folder / "predictions.csv",
        [("id", "true", "predicted", "probability")]
        + [
            (id_, classes[t], name, f"{probability:.6f}")
            for id_, t, name, probability in zip(
                predictions.ids, true, predictions.names, predictions.probability, strict=True
            )
        ],
    )
    matrix = confusion_matrix(true, predictions.predicted, labels=range(len(columns)))[: len(classes)]
    write_csv(
        folder / "confusion_matrix.csv",
        [("true", *columns), *((name, *row) for name, row in zip(classes, matrix.tolist(), strict=True))],
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a class name in a script that the font lacks
        _confusion_figure(matrix, columns).savefig(folder / "confusion_matrix.png", dpi=120)
    _write_per_class(folder / "per_class.csv", classes, true, predictions.predicted)


def _write_per_class(path: Path, classes: Sequence[str], true: np.ndarray, predicted: np.ndarray) -> None:
    scores = precision_recall_fscore_support(true, predicted, labels=range(len(classes)), zero_division=0)
    write_csv(
        path,
        [("class", "images", "precision", "recall", "f1")]
        + [
            (name, support, f"{precision:.6f}", f"{recall:.6f}", f"{f1:.6f}")
            for name, precision, recall, f1, support in zip(classes, *scores, strict=True)
        ],
    )


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
            axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=7, in_layout=False)
    return figure
