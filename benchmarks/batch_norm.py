"""The effect of estimating batch norm again before an evaluation: test accuracies of the same weights, both ways.

    python benchmarks/batch_norm.py [--dataset folder --data-dir <folder>] [--epochs 40] [--every 4] [--seeds 3]

Each seed trains once with the default recipe. Every few epochs, the test set is evaluated twice: with the running
averages of batch norm, and with statistics from at most 1,024 training images. Then the averages are restored. Prints a
Markdown table of means over the seeds, with ranges in parentheses.
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict

import click

from effv2.core.processes import tune_allocator

tune_allocator()

from effv2.config.schema import TrainConfig  # noqa: E402
from effv2.core.randomness import private_randomness  # noqa: E402
from effv2.data.dataset import load_dataset  # noqa: E402
from effv2.run.few_images import BATCH_NORM_IMAGES  # noqa: E402
from effv2.training.evaluation import evaluate  # noqa: E402
from effv2.training.loop import Training  # noqa: E402


def both(training: Training) -> tuple[float, float]:
    """Return the test accuracy with running averages, and with new statistics."""
    network, split, size = training.state.evaluated, training.dataset.test, training.config.evaluation.batch_size
    running = evaluate(training.network_for_inference(), split, size).accuracy
    kept = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with private_randomness():
        training._estimate_batch_norm(BATCH_NORM_IMAGES)
    estimated = evaluate(training.network_for_inference(), split, size).accuracy
    for name, buffer in network.named_buffers():
        buffer.copy_(kept[name])
    return running, estimated


def cell(shares: list[float]) -> str:
    """Write a mean with its range, in percent."""
    mean, low, high = (f"{100 * each:.1f}" for each in (statistics.fmean(shares), min(shares), max(shares)))
    return f"{mean} ({low} to {high})"


@click.command()
@click.option("--dataset", default="digits", show_default=True, help="As of `effv2 train`.")
@click.option("--data-dir", "dir", default="", help="Folder of the data set.")
@click.option("--image-size", default=32, show_default=True, help="Side of the images in pixels.")
@click.option("--per-class", default=0, show_default=True, help="Training images per class (0 = all).")
@click.option("--batch-size", default=32, show_default=True, help="Images per step.")
@click.option("--epochs", default=40, show_default=True, help="Epochs of each training.")
@click.option("--every", default=4, show_default=True, help="Epochs between two evaluations.")
@click.option("--seeds", default=3, show_default=True, help="Trainings.")
def main(batch_size: int, epochs: int, every: int, seeds: int, **data: str | int) -> None:
    """Train with every seed and print the table."""
    groups = {
        "data": data,
        "optimiser": {"batch_size": batch_size},
        "schedule": {"epochs": epochs},
        "evaluation": {"test_set": False},
        "execution": {"device": "cpu", "precision": "fp32"},
    }
    found: dict[int, list[tuple[float, float, float]]] = defaultdict(list)
    for seed in range(seeds):
        config = TrainConfig.model_validate(groups | {"random": {"seed": seed}})
        training = Training(config, load_dataset(config.data))
        for epoch, metrics in enumerate(training, 1):
            if epoch % every == 0 or epoch == 1:
                found[training.state.progress.step].append((metrics["train/accuracy"], *both(training)))
                sys.stderr.write(f"seed {seed}, epoch {epoch}: {found[training.state.progress.step][-1]}\n")
    print("| steps | training accuracy | test, running averages | test, estimated again |\n|---|---|---|---|")
    for step, rows in found.items():
        print(f"| {step} | {' | '.join(cell(list(column)) for column in zip(*rows, strict=True))} |")


if __name__ == "__main__":
    main()
