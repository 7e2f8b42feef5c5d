"""Sampling, splits and batches, on trees written here and on the real sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.model_selection import train_test_split

from effv2.config.schema import DataConfig
from effv2.core.errors import InputError
from effv2.data.batches import NORMALISATIONS, batch_count, epoch_order, normalised, training_batches
from effv2.data.dataset import Dataset, Split, load_dataset, stratified_split
from tests.conftest import load_folder, make_image_tree


def ids(dataset: Dataset) -> dict[str, set[str]]:
    return {name: set(split.ids) for name, split in dataset.splits.items()}


def mode_of(path: Path) -> str:
    with Image.open(path) as image:
        return image.mode


@given(st.lists(st.integers(2, 30), min_size=2, max_size=6), st.floats(0.01, 0.9), st.integers(0, 100), st.randoms())
def test_stratified_split_partitions_every_class(
    counts: list[int], fraction: float, seed: int, shuffler: st.DataObject
) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    shuffler.shuffle(labels)  # type: ignore[attr-defined]
    classes = tuple(map(str, range(len(counts))))
    kept, held = stratified_split(labels, fraction, classes, seed, "test")
    assert sorted([*kept, *held]) == list(range(len(labels)))
    for label, count in enumerate(counts):
        taken = int((labels[held] == label).sum())
        assert 1 <= taken < count and abs(taken - fraction * count) <= 1
    again = stratified_split(labels, fraction, classes, seed, "test")
    assert all(np.array_equal(a, b) for a, b in zip((kept, held), again, strict=True))


def test_per_class_and_seed_change_only_the_training_set() -> None:
    whole = ids(load_dataset(DataConfig(image_size=8)))
    few = ids(load_dataset(DataConfig(image_size=8, per_class=20)))
    assert few["test"] == whole["test"] and few["validation"] == whole["validation"]
    assert len(few["train"]) == 200 and few["train"] < whole["train"]
    digests = [load_dataset(DataConfig(image_size=8, per_class=n)).test.digest for n in (0, 20)]
    assert digests[0] == digests[1]  # though other images were decoded with it
    other = ids(load_dataset(DataConfig(image_size=8, split_seed=1)))
    assert other["test"] != whole["test"]
    for parts in (whole, few, other):
        assert not (parts["train"] & parts["test"] or parts["train"] & parts["validation"])


@pytest.mark.parametrize("name", ["folder", "birds"])
def test_published_rule_by_hand(tmp_path: Path, name: Any) -> None:
    """Images that aren't RGB are dropped before the split; with birds, after it. The post's notebooks do the same."""
    root = make_image_tree(tmp_path / "set", ("train", "test"), classes=3, images=12)
    config = DataConfig(
        dataset=name, dir=str(root), image_size=8, sampling="published", per_class=8,
        validation_fraction=0, split_seed=42,
    )  # fmt: skip
    first = [path for folder in sorted((root / "train").iterdir()) for path in sorted(folder.iterdir())[:8]]
    rgb = {f"train/{path.parent.name}/{path.name}": mode_of(path) == "RGB" for path in first}
    taken = [id_ for id_ in rgb if name == "birds" or rgb[id_]]
    train, test = (
        [id_ for id_ in part if rgb[id_]] for part in train_test_split(taken, test_size=0.2, random_state=42)
    )
    dataset = load_dataset(config)
    assert list(dataset.train.ids) == train and list(dataset.test.ids) == test
    assert dataset.validation is None


def test_published_sampling_without_rgb_images_is_explained(tmp_path: Path) -> None:
    values = {"dataset": "folder", "dir": str(tmp_path / "set"), "sampling": "published", "validation_fraction": 0}
    for path in make_image_tree(tmp_path / "set").rglob("*.*"):
        with Image.open(path) as image:
            grey = image.convert("L")
        grey.save(path)
    with pytest.raises(InputError, match="0 RGB images are left"):
        load_dataset(DataConfig.model_validate(values))


def test_images_shared_by_train_and_test_are_counted(tmp_path: Path) -> None:
    root = make_image_tree(tmp_path / "set", ("train", "test"))  # different images
    dataset = load_folder(root)
    assert not dataset.test.also_in(dataset.train)
    (root / "test" / "class 0" / "0.jpg").write_bytes((root / "train" / "class 0" / "4.jpg").read_bytes())
    dataset = load_folder(root, validation_fraction=0)
    assert dataset.test.also_in(dataset.train) == {"test/class 0/0.jpg": "train/class 0/4.jpg"}


def test_class_with_too_few_images_is_named(tmp_path: Path) -> None:
    root = make_image_tree(tmp_path / "set", images=6)
    for index in range(5):
        next((root / "class 1").glob(f"{index}.*")).unlink()
    with pytest.raises(InputError, match="'class 1' has only 1 images"):
        load_folder(root)
    with pytest.raises(InputError, match=r"data\.per_class 500: the class"):
        load_dataset(DataConfig(image_size=8, per_class=500))


def test_pixels_move_to_a_device_once_for_all_splits() -> None:
    data = load_dataset(DataConfig(per_class=20))
    moved = data.on(torch.device("meta"))
    assert moved.train.pixels is moved.test.pixels and data.bytes == data.train.pixels.nbytes
    batch = moved.train.images(torch.tensor([3, 1]))
    assert batch.device.type == "meta" and batch.shape == (2, 3, 32, 32)
    assert moved.train.labels.equal(data.train.labels) and data.train.pixels.device.type == "cpu"


def test_balanced_epochs_have_as_many_images_of_every_class() -> None:
    labels = torch.tensor([0] * 900 + [1] * 90 + [2] * 10)
    order = epoch_order(1000, 0, 1, labels)
    counts = labels[order].bincount()
    assert len(order) == 1000 and counts.sum() == 1000 and counts.min() > 280 and counts.max() < 390
    assert torch.equal(order, epoch_order(1000, 0, 1, labels)) and not torch.equal(
        order, epoch_order(1000, 0, 2, labels)
    )


def test_batches_hold_every_sample_once_in_channels_last() -> None:
    dataset = load_dataset(DataConfig(image_size=8))
    order = epoch_order(len(dataset.train), 0, 1)
    assert not torch.equal(order, epoch_order(len(dataset.train), 0, 2))
    labels = torch.cat([labels for _, labels in training_batches(dataset.train, order, 32)])
    assert torch.equal(labels, dataset.train.labels[order])
    images = dataset.test.images(torch.arange(7))
    inputs = normalised(images, NORMALISATIONS["none"], channels_last=True)
    assert inputs.is_contiguous(memory_format=torch.channels_last) and inputs.min() >= 0 and inputs.max() <= 1
    as_imagenet = normalised(images, NORMALISATIONS["imagenet"], channels_last=True)
    assert torch.allclose(as_imagenet[:, 0], (inputs[:, 0] - 0.485) / 0.229)
    assert (batch_count(64, 32), batch_count(65, 32), batch_count(66, 32)) == (2, 2, 3)


def test_batches_for_another_device_are_gathered_one_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, gathered = load_dataset(DataConfig(image_size=8)), list[int]()
    order, plain = epoch_order(len(dataset.train), 0, 1), Split.images
    wanted = list(training_batches(dataset.train, order, 100))

    def images(split: Split, positions: torch.Tensor) -> torch.Tensor:
        gathered.append(len(positions))
        return plain(split, positions)

    monkeypatch.setattr(Split, "images", images)
    found = training_batches(dataset.train, order, 100, torch.device("cuda"))
    for number, (batch, (images_wanted, labels_wanted)) in enumerate(zip(found, wanted, strict=True), 1):
        assert torch.equal(batch[0], images_wanted) and torch.equal(batch[1], labels_wanted)
        assert len(gathered) <= number + 1
    assert len(gathered) == len(wanted)
    assert not [*training_batches(dataset.train, order[:0], 100, torch.device("cuda"))]  # resumed at the end


@pytest.mark.parametrize(
    ("name", "folder", "per_class", "size", "counts"),
    [
        ("imagenette", "", 100, 32, (785, 197)),
        ("birds", "indian-birds", 100, 32, (800, 200)),
        ("mnist", "", 0, 28, (16_000, 2_000)),
    ],
)
def test_published_sampling_of_the_real_sets(
    real_data: Path, name: str, folder: str, per_class: int, size: int, counts: tuple[int, int]
) -> None:
    values = {"dataset": name, "dir": str(real_data / folder), "image_size": size, "per_class": per_class}
    rule = {"sampling": "published", "validation_fraction": 0, "split_seed": 42}
    dataset = load_dataset(DataConfig.model_validate(values | rule))
    assert (len(dataset.train), len(dataset.test)) == counts
    assert not set(dataset.train.ids) & set(dataset.test.ids)
    assert len(dataset.classes) == 10


@pytest.mark.slow
def test_published_imagenette_has_9296_rgb_images(real_data: Path) -> None:
    config = DataConfig(
        dataset="imagenette", dir=str(real_data), sampling="published", validation_fraction=0, split_seed=42
    )
    dataset = load_dataset(config)
    assert len(dataset.train) + len(dataset.test) == 9_296
