"""Classes of unequal size: unchanged, weighted in the loss, or drawn equally often (data.balance).

    python benchmarks/balance.py --data-dir <folder with train and test> [--classes 5] [--epochs 7] [--seeds 3]

The number of training images falls geometrically, down to 1/20 in the last class. Prints a Markdown table: means over
the seeds, with ranges in parentheses. The accuracy is weighted as if the test classes were equally unequal.
"""

from dataclasses import replace

import click
import numpy as np
import torch
from batch_norm import cell

from effv2.config.schema import TrainConfig
from effv2.data import batches
from effv2.data.dataset import load_dataset
from effv2.training.evaluation import evaluate
from effv2.training.loop import Training

ONE_HOT = batches.one_hot


@click.command()
@click.option("--data-dir", "folder", required=True, help="Folder of the data set.")
@click.option("--classes", default=5, show_default=True, help="Number of its classes, from the first.")
@click.option("--epochs", default=7, show_default=True, help="Epochs of each training.")
@click.option("--seeds", default=3, show_default=True, help="Trainings of each kind.")
def main(folder: str, classes: int, epochs: int, seeds: int) -> None:
    """Train each way with every seed and print the table."""
    data = {"dataset": "folder", "dir": folder, "image_size": 48, "validation_fraction": 0}
    groups = {"augment": {"flip": True}, "model": {"variant": "half_layers"}, "schedule": {"epochs": epochs}}
    groups |= {"execution": {"device": "cpu", "precision": "fp32"}}
    groups |= {"evaluation": {"batch_norm_images": 1024, "every": epochs}}
    whole = load_dataset(TrainConfig.model_validate({"data": data}).data)
    all_of = [np.flatnonzero(whole.train.labels.numpy() == label) for label in range(classes)]
    wanted = np.geomspace(len(all_of[0]), len(all_of[0]) / 20, classes).round().astype(int)
    train = whole.train.take(np.concatenate([each[:count] for each, count in zip(all_of, wanted, strict=True)]))
    test = whole.test.take(np.flatnonzero(whole.test.labels.numpy() < classes))
    dataset = replace(whole, classes=whole.classes[:classes], train=train, test=test, resized=None)
    weights = torch.tensor(wanted.sum() / (wanted * classes), dtype=torch.float32)
    print(f"Training images: {', '.join(map(str, wanted))}.\n")
    print("| classes | mean recall | recall of the rarest | accuracy |\n|---|---|---|---|")
    for kind in ("as they come", "weighted in the loss", "`data.balance`"):
        factors, rows = weights if kind.startswith("weighted") else torch.ones(classes), []
        batches.one_hot = lambda labels, *more, by=factors: ONE_HOT(labels, *more) * by[labels, None]
        for seed in range(seeds):
            more = {"data": data | {"balance": kind.startswith("`")}, "random": {"seed": seed}}
            list(training := Training(TrainConfig.model_validate(groups | more), dataset))
            found = evaluate(training.network_for_inference(), dataset.test, 256)
            right = (found.logits.argmax(1) == found.labels).numpy()
            recalls = np.array([right[found.labels.numpy() == label].mean() for label in range(classes)])
            rows.append((recalls.mean(), recalls[-1], np.average(recalls, weights=wanted)))
        print(f"| {kind} | {' | '.join(cell(list(column)) for column in zip(*rows, strict=True))} |", flush=True)


if __name__ == "__main__":
    main()
