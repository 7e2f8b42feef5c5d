"""The results that a run logs after its last epoch: metrics, predictions with tables and figures, and the network."""

import tempfile
import warnings
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from scipy.special import softmax
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from torch import Tensor, nn

from effv2.architecture import build_model, count_gflops, count_parameters
from effv2.config.schema import TrainConfig
from effv2.core.calibration import calibration_error, reliability_diagram
from effv2.core.figures import PALETTE, accuracy_curves, short
from effv2.core.paths import write_csv
from effv2.data.batches import NORMALISATIONS
from effv2.data.dataset import Dataset
from effv2.data.images import Square
from effv2.data.inspection import WRONG, gallery, of_each_class
from effv2.run.initial import initialise
from effv2.serving.export import as_base64, output_names, write_served
from effv2.tracking.read import download
from effv2.tracking.writer import TrackedRun
from effv2.training.evaluation import evaluate, median_seconds
from effv2.training.loop import Training
from effv2.training.stages import stage_table

CURVES = {"train": "train/accuracy", "validation": "val/accuracy", "test": "test/accuracy"}
MOST_WRONG, MOST_NAMED = 24, 30  # images of a gallery; classes, or pairs of classes, that a confusion matrix names
FOLDER = 0x10  # attribute of a file in an archive
WEIGHTS = "selected.pt"  # artifact: weights of the selected epoch, until the study's best run is known


def log_end(run: TrackedRun, training: Training) -> dict[str, float]:
    """Log and return the summary of a training; log predictions and figures of its network at the selected epoch."""
    config, dataset, state = training.config, training.dataset, training.state
    history, network = state.progress.history, training.network_for_inference()
    selected = len(history) if state.selected is None else state.progress.best_epoch
    outputs = config.model.outputs or len(dataset.classes)
    summary: dict[str, float] = {}
    if config.evaluation.test_set:
        test = {epoch: each["test/accuracy"] for epoch, each in enumerate(history, 1) if "test/accuracy" in each}
        best = max(test, key=test.__getitem__)
        summary = {"best/test_accuracy": test[best], "best/epoch": best, "final/test_accuracy": test[len(history)]}
        summary |= log_test(run, training)
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
        name: [{epoch: metrics[key] for epoch, metrics in enumerate(history, 1) if key in metrics}]
        for name, key in CURVES.items()
        if key in history[-1]
    }
    with run.new_artifacts() as folder:
        accuracy_curves(curves, "accuracy by epoch").savefig(folder / "curves.png", dpi=120)
        if config.progressive.stages > 1:
            write_csv(folder / "stages.csv", stage_table(config, history))
    return summary


def log_test(run: TrackedRun, training: Training) -> dict[str, float]:
    """Log the current network's predictions on the test set with their tables and figures; return accuracy and ECE."""
    dataset = training.dataset
    result = evaluate(training.network_for_inference(), dataset.test, training.config.evaluation.batch_size)
    with run.new_artifacts() as folder:
        labels = dataset.test.labels.numpy()
        answers = write_predictions(folder, dataset.classes, dataset.test.ids, labels, result.logits.numpy())
        wrong = [place for place, each in enumerate(answers) if each.predicted != each.true]
        wrong.sort(key=lambda place: -answers[place].probability)
        if surest := of_each_class(wrong, labels.tolist(), MOST_WRONG):
            captions = [answers[place].lines() for place in surest]
            gallery(dataset.test.images(torch.tensor(surest)), captions).save(folder / WRONG, quality=90)
    return {"selected/test_accuracy": result.accuracy, "selected/test_ece": calibration_error(*_sureness(answers))}


class Answer(NamedTuple):
    """The prediction for a test image and its probability: a line of predictions.csv."""

    id: str
    true: str
    predicted: str
    probability: float

    def lines(self) -> list[str]:
        """Return it as the lines of a caption."""
        return [self.id, f"true: {self.true}", f"predicted: {self.predicted}", f"probability: {self.probability:.1%}"]


def write_predictions(
    folder: Path,
    classes: Sequence[str],
    ids: Sequence[str],
    true: np.ndarray,
    logits: np.ndarray,
    *,
    present: Sequence[int] | np.ndarray = (),
    outputs: Sequence[str] = (),
) -> list[Answer]:
    """Write and return the predictions of logits (N, outputs), by argmax over all outputs, with tables and figures.

    `true` (N) are the numbers of the classes. The classes are the outputs `present`, by default the first ones. Other
    outputs share a column. `outputs` names the outputs; by default they have the names of their columns.
    """
    columns = output_names(classes, logits.shape[1])
    column = np.full(logits.shape[1], len(classes))
    column[present if len(present) else range(len(classes))] = range(len(classes))
    argmax = logits.argmax(1)  # not of probabilities, where close logits can be equal
    names = [outputs[each] if outputs else columns[column[each]] for each in argmax]
    confidence = softmax(logits, 1)[np.arange(len(argmax)), argmax]
    answers = [
        Answer(i, classes[t], name, float(p)) for i, t, name, p in zip(ids, true, names, confidence, strict=True)
    ]
    matrix = confusion_matrix(true, column[argmax], labels=range(len(columns)))[: len(classes)]
    scores = precision_recall_fscore_support(true, column[argmax], labels=range(len(classes)), zero_division=0)
    tables: dict[str, list[tuple[Any, ...]]] = {
        "predictions": [Answer._fields, *((*each[:3], f"{each.probability:.6f}") for each in answers)],
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
    for name, rows in tables.items():
        write_csv(folder / f"{name}.csv", rows)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a class name in a script that the font lacks
        _confusion_figure(matrix, columns).savefig(folder / "confusion_matrix.png", dpi=120)
    reliability_diagram(*_sureness(answers)).savefig(folder / "reliability.png", dpi=120)
    return answers


def _sureness(answers: Sequence[Answer]) -> tuple[np.ndarray, np.ndarray]:
    """Return the confidence of each prediction, and whether it is correct."""
    return np.array([each.probability for each in answers]), np.array([each.true == each.predicted for each in answers])


def _confusion_figure(matrix: np.ndarray, columns: Sequence[str]) -> Figure:
    """Draw a confusion matrix. Rows are true classes, and colours show the share of the row.

    With many classes, the most confused pairs are named next to it instead of all classes.
    """
    columns = list(map(short, columns))
    rows, few = columns[: len(matrix)], len(columns) <= MOST_NAMED
    side = 2.5 + 0.38 * len(columns) + 0.06 * max(0, max(map(len, columns)) - 10)
    figure = Figure(figsize=(min(14.0, side),) * 2 if few else (18, 8), layout="constrained")
    axes, *beside = figure.subplots(1, 1 if few else 2, squeeze=False, width_ratios=(1,) if few else (2.2, 1))[0]
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", norm=PowerNorm(1 if few else 0.5, 0, 1))  # shows small shares
    axes.set(xlabel="predicted", ylabel="true")
    if beside:
        axes.set(xlabel="predicted, number of the class", ylabel="true, number of the class")
        _most_confused(beside[0], matrix, rows, columns)
        return figure
    axes.set_xticks(range(len(columns)), columns, rotation=90)
    axes.set_yticks(range(len(rows)), rows)
    for (row, column), count in np.ndenumerate(matrix):
        colour = "white" if share[row, column] > 0.5 else "black"
        axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=7, in_layout=False)
    return figure


def _most_confused(axes: Axes, matrix: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> None:
    """Draw how many images of one class were predicted as another, as bars, the largest first."""
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    most = [divmod(int(each), len(columns)) for each in np.argsort(-wrong, axis=None, kind="stable")[:MOST_NAMED]]
    pairs = [(row, column) for row, column in most if wrong[row, column]]
    counts = [int(wrong[pair]) for pair in pairs]
    bars = axes.barh(range(len(pairs)), counts, color=PALETTE[0])
    axes.bar_label(bars, [f"{n} of {matrix[row].sum()}" for n, (row, _) in zip(counts, pairs, strict=True)], padding=4)
    axes.set_yticks(
        range(len(pairs)), [f"{rows[row]} ({row}) as {columns[column]} ({column})" for row, column in pairs]
    )
    axes.set(title="most confused", xlabel="images")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.invert_yaxis()
    axes.margins(x=0.25, y=0.01)


def log_network(run: TrackedRun, training: Training) -> None:
    """Log a trained network with its preprocessing to its run, which may have ended."""
    config, dataset, classes = training.config, training.dataset, training.dataset.classes
    outputs = config.model.outputs or len(classes)
    own = build_model(config.model.build_table(), outputs)  # without the paths of the device it was trained on
    own.load_state_dict(training.state.evaluated.state_dict())
    first = dataset.test.images(torch.tensor([0]))[0].permute(1, 2, 0).contiguous().cpu().numpy()
    statistics, square = NORMALISATIONS[config.data.normalise], Square(config.data.image_size)
    with tempfile.TemporaryDirectory() as folder:
        files = write_served(Path(folder), own, statistics, square, classes=classes, outputs=outputs)
        run.log_model(files, as_base64(Image.fromarray(first)))


def keep_weights(run: TrackedRun, network: nn.Module) -> None:
    """Log the weights of the selected epoch, so that they outlive the training process."""
    with run.new_artifacts() as folder:
        torch.save(network.state_dict(), folder / WEIGHTS)


def whole_weights(path: Path | None) -> dict[str, Tensor] | None:
    """Read a file of weights; None if it is missing or damaged. torch itself compares no checksums."""
    with suppress(Exception):  # one of the many errors that damage causes
        if path is not None:
            with zipfile.ZipFile(path) as file:
                # torch skips an entry that is marked as a folder, and doesn't set its tensor.
                damaged = file.testzip() or any(each.external_attr & FOLDER for each in file.infolist())
            return None if damaged else dict(torch.load(path, map_location="cpu", weights_only=True))
    return None


def restore(run_id: str, config: TrainConfig, dataset: Dataset) -> Training:
    """Return the training of a finished run with its stored weights. Without intact weights, train again."""
    with tempfile.TemporaryDirectory() as folder:
        weights = whole_weights(download(run_id, WEIGHTS, Path(folder)))
    if weights is not None:
        training = Training(config, dataset)
        training.state.evaluated.load_state_dict(weights)
        return training
    training = Training(config, dataset, initialise=initialise(config, dataset.classes))
    for _ in training:
        pass
    training.state.take_selected()
    return training
