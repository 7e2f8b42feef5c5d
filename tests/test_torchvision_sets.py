"""torchvision's data sets by name: small ones in their file formats, read by torchvision's classes."""

from __future__ import annotations

import gzip
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from effv2.config.schema import DATASETS, DataConfig
from effv2.core.errors import InputError
from effv2.data.dataset import Dataset, load_dataset
from effv2.data.torchvision_sets import SETS

random = np.random.default_rng(0)
COUNT = 20  # images per part


def pixels(*shape: int) -> np.ndarray:
    return random.integers(0, 256, (COUNT, *shape), np.uint8)


def jpeg(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(9, 7, 3)[0]).save(path)


def kmnist(root: Path, _: pytest.MonkeyPatch) -> None:
    raw = root / "KMNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        images = struct.pack(">4I", 2051, COUNT, 28, 28) + pixels(28, 28).tobytes()
        labels = struct.pack(">2I", 2049, COUNT) + bytes(index % 10 for index in range(COUNT))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(labels)


def cifar10(root: Path, patch: pytest.MonkeyPatch) -> None:
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    batch = {"data": pixels(3072), "labels": [index % 3 for index in range(COUNT)]}
    (folder / "data_batch_1").write_bytes(pickle.dumps(batch))
    (folder / "test_batch").write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["plane", "car", "bird"]}))
    patch.setattr(datasets.CIFAR10, "train_list", [["data_batch_1", None]])
    patch.setattr(datasets.CIFAR10, "test_list", [["test_batch", None]])
    patch.setitem(datasets.CIFAR10.meta, "md5", None)


def stl10(root: Path, patch: pytest.MonkeyPatch) -> None:
    folder = root / "stl10_binary"
    folder.mkdir()
    for part in ("train", "test"):
        (folder / f"{part}_X.bin").write_bytes(pixels(3, 96, 96).tobytes())
        (folder / f"{part}_y.bin").write_bytes(bytes(1 + index % 2 for index in range(COUNT)))
    (folder / "class_names.txt").write_text("airplane\nbird\n")
    patch.setattr(datasets.STL10, "_check_integrity", lambda _: True)


def oxford_pets(root: Path, _: pytest.MonkeyPatch) -> None:
    notes = root / "oxford-iiit-pet" / "annotations"
    notes.mkdir(parents=True)
    names = [f"{('Bengal', 'great_pyrenees')[index % 2]}_{index}" for index in range(COUNT)]
    for name in names:
        jpeg(root / "oxford-iiit-pet" / "images" / f"{name}.jpg")
    lines = [f"{name} {1 + index % 2} 1 1\n" for index, name in enumerate(names)]
    (notes / "trainval.txt").write_text("".join(lines[:14]))
    (notes / "test.txt").write_text("".join(lines[14:]))


def dtd(root: Path, _: pytest.MonkeyPatch) -> None:
    labels = root / "dtd" / "dtd" / "labels"
    labels.mkdir(parents=True)
    for part in ("train", "val", "test"):
        names = [f"{('banded', 'dotted')[index % 2]}/{part}_{index}.jpg" for index in range(COUNT)]
        for name in names:
            jpeg(root / "dtd" / "dtd" / "images" / name)
        (labels / f"{part}1.txt").write_text("\n".join(names))


def eurosat(root: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(SETS, "eurosat", SETS["eurosat"]._replace(images=COUNT))
    for index in range(COUNT):
        jpeg(root / "eurosat" / "2750" / ("Forest", "River")[index % 2] / f"{index}.jpg")


@pytest.mark.parametrize("make", [kmnist, cifar10, stl10, oxford_pets, dtd, eurosat])
def test_a_set_is_read_by_its_name(
    make: Callable[[Path, pytest.MonkeyPatch], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make(tmp_path, monkeypatch)
    name = make.__name__

    def load(**more: Any) -> Dataset:
        return load_dataset(DataConfig(dataset=name, dir=str(tmp_path), image_size=8, **more))

    data = load(validation_fraction=0)
    parts = SETS[name]
    assert len(data.train) + len(data.test) == (COUNT if name in ("oxford_pets", "eurosat") else 2 * COUNT)
    assert (load().validation is not None) and ("validation" not in parts.arguments or len(load().train) == COUNT)
    # Compare with the image and label that torchvision's class gives at this position.
    kind = getattr(datasets, parts.name)
    found = kind(tmp_path, **parts.arguments["train"])
    image, label = found[0]
    assert data.classes[data.train.labels[0]] == found.classes[label]
    wanted = np.asarray(image.convert("RGB").resize((8, 8), Image.Resampling.BILINEAR))
    assert name == "eurosat" or np.array_equal(data.train.images(torch.tensor([0]))[0].permute(1, 2, 0), wanted)


def test_a_set_without_all_its_images_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision takes EuroSAT's folder as complete, also after a killed download."""
    eurosat(tmp_path, monkeypatch)
    (tmp_path / "eurosat" / "2750" / "Forest" / "0.jpg").unlink()
    with pytest.raises(InputError, match=f"it has {COUNT - 1} of {COUNT} images; remove it first"):
        DATASETS["eurosat"](DataConfig(dataset="eurosat", dir=str(tmp_path)))


def test_a_missing_set_is_named(tmp_path: Path) -> None:
    for name, parts in SETS.items():
        with pytest.raises(InputError, match=rf"{parts.name} can't be read there") as caught:
            DATASETS[name](DataConfig(dataset=name, dir=str(tmp_path)))
        assert f"torchvision.datasets.{parts.name} needs, or data.download" in str(caught.value)
    (tmp_path / "FashionMNIST" / "raw").mkdir(parents=True)
    (tmp_path / "FashionMNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(gzip.compress(b"broken"))
    with pytest.raises(InputError, match="FashionMNIST can't be read there"):
        DATASETS["fashion_mnist"](DataConfig(dataset="fashion_mnist", dir=str(tmp_path)))


@pytest.mark.parametrize("name", ["train_dir", "test_dir", "labels"])
def test_a_set_has_parts_and_labels_of_its_own(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=rf"data.{name} .*'cifar10' has its own parts and labels"):
        DATASETS["cifar10"](DataConfig.model_validate({"dataset": "cifar10", name: str(tmp_path)}))
