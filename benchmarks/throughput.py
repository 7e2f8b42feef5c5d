"""How fast training is, and what tracking costs, measured interleaved in one process.

    python benchmarks/throughput.py --data-dir <folder of imagenette2-160>

(a) effv2's own training loop on its fast paths, (b) a plain loop over the same images: NCHW, float32, torch's
unfused Adam. Also the seconds that logging an epoch to sqlite takes, as a share of the epoch.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import click
import torch
from torch.nn import functional as F

from effv2.architecture import build_model
from effv2.config import TrainConfig
from effv2.data.batches import epoch_order
from effv2.data.dataset import Dataset, load_dataset
from effv2.execution.device import make_execution
from effv2.execution.resolve import resolve
from effv2.training.loop import Training
from effv2.training.state import TrainState

STEPS = 6


class _Stop(Exception):
    """Ends effv2's loop after enough steps."""


def effv2_seconds(config: TrainConfig, dataset: Dataset) -> Callable[[], float]:
    """Return a function that makes STEPS steps of effv2's loop and returns the median seconds of one."""
    execution = make_execution(config.execution)
    state = TrainState.create(config, dataset, execution)

    def measure() -> float:
        marks = [time.perf_counter()]

        def on_step(step: int, _steps: int) -> None:
            marks.append(time.perf_counter())
            if step == STEPS:
                raise _Stop

        with suppress(_Stop):
            next(iter(Training(config, dataset, state, execution, on_step)))
        return statistics.median(b - a for a, b in pairwise(marks[1:]))

    return measure


def plain_seconds(config: TrainConfig, dataset: Dataset) -> Callable[[], float]:
    """Return a function that does the same in a plain NCHW float32 loop."""
    model = build_model(config.model.build_table(), config.model.outputs or len(dataset.classes)).train()
    optimiser = torch.optim.Adam(model.parameters(), lr=config.optimiser.lr)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = epoch_order(len(dataset.train), 0, 1)
        for positions in order.split(config.optimiser.batch_size)[:STEPS]:
            images = dataset.train.images(positions).contiguous()
            yield images.float() / 255, dataset.train.labels[positions]

    def measure() -> float:
        marks = [time.perf_counter()]
        for images, labels in batches():
            loss = F.cross_entropy(model(images), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            marks.append(time.perf_counter())
        return statistics.median(b - a for a, b in pairwise(marks[1:]))

    return measure


def logging_seconds() -> float:
    """Return the median seconds of logging one epoch's twelve metrics to a sqlite store."""
    import mlflow

    with tempfile.TemporaryDirectory() as folder:
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        experiment = mlflow.create_experiment("benchmark", Path(folder, "artifacts").as_uri())
        seconds = []
        with mlflow.start_run(experiment_id=experiment):
            for epoch in range(30):
                started = time.perf_counter()
                mlflow.log_metrics({f"metric/{i}": epoch / (i + 1) for i in range(12)}, step=epoch)
                seconds.append(time.perf_counter() - started)
        return statistics.median(seconds)


@click.command()
@click.option("--data-dir", required=True, help="Folder that holds imagenette2-160.")
@click.option("--image-size", default=32, show_default=True, help="Side of the images in pixels.")
@click.option("--batch-size", default=128, show_default=True, help="Images a step.")
@click.option("--variant", default="default", show_default=True, help="Architecture variant.")
@click.option("--rounds", default=5, show_default=True, help="Interleaved rounds after one of warm-up.")
def main(data_dir: str, image_size: int, batch_size: int, variant: str, rounds: int) -> None:
    """Measure training images/s of effv2 and of a plain loop, and the share of tracking."""
    config = resolve(
        TrainConfig.model_validate(
            {
                "data": {"dataset": "imagenette", "dir": data_dir, "image_size": image_size},
                "model": {"variant": variant, "outputs": 1000},
                "optimiser": {"name": "adam", "lr": 1e-4, "batch_size": batch_size, "weight_decay": 0, "clip_norm": 0},
                "execution": {"precision": "fp32"},
            }
        ),
        print,
    )
    dataset = load_dataset(config.data)
    measured = {"effv2": effv2_seconds(config, dataset), "plain NCHW float32": plain_seconds(config, dataset)}
    seconds: dict[str, list[float]] = {name: [] for name in measured}
    for round_ in range(rounds + 1):
        for name, measure in measured.items():
            found = measure()
            if round_:
                seconds[name].append(found)
    rates = {name: [batch_size / s for s in values] for name, values in seconds.items()}
    for name, values in rates.items():
        median = statistics.median(values)
        click.echo(f"{name}: {median:.0f} images/s (median of {rounds}, {min(values):.0f} to {max(values):.0f})")
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    click.echo(f"ratio: {statistics.median(ratios):.2f} (median of pairs, {min(ratios):.2f} to {max(ratios):.2f})")
    logging = logging_seconds()
    epoch = len(dataset.train) / statistics.median(rates["effv2"])
    click.echo(f"logging an epoch: {1000 * logging:.1f} ms, {logging / epoch:.4%} of {epoch:.1f} s of training")


if __name__ == "__main__":
    main()
