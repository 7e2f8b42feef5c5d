"""Data sets of few images: long enough trainings, evaluations that don't lag behind, and what an accuracy is worth."""

from collections.abc import Mapping, Sequence

import numpy as np

from effv2.config.schema import TrainConfig
from effv2.core.reporter import Message
from effv2.core.words import percent
from effv2.data.batches import batch_count
from effv2.data.dataset import Dataset, LoadData
from effv2.evidence.statistics import wilson
from effv2.evidence.study import NEAR_CHANCE, is_near_chance
from effv2.training.stages import norms_are_frozen

FIRST_DATASETS = ("digits", "imagenette", "mnist", "birds")
# A training has at least this many steps, unless its epochs are given or the maximum of epochs is fewer. With less, the
# running averages of batch norm lag behind the weights (docs/few-images.md).
MANY_STEPS, MOST_EPOCHS = 1000, 100
BATCH_NORM_IMAGES = 1024
FEW_TO_SELECT = 50  # validation images: their accuracy has a standard error of up to 7 points


def with_length(configs: Sequence[TrainConfig], load: LoadData, message: Message) -> list[TrainConfig]:
    """Return configs of a length that fits the number of images, with estimated batch norm if there are few steps.

    Given settings don't change. Neither do the original data sets, whose studies have figures, and published sampling.
    The first configuration decides the number of epochs of all.
    """
    free = [each.data.dataset not in FIRST_DATASETS and each.data.sampling == "standard" for each in configs]
    if not any(free):
        return list(configs)
    first = configs[free.index(True)]
    steps = batch_count(len(load(first.data).train), first.optimiser.batch_size)
    epochs = min(max(-(-MANY_STEPS // steps), first.schedule.epochs), MOST_EPOCHS)

    def settled(config: TrainConfig) -> TrainConfig:
        config = with_default(config, "schedule", "epochs", epochs)
        few = config.schedule.epochs * steps < MANY_STEPS
        return with_default(config, "evaluation", "batch_norm_images", BATCH_NORM_IMAGES if few else 0)

    found = [settled(each) if may else each for each, may in zip(configs, free, strict=True)]
    if found != list(configs):
        now = found[free.index(True)]
        frozen = norms_are_frozen(now.optimiser, now.schedule.epochs)
        images = 0 if frozen else now.evaluation.batch_norm_images
        estimated = f", evaluated with batch norm estimated from training images, {images:,} at most"
        length = f"Epochs: {now.schedule.epochs}, of {steps} steps each{estimated if images else ''}"
        message(f"{length} (docs/few-images.md).")
    return found


def with_default(config: TrainConfig, group: str, name: str, value: int | str) -> TrainConfig:
    """Return a configuration with a setting at a value, unless the user gave the setting."""
    given = name in getattr(config, group).model_fields_set
    return config if given else config.updated(group, **{name: value})


def in_words(metrics: Mapping[str, float], dataset: Dataset) -> list[str]:
    """Describe the test accuracy of a training with its interval, and what makes it void or uncertain."""
    accuracy, test, validation = metrics["selected/test_accuracy"], dataset.test, dataset.validation
    interval = wilson(round(accuracy * len(test)), len(test)).text(percent)
    about = f"{percent(accuracy)} of the {len(test):,} test images are right"
    found = [f"{about} [{interval}, 95 % interval over images]."]
    few_to_select = validation is not None and len(validation) < FEW_TO_SELECT
    if validation is not None and few_to_select:
        chosen = f"{len(validation)} validation images selected epoch {metrics['selected/epoch']:.0f}"
        found.append(f"{chosen}: too few to tell epochs apart. Add images, or set data.validation_fraction=0.")
    chance = np.bincount(test.labels.numpy()).max() / len(test)
    if is_near_chance(accuracy, chance, len(test)):
        few = accuracy >= chance + NEAR_CHANCE  # so only their number makes it possible
        about = "These images are too few to tell the two apart." if few else "It has learned next to nothing."
        always = f"always naming the most frequent class gives {percent(chance)}"
        advice = "" if few_to_select else " Train for more epochs."
        found.append(f"The network is near chance level: {always}. {about}{advice}")
    return found
