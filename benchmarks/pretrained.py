"""The cost of evaluate-pretrained, compared with its bare forward passes and decoding, and with a plain loop.

    python benchmarks/pretrained.py --data-dir <folder of imagenette2-160>

The forms take turns in one process, on Imagenette's test images and freshly initialised networks. Times don't depend on
the weights.

floor    decoding and transforms in threads into one array, then bare forward passes of the network in effv2's form
plain    torchvision's transforms in a DataLoader with 2 workers, batches of 128 (NCHW, float32) through its network
effv2    a whole evaluation, but without the latency passes: cold cache, and a tracked run on sqlite with all its
         metrics, tables and figures
second   the same for another network with the same preprocessing
command  the command in its own process, with start-up, cold cache and latency passes
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import models

from effv2.config.options import StudyOptions
from effv2.core.reporter import Reporter
from effv2.data.dataset import load_once
from effv2.data.images import LabelledImages
from effv2.execution.device import fold_batch_norm
from effv2.pretrained import evaluation
from effv2.pretrained.config import ComputeConfig, ImagesConfig, PretrainedConfig
from effv2.pretrained.evaluation import Evaluation, all_logits, logits_of
from effv2.pretrained.images import choose_images
from effv2.run.weights import Requested, parse_models
from effv2.studies.comparison import make_weights
from effv2.studies.engine import run_study
from effv2.tracking.store import open_store


class PlainImages(Dataset[torch.Tensor]):
    """The images of a plain DataLoader."""

    def __init__(self, requested: Requested, images: LabelledImages) -> None:
        self.transforms, self.images = requested.weights.transforms(), images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Open and transform one."""
        transformed: torch.Tensor = self.transforms(self.images.open(index).convert("RGB"))
        return transformed


def seconds_of(function: Callable[[], Any]) -> float:
    """Return the seconds of a call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def floor(evaluated: Evaluation) -> None:
    """Decode, then pass batches through the network in effv2's form."""
    requested, images, execution = evaluated.requested, evaluated.images.part, evaluated.execution
    preparation = requested.preparation
    pixels = np.empty((len(images), preparation.size, preparation.size, 3), dtype=np.uint8)

    def fill(index: int) -> None:
        pixels[index] = preparation(images.open(index))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(fill, range(len(images))))
    module = models.get_model(requested.network).eval().requires_grad_(False)
    fold_batch_norm(module)
    network = partial(logits_of, execution, execution.place(module), requested.normalisation)
    all_logits(network, torch.from_numpy(pixels), evaluated.batch, lambda _: None)


def plain(requested: Requested, images: LabelledImages) -> None:
    """Evaluate as a short script would."""
    network = models.get_model(requested.network).eval()
    with torch.inference_mode():
        for batch in DataLoader(PlainImages(requested, images), 128, num_workers=2):
            network(batch).argmax(1)


@mock.patch.object(evaluation, "median_seconds", lambda *_: 0.0)
def evaluate(named: str, config: PretrainedConfig) -> None:
    """Evaluate in this process, without the latency passes."""
    reporter, load = Reporter(), load_once(Reporter())
    plan = make_weights(named, config, None, progress=False, reporter=reporter)
    run_study(plan, open_store(""), StudyOptions(fresh=True, log_model="none"), load, reporter)


def report(seconds: dict[str, list[float]]) -> None:
    """Print medians with their range, and ratios of pairs."""
    for label, values in seconds.items():
        click.echo(f"{label}: {statistics.median(values):.1f} s ({min(values):.1f} to {max(values):.1f})")
    for over, label in (("floor", "effv2"), ("floor", "second"), ("plain", "effv2"), ("plain", "command")):
        ratios = [a / b for a, b in zip(seconds[label], seconds[over], strict=True)]
        click.echo(f"{label} / {over}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


@click.command()
@click.option("--data-dir", required=True, help="Folder that holds imagenette2-160.")
@click.option("--network", default="squeezenet1_1", show_default=True, help="Network of torchvision.")
@click.option("--images", default=3925, show_default=True, help="Test images.")
@click.option("--plain-images", default=1024, show_default=True, help="Test images for the plain loop.")
@click.option("--rounds", default=3, show_default=True, help="Rounds.")
def main(data_dir: str, network: str, images: int, plain_images: int, rounds: int) -> None:
    """Measure and print seconds and ratios."""
    data_dir = str(Path(data_dir).resolve())
    config = PretrainedConfig(data=ImagesConfig(dir=data_dir, limit=images), execution=ComputeConfig(device="cpu"))
    (requested,) = parse_models(network)
    evaluated = Evaluation(requested, choose_images(config.data), config)
    files = evaluated.images.part
    fewer = files.take(np.arange(min(plain_images, len(files))))
    seconds: dict[str, list[float]] = {"floor": [], "plain": [], "effv2": [], "second": [], "command": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder / 'mlflow.db'}"
        os.chdir(folder)
        weights = [folder / f"{network}-{i}.pth" for i in range(2)]
        for i, path in enumerate(weights):
            torch.manual_seed(i)
            torch.save(models.get_model(network).state_dict(), path)

        os.environ["EFFV2_CACHE"] = str(folder / "warm-up")
        evaluate(f"{network}={weights[0]}", config)  # warms up the imports and the store
        for round_ in range(rounds):
            os.environ["EFFV2_CACHE"] = str(folder / str(round_))
            seconds["floor"].append(seconds_of(lambda: floor(evaluated)))
            seconds["effv2"].append(seconds_of(lambda: evaluate(f"{network}={weights[0]}", config)))
            seconds["second"].append(seconds_of(lambda: evaluate(f"{network}={weights[1]}", config)))
            os.environ["EFFV2_CACHE"] = str(folder / f"{round_}, command")
            words = ["--models", f"{network}={weights[0]}", "--data-dir", data_dir, "--limit", str(images), "--fresh"]
            command = [sys.executable, "-m", "effv2", "evaluate-pretrained", *words]
            run = partial(subprocess.run, command, check=True, capture_output=True)
            seconds["command"].append(seconds_of(run))
            seconds["plain"].append(seconds_of(lambda: plain(requested, fewer)) * len(files) / len(fewer))
    report(seconds)
    click.echo(json.dumps({"network": network, "images": len(files), "threads": torch.get_num_threads()} | seconds))


if __name__ == "__main__":
    main()
