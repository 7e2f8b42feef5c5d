"""Classes of unequal size: as they come, weighted in the loss, or drawn equally often (data.balance).

    python benchmarks/balance.py --data-dir <folder with train and test> [--classes 5] [--epochs 7] [--seeds 3]

Training images fall geometrically from class to class, from all of the first to 1/20 of them. Prints a Markdown table: means over the seeds, ranges in parentheses. Accuracy is that on test images as frequent as the
training images: recalls weighted by the classes' shares.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial

import click

from effv2.core.processes import tune_allocator

tune_allocator()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from batch_norm import cell  # noqa: E402

from effv2.config.schema import TrainConfig  # noqa: E402
from effv2.data import batches  # noqa: E402
from effv2.data.dataset import load_dataset  # noqa: E402
from effv2.training.evaluation import evaluate  # noqa: E402
from effv2.training.loop import Training  # noqa: E402

ONE_HOT, RATIO = batches.one_hot, 20


def weighted(weights: torch.Tensor, labels: torch.Tensor, *more: float) -> torch.Tensor:
    """Return targets as batches.one_hot does, each times the weight of its class: weights of the cross-entropy."""
    return ONE_HOT(labels, *more) * weights[labels, None]


@click.command()
@click.option("--data-dir", "folder", required=True, help="Folder of the data set.")
@click.option("--classes", default=5, show_default=True, help="How many of its classes, the first ones.")
@click.option("--image-size", default=48, show_default=True, help="Side of the images in pixels.")
@click.option("--epochs", default=7, show_default=True, help="Epochs of each training.")
@click.option("--seeds", default=3, show_default=True, help="Trainings of each kind.")
def main(folder: str, classes: int, image_size: int, epochs: int, seeds: int) -> None:
    """Train each way with every seed and print the table."""
    data = {"dataset": "folder", "dir": folder, "image_size": image_size, "validation_fraction": 0}
    groups = {"augment": {"flip": True}, "model": {"variant": "half_layers"}, "schedule": {"epochs": epochs}}
    groups |= {"execution": {"device": "cpu", "precision": "fp32"}}
    groups |= {"evaluation": {"batch_norm_images": 1024, "every": epochs}}
    whole = load_dataset(TrainConfig.model_validate({"data": data}).data)
    members = [np.flatnonzero(whole.train.labels.numpy() == label) for label in range(classes)]
    wanted = np.geomspace(len(members[0]), len(members[0]) / RATIO, classes).round().astype(int)
    train = whole.train.take(np.concatenate([each[:count] for each, count in zip(members, wanted, strict=True)]))
    test = whole.test.take(np.flatnonzero(whole.test.labels.numpy() < classes))
    dataset = replace(whole, classes=whole.classes[:classes], train=train, test=test, resized=None)
    shares, few = wanted / wanted.sum(), max(1, classes // 3)
    print(f"Training images: {', '.join(map(str, wanted))}.\n")
    print(f"| classes | mean recall | recall of the rarest {few} | accuracy |\n|---|---|---|---|")
    for kind in ("as they come", "weighted in the loss", "`data.balance`"):
        weights = torch.tensor(1 / (shares * len(shares)), dtype=torch.float32)
        batches.one_hot = partial(weighted, weights) if kind.startswith("weighted") else ONE_HOT
        rows = []
        for seed in range(seeds):
            more = {"data": data | {"balance": kind.startswith("`")}, "random": {"seed": seed}}
            training = Training(TrainConfig.model_validate(groups | more), dataset)
            *_, last = training
            found = evaluate(training.network_for_inference(), dataset.test, 256)
            right = (found.logits.argmax(1) == found.labels).numpy()
            recalls = np.array([right[found.labels.numpy() == label].mean() for label in range(len(shares))])
            rows.append((recalls.mean(), recalls[-few:].mean(), (recalls * shares).sum()))
            sys.stderr.write(f"{kind}, seed {seed}: {rows[-1]}, {last['time/train_seconds']:.1f} s an epoch\n")
        print(f"| {kind} | {' | '.join(cell(list(column)) for column in zip(*rows, strict=True))} |", flush=True)


if __name__ == "__main__":
    main()
