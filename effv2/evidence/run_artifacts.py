"""The files that describe one run: predictions, per-class table, confusion matrix, curves."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from effv2.evidence.figures import accuracy_curves, confusion_figure
from effv2.serving.export import output_names

CURVES = {"train": "train/accuracy", "validation": "val/accuracy", "test": "test/accuracy"}


@dataclass(frozen=True)
class Predictions:
    """What a network says of a test set: N ids and true classes, and probabilities (N, outputs)."""

    classes: Sequence[str]
    ids: Sequence[str]
    true: np.ndarray
    probabilities: np.ndarray


def write_curves(folder: Path, history: Sequence[dict[str, float]]) -> None:
    """Draw accuracy by epoch from the metrics of each epoch."""
    curves = {
        name: [{epoch: metrics[key] for epoch, metrics in enumerate(history, 1)}]
        for name, key in CURVES.items()
        if key in history[0]
    }
    accuracy_curves(curves, "accuracy by epoch").savefig(folder / "curves.png", dpi=120)


def write_predictions(folder: Path, predictions: Predictions) -> None:
    """Write predictions, confusion matrix and per-class table.

    The prediction is the argmax over all outputs; what lies beyond the classes is the column `other`.
    """
    classes, true, probabilities = predictions.classes, predictions.true, predictions.probabilities
    names = output_names(classes, probabilities.shape[1])
    argmax = probabilities.argmax(1)
    predicted = np.minimum(argmax, len(classes))
    certainty = probabilities[np.arange(len(argmax)), argmax]

    write_csv(
        folder / "predictions.csv",
        ("id", "true", "predicted", "probability"),
        (
            (id_, names[t], names[p], f"{c:.6f}")
            for id_, t, p, c in zip(predictions.ids, true, predicted, certainty, strict=True)
        ),
    )
    matrix = confusion_matrix(true, predicted, labels=range(len(names)))[: len(classes)]
    write_csv(
        folder / "confusion_matrix.csv",
        ("true", *names),
        ((name, *row) for name, row in zip(classes, matrix.tolist(), strict=True)),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a class name in a script that the font lacks
        confusion_figure(matrix, names).savefig(folder / "confusion_matrix.png", dpi=120)
    _write_per_class(folder / "per_class.csv", classes, true, predicted)


def _write_per_class(path: Path, classes: Sequence[str], true: np.ndarray, predicted: np.ndarray) -> None:
    scores = precision_recall_fscore_support(true, predicted, labels=range(len(classes)), zero_division=0)
    write_csv(
        path,
        ("class", "images", "precision", "recall", "f1"),
        (
            (name, support, f"{precision:.6f}", f"{recall:.6f}", f"{f1:.6f}")
            for name, precision, recall, f1, support in zip(classes, *scores, strict=True)
        ),
    )


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table as CSV in UTF-8."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
