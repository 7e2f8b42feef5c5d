"""Does a network learn as well in bfloat16 on the fast paths as in plain float32? Test accuracies, paired by seed.

    python benchmarks/learning.py [--dataset imagenette --data-dir <folder>] [--epochs 10] [--seeds 5]

Both forms train from the same weights on the same batches of 128 images, with the default recipe and without a
validation split. They are evaluated on the test set after the last epoch. Prints a Markdown table with the mean
difference and its 95 % interval (Student, paired).
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field

import click
from scipy.stats import ttest_1samp

from effv2.core.processes import tune_allocator

tune_allocator()

import torch  # noqa: E402

from effv2.config.schema import TrainConfig  # noqa: E402
from effv2.data.dataset import load_dataset  # noqa: E402
from effv2.execution.device import Execution  # noqa: E402
from effv2.training.loop import Training  # noqa: E402

CPU = torch.device("cpu")
FORMS = {
    "plain float32": Execution(CPU, bf16=False, channels_last=True, fast_paths=False),
    "bf16, fast paths": Execution(CPU, bf16=True, channels_last=True),
}


@dataclass
class Found:
    """Final test accuracies in percent, in the order of the seeds, and the seconds of training."""

    accuracies: list[float] = field(default_factory=list)
    seconds: float = 0.0


@click.command()
@click.option("--dataset", default="digits", show_default=True, help="As of `effv2 train`.")
@click.option("--data-dir", default="", help="Folder of the data set.")
@click.option("--image-size", default=32, show_default=True, help="Side of the images in pixels.")
@click.option("--epochs", default=10, show_default=True, help="Epochs of each training.")
@click.option("--seeds", default=5, show_default=True, help="Trainings of each form.")
def main(dataset: str, data_dir: str, image_size: int, epochs: int, seeds: int) -> None:
    """Train every form with every seed and print the table."""
    groups = {
        "data": {"dataset": dataset, "dir": data_dir, "image_size": image_size, "validation_fraction": 0},
        "optimiser": {"batch_size": 128},
        "schedule": {"epochs": epochs},
        "execution": {"device": "cpu", "precision": "fp32"},
    }
    config = TrainConfig.model_validate(groups)
    data = load_dataset(config.data)
    found = {name: Found() for name in FORMS}
    for seed in range(seeds):
        for name, execution in FORMS.items():
            seeded = config.with_seed(seed)
            started = time.perf_counter()
            *_, last = Training(seeded, data, execution)
            found[name].accuracies.append(100 * last["test/accuracy"])
            found[name].seconds += time.perf_counter() - started
            click.echo(f"seed {seed}, {name}: {found[name].accuracies[-1]:.2f} %", err=True)
    click.echo("| form | " + " | ".join(f"seed {seed}" for seed in range(seeds)) + " | mean, % | seconds |")
    click.echo("|---" * (seeds + 3) + "|")
    for name, each in found.items():
        cells = [f"{accuracy:.2f}" for accuracy in [*each.accuracies, statistics.mean(each.accuracies)]]
        click.echo(f"| {name} | {' | '.join(cells)} | {each.seconds:.0f} |")
    plain, fast = (each.accuracies for each in found.values())
    differences = [b - a for a, b in zip(plain, fast, strict=True)]
    interval = ttest_1samp(differences, 0).confidence_interval(0.95)
    click.echo(
        f"\nDifference {statistics.mean(differences):+.2f} points, 95 % interval {interval.low:+.2f} to "
        f"{interval.high:+.2f}; {len(data.train)} images trained on, {len(data.test)} tested."
    )


if __name__ == "__main__":
    main()
