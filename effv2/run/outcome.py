"""A finished run with its network: its model, and what a study does with the best of them."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from effv2.architecture import build_model
from effv2.config.schema import TrainConfig
from effv2.data.batches import NORMALISATIONS
from effv2.data.dataset import Dataset, Split
from effv2.data.images import Square
from effv2.execution.device import make_execution
from effv2.run.records import log_test
from effv2.serving.export import as_base64, output_names, write_served
from effv2.tracking.read import download
from effv2.tracking.writer import TrackedRun
from effv2.training.loop import Training

WEIGHTS = "selected.pt"  # artifact: weights of the selected epoch, until the study's best run is known


@dataclass(frozen=True)
class Outcome:
    """A finished run and its network, with the weights of the selected epoch; of a pruned one, of its last."""

    run: TrackedRun
    config: TrainConfig
    dataset: Dataset
    network: nn.Module
    watched_accuracy: float
    summary: dict[str, float]
    model_address: str = ""
    pruned: bool = False

    def log_model(self) -> None:
        """Log the network, with its preprocessing, to the run, which may have ended."""
        model, data, classes = self.config.model, self.config.data, self.dataset.classes
        outputs = model.outputs or len(classes)
        plain = build_model(model.build_table(), outputs)  # without the paths of the device it was trained on
        plain.load_state_dict(self.network.state_dict())
        statistics, names = NORMALISATIONS[data.normalise], output_names(classes, outputs)
        with tempfile.TemporaryDirectory() as name:
            files = write_served(Path(name), plain, statistics, Square(data.image_size), names)
            self.run.log_model(files, _example(self.dataset.test), torch.__version__)


def restore(run: TrackedRun, config: TrainConfig, dataset: Dataset) -> Outcome:
    """Return the outcome of a finished run, from the weights that it kept; trained again where it kept none."""
    training = Training(config, dataset)
    state = training.state
    with tempfile.TemporaryDirectory() as folder:
        path = download(run.run_id, WEIGHTS, Path(folder))
        weights = None if path is None else torch.load(path, map_location="cpu", weights_only=True)
    if weights is None:
        for _ in training:
            pass
        state.take_selected()
    else:
        state.evaluated.load_state_dict(weights)
    return Outcome(run, config, dataset, state.evaluated, state.progress.best_accuracy, {})


def score_on_test(outcome: Outcome) -> float:
    """Evaluate an outcome on the test set, which its run has not seen, and log to the run; return the accuracy."""
    config = outcome.config
    statistics = NORMALISATIONS[config.data.normalise]
    network = make_execution(config.execution).inference_factory(outcome.network, statistics)()
    accuracy = log_test(outcome.run, config, outcome.dataset, network)
    outcome.run.log_metrics({"selected/test_accuracy": accuracy})
    return accuracy


def keep_weights(outcome: Outcome) -> None:
    """Log the weights of the selected epoch, so that they outlive the process that trained them."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(outcome.network.state_dict(), Path(folder, WEIGHTS))
        outcome.run.log_folder(Path(folder))


def _example(split: Split) -> str:
    """Return the split's first image as a request holds it."""
    return as_base64(Image.fromarray(split.images(torch.tensor([0]))[0].permute(1, 2, 0).contiguous().numpy()))
