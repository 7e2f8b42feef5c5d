"""Sampling, splits and the cache, on trees written here and on the real sets."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
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
from effv2.data.dataset import Dataset, load_dataset, stratified_split
from effv2.data.hashes import image_hashes
from effv2.data.images import LabelledImages, Square, decode, sha256_of
from tests.conftest import make_image_tree


def ids(dataset: Dataset) -> dict[str, set[str]]:
    return {name: set(split.ids) for name, split in dataset.splits.items()}


def load_folder(root: Path, **values: Any) -> Dataset:
    return load_dataset(DataConfig(dataset="folder", dir=str(root), image_size=8, **values))


def mode_of(path: Path) -> str:
    with Image.open(path) as image:
        return image.mode


def files_in(folder: Path) -> LabelledImages:
    paths = sorted(folder.rglob("*.*"))
    return LabelledImages.of_files(paths, [0] * len(paths), [path.name for path in paths])


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EFFV2_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


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


def test_per_class_and_seed_change_training_alone() -> None:
    whole = ids(load_dataset(DataConfig(image_size=8)))
    few = ids(load_dataset(DataConfig(image_size=8, per_class=20)))
    assert few["test"] == whole["test"] and few["validation"] == whole["validation"]
    assert len(few["train"]) == 200 and few["train"] < whole["train"]
    digests = [load_dataset(DataConfig(image_size=8, per_class=n)).test.digest for n in (0, 20)]
    assert digests[0] == digests[1]  # whatever else was decoded beside it
    other = ids(load_dataset(DataConfig(image_size=8, split_seed=1)))
    assert other["test"] != whole["test"]
    for parts in (whole, few, other):
        assert not (parts["train"] & parts["test"] or parts["train"] & parts["validation"])


@pytest.mark.parametrize("name", ["folder", "birds"])
def test_published_rule_by_hand(tmp_path: Path, name: Any) -> None:
    """What isn't RGB is dropped before the split, of birds after it, as in the post's notebooks."""
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


def test_folder_with_all_three_parts_and_with_none(tmp_path: Path) -> None:
    three = make_image_tree(tmp_path / "three", ("train", "val", "test"))
    dataset = load_folder(three)
    assert {name: len(split) for name, split in dataset.splits.items()} == {"train": 18, "validation": 18, "test": 18}
    assert all(id_.startswith("val/") for id_ in dataset.splits["validation"].ids)
    flat = make_image_tree(tmp_path / "flat", images=10)
    dataset = load_folder(flat)
    assert {name: len(split) for name, split in dataset.splits.items()} == {"train": 21, "validation": 3, "test": 6}
    assert dataset.classes == ("class 0", "class 1", "class 2")


def test_decoding_is_pillows_in_every_mode(tmp_path: Path, own_cache: Path) -> None:
    root = make_image_tree(tmp_path / "set")
    images = files_in(root)
    decoded = decode(images, Square(8))
    for path, pixels, rgb in zip(images.items, decoded.pixels, decoded.rgb, strict=True):
        with Image.open(path) as image:
            assert np.array_equal(pixels, np.asarray(image.convert("RGB").resize((8, 8), Image.Resampling.BILINEAR)))
            assert rgb == (image.mode == "RGB")


def test_second_start_decodes_nothing_and_an_edit_is_seen(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = files_in(make_image_tree(tmp_path / "set"))
    first = decode(images, Square(8))
    copy = files_in(make_image_tree(tmp_path / "copy"))
    with monkeypatch.context() as patch:
        patch.setattr(LabelledImages, "open", lambda *_: pytest.fail("decoded again"))
        assert np.array_equal(decode(images, Square(8)).pixels, first.pixels)
        assert np.array_equal(decode(copy, Square(8)).pixels, first.pixels)  # found by content, wherever it lies
    Image.new("RGB", (9, 9), "red").save(images.items[0])
    assert not np.array_equal(decode(images, Square(8)).pixels, first.pixels)


def test_second_start_hashes_no_pixels(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_image_tree(tmp_path / "set")
    config = DataConfig(dataset="folder", dir=str(root), image_size=8)
    first = load_dataset(config)
    plain = [hashlib.sha256(image.data).digest() for image in first.train.pixels.numpy()]
    assert first.train.image_hashes == [plain[row] for row in first.train.rows]
    monkeypatch.setattr("effv2.data.images.sha256_of", lambda array: pytest.fail("hashed again"))
    monkeypatch.setattr("effv2.data.hashes.hashlib", None)
    assert load_dataset(config).train.image_hashes == first.train.image_hashes


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "no index", "wrong index", "stamp"])
def test_damaged_entry_is_rebuilt(tmp_path: Path, own_cache: Path, damage: str) -> None:
    images = files_in(make_image_tree(tmp_path / "set"))
    decoded = decode(images, Square(8))
    first, hashes = np.array(decoded.pixels), image_hashes(decoded.pixels)
    (pixels,) = own_cache.rglob("pixels.npy")
    if damage == "flip":
        content = bytearray(pixels.read_bytes())
        content[-1] ^= 1
        pixels.write_bytes(content)
    elif damage == "truncate":
        pixels.write_bytes(pixels.read_bytes()[:-10])
    elif damage == "empty":
        pixels.write_bytes(b"")
    elif damage == "stamp":
        for stamp in (own_cache / "stamps").iterdir():
            stamp.write_bytes(b"\xff../..")
    elif damage == "wrong index":
        pixels.with_name("index.json").write_text("{}")
    else:
        pixels.with_name("index.json").unlink()
    again = decode(images, Square(8)).pixels
    assert np.array_equal(again, first) and np.array_equal(image_hashes(again), hashes)
    assert json.loads(pixels.with_name("index.json").read_text())["sha256"] == sha256_of(first)


def test_processes_that_build_at_once_agree(tmp_path: Path, own_cache: Path) -> None:
    root = make_image_tree(tmp_path / "set", images=40)
    script = (
        "import sys; from pathlib import Path; from effv2.data.images import LabelledImages, Square, decode\n"
        "paths = sorted(Path(sys.argv[1]).rglob('*.*'))\n"
        "print(decode(LabelledImages.of_files(paths, [0] * len(paths), paths), Square(8)).sha256)"
    )
    command = [sys.executable, "-c", script, str(root)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    digests = {process.communicate(timeout=120)[0] for process in running}
    assert len(digests) == 1 and all(process.returncode == 0 for process in running)
    (entry,) = (own_cache / "entries").iterdir()
    (tmp_path / "as usual").mkdir()
    assert entry.stat().st_mode == (tmp_path / "as usual").stat().st_mode  # other users may read it


def test_broken_images_are_named_all_at_once(tmp_path: Path, own_cache: Path) -> None:
    root = make_image_tree(tmp_path / "set")
    (root / "class 0" / "0.jpg").write_bytes(b"no image")
    whole = (root / "class 1" / "0.jpg").read_bytes()
    (root / "class 1" / "0.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"2 images.*class 0/0\.jpg.*class 1/0\.jpg"):
        load_folder(root)
    assert not list(own_cache.rglob("pixels.npy"))


def test_a_file_that_can_not_be_read_is_named_beside_decoded_ones(tmp_path: Path, own_cache: Path) -> None:
    root = make_image_tree(tmp_path / "set")
    load_folder(root)
    (root / "class 0" / "9.jpg").symlink_to(tmp_path / "nowhere.jpg")
    for _ in range(2):
        with pytest.raises(InputError, match=r"1 images.*class 0/9\.jpg"):
            load_folder(root)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda root: root / "nowhere", "no such folder"),
        (lambda root: (root / "empty").mkdir() or root / "empty", "holds 0 class folders"),
        (lambda root: (root / "class 3").mkdir() or root, r"class 3 holds no images"),
        (lambda root: Path(), "needs a folder"),
    ],
)
def test_wrong_folders_are_explained(tmp_path: Path, change: object, words: str) -> None:
    folder = change(make_image_tree(tmp_path / "set"))  # type: ignore[operator]
    text = "" if folder == Path() else str(folder)
    with pytest.raises(InputError, match=rf"data\.dir.*{words}"):
        load_dataset(DataConfig(dataset="folder", dir=text, image_size=8))


def test_parts_are_found_whatever_their_case(tmp_path: Path) -> None:
    root = make_image_tree(tmp_path / "set", ("Training_Set", "TEST"))
    dataset = load_folder(root)
    assert len(dataset.test) == 18 and dataset.classes == ("class 0", "class 1", "class 2")


def test_cache_that_can_not_be_written_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EFFV2_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"EFFV2_CACHE .*file: can't be written"):
        load_dataset(DataConfig(image_size=8))


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
    assert dataset.test.images_also_in(dataset.train) == 0
    (root / "test" / "class 0" / "0.jpg").write_bytes((root / "train" / "class 0" / "4.jpg").read_bytes())
    dataset = load_folder(root, validation_fraction=0)
    assert dataset.test.images_also_in(dataset.train) == 1


def test_class_with_too_few_images_is_named(tmp_path: Path) -> None:
    root = make_image_tree(tmp_path / "set", images=6)
    for index in range(5):
        next((root / "class 1").glob(f"{index}.*")).unlink()
    with pytest.raises(InputError, match="'class 1' has only 1 images"):
        load_folder(root)
    with pytest.raises(InputError, match=r"data\.per_class 500: the class"):
        load_dataset(DataConfig(image_size=8, per_class=500))


def test_what_is_no_part_beside_a_training_part_is_named(tmp_path: Path) -> None:
    for other in ("dev", "bus"):  # another name for validation; a class beside one called train
        root = make_image_tree(tmp_path / other, ("train", other))
        (root / "mlruns" / "1").mkdir(parents=True)  # what a command in that folder leaves there
        with pytest.raises(InputError, match=f"train is the training part by its name, but {other} beside it is no"):
            load_folder(root)
        (root / other).rename(root / "val")
        assert load_folder(root).classes == ("class 0", "class 1", "class 2")


def test_different_classes_in_train_and_test_are_named(tmp_path: Path) -> None:
    root = make_image_tree(tmp_path / "set", ("train", "test"))
    (root / "test" / "class 2").rename(root / "test" / "class 9")
    with pytest.raises(InputError, match=r"different classes \(class 2, class 9\)"):
        load_folder(root)


@pytest.mark.parametrize("place", ["loop", "class 0/loop", "class 0/deeper/loop"])
def test_links_to_a_folder_around_them_are_refused(tmp_path: Path, place: str) -> None:
    root = make_image_tree(tmp_path / "set")
    (root / place).parent.mkdir(exist_ok=True)
    (root / place).symlink_to(root, target_is_directory=True)
    with pytest.raises(InputError, match=r"loop can't be read .*symbolic links.*; fix or remove it"):
        load_folder(root)


def test_links_to_folders_are_not_followed(tmp_path: Path) -> None:
    root = make_image_tree(tmp_path / "set")
    (root / "class 0" / "link").symlink_to(root / "class 1", target_is_directory=True)
    dataset = load_folder(root)
    assert sum(map(len, dataset.splits.values())) == 18


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
