"""Sampling, splits and the cache, on trees written here and on the real sets."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import subprocess
import sys
import unicodedata
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from sklearn.model_selection import train_test_split

from effv2.config.schema import DataConfig
from effv2.core.errors import InputError
from effv2.data import decoder
from effv2.data.batches import NORMALISATIONS, batch_count, epoch_order, normalised, training_batches
from effv2.data.dataset import Dataset, Split, load_dataset, stratified_split
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
    assert digests[0] == digests[1]  # whatever else was decoded with it
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


def test_what_is_no_part_beside_a_training_part_is_named(tmp_path: Path) -> None:
    for other in ("dev", "bus"):  # another name for validation; a class beside one called train
        root = make_image_tree(tmp_path / other, ("train", other))
        (root / "mlruns" / "1").mkdir(parents=True)  # what a command in that folder leaves there
        with pytest.raises(InputError, match=f"train is the training part by its name, but {other} next to it is not"):
            load_folder(root)
        (root / other).rename(root / "val")
        assert load_folder(root).classes == ("class 0", "class 1", "class 2")


def test_forms_of_unicode_are_one_name(tmp_path: Path) -> None:
    """An archive of a Mac writes é as e and an accent."""
    one, two = (unicodedata.normalize(form, "Café") for form in ("NFC", "NFD"))
    make_image_tree(tmp_path, ("train", "test"))
    (tmp_path / "train" / "class 0").rename(tmp_path / "train" / two)
    (tmp_path / "test" / "class 0").rename(tmp_path / "test" / one)
    found = load_dataset(DataConfig(dataset="folder", dir=str(tmp_path), image_size=8))
    assert len(found.test) == 18 and sorted(found.test.labels.tolist()) == sorted([0, 1, 2] * 6)
    shutil.copytree(tmp_path / "test" / one, tmp_path / "train" / one)
    both = load_dataset(DataConfig(dataset="folder", dir=str(tmp_path), image_size=8))
    assert both.classes == found.classes and len(both.train) > len(found.train)


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
    ("broken", "said"),
    [("test/*/*", "no image of the test part can be read"), ("train/ant/*", "no training image of the class 'ant'")],
)
def test_what_is_skipped_may_not_be_all(tmp_path: Path, own_cache: Path, broken: str, said: str) -> None:
    root = write_tree(tmp_path / "set", "train/ant", "train/bee", "test/ant", "test/bee")
    for path in root.glob(broken):
        path.write_bytes(b"no image")
    with pytest.raises(InputError, match=said):
        load_folder(root, skip_broken=True, validation_fraction=0)


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
    assert not [*training_batches(dataset.train, order[:0], 100, torch.device("cuda"))]  # a training that resumes there


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


# Folders.


def write_tree(root: Path, *folders: str, images: int = 4) -> Path:
    """Write folders of small random images, each of other pixels; a name with a dot is that of a text."""
    generator = np.random.default_rng(1)
    for name in folders:
        if name.endswith((".txt", ".csv")):
            (root / name).write_text("text")
            continue
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(images):
            pixels = generator.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{Path(name).name}{number}.png")
    return root


def within(*parts: str) -> tuple[str, ...]:
    return tuple(f"{part}/{name}" for part in parts for name in ("ant", "bee", "cow"))


@pytest.mark.parametrize(
    ("folders", "tests"),
    [
        (within("seg_train/seg_train", "seg_test/seg_test"), "seg_test/seg_test/"),
        (within("Training Data", "Testing Data"), "Testing Data/"),
        (within("Train_Set_Folder", "Test_Set_Folder"), "Test_Set_Folder/"),
        (within("TrainSet", "ValidationSet", "TestSet"), "TestSet/"),
        (within("train1", "test-1"), "test-1/"),
        (within("birds_train", "birds_test"), "birds_test/"),
        (within("archive/data/train", "archive/data/val"), "archive/data/val/"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_parts_are_known_in_all_usual_spellings(tmp_path: Path, folders: tuple[str, ...], tests: str) -> None:
    dataset = load_folder(write_tree(tmp_path / "set", *folders))
    assert dataset.classes == ("ant", "bee", "cow") and len(dataset.test) == 12
    assert all(id_.startswith(tests) for id_ in dataset.test.ids)


@pytest.mark.parametrize(
    ("folders", "said"),
    [
        (("train", "test"), r"no class folders in test and train \(parts by name\); give a CSV of labels"),
        (("ant", "bee", "test"), r"no class folders in test \(parts by name\); .*data.train_dir . if all"),
        (("trainA", "trainB", "testA", "testB"), "are versions or pieces of one set by their names"),
        (("photos_part_1", "photos_part_2"), "are versions or pieces of one set by their names"),
        (("fold1", "fold2", "fold3"), "are versions or pieces of one set by their names"),
        (("image", "label"), "are versions or pieces of one set by their names"),
        (("JPEGImages", "SegmentationClass"), "are versions or pieces of one set by their names"),
        ((*within("train"), "test"), "test next to train holds no class folders; .*data.train_dir"),
        ((*within("train"), "val/images"), "val next to train holds no class folders"),
        (within("train", "val", "valid"), "val and valid are both the validation part"),
        (within("train", "Train", "test"), "Train and train are both the train part"),
        (within("train1", "train2"), "train1 and train2 are both the train part"),
        (within("color", "grayscale", "segmented"), r"color, grayscale and segmented hold the same folders \(ant, bee"),
        (within("128", "256"), "128 and 256 hold the same folders"),
        (("original", "resized"), "original and resized are versions or pieces of one set by their names"),
        (within("val", "test"), "holds a part for testing but none named train"),
        (within("test"), "holds a part for testing but none named train"),
        (within("set/train", "other"), "set in it is a data set of its own"),
        (("ant/train", "ant/test", "bee/train", "bee/test"), "each class in it holds parts .*, as test/ant"),
        (
            within("fold_1/train", "fold_1/val", "fold_2/train", "fold_2/val"),
            r"fold_1 and fold_2 hold the same folders",
        ),
        (("ant/images", "ant/masks", "bee"), r"ant in it holds images and their masks"),
        (("Ant", "ant", "bee"), "the classes 'Ant' and 'ant' look like two spellings of one name"),
        (("ant_hill", "ant hill", "bee"), "'ant hill' and 'ant_hill' look like two spellings"),
        (("1", "01", "2"), "'01' and '1' look like two spellings"),
        (("ant", "ant - Copy (2)", "bee"), "'ant' and 'ant - Copy .2.' look like two spellings"),
        (("logs", "planks"), r"holds 1 class folders \(not counting logs, which"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value[::3]),
)
def test_layouts_that_may_be_read_in_two_ways_are_refused(tmp_path: Path, folders: tuple[str, ...], said: str) -> None:
    with pytest.raises(InputError, match=said):
        load_folder(write_tree(tmp_path / "set", *folders))


def test_what_is_no_class_is_left_out_and_counted(tmp_path: Path, own_cache: Path) -> None:
    noise = (
        "@eaDir/ant",
        "ant/@eaDir/ant1.png",
        "bee/thumbs",
        "mlruns/0/models",
        "checkpoints/x",
        ".ipynb_checkpoints/y",
    )
    root = write_tree(tmp_path / "set", "ant", "bee", *noise, "ant/notes.txt", "ant/README.txt")
    for name in ("ant/clip.mp4", "ant/page.pdf", "bee/LICENSE", "bee/drawing.eps"):
        (root / name).write_bytes(b"%!PS")
    (root / "cow").symlink_to(root / "gone")
    (root / "more.zip").touch()
    (root / "ant" / "ant0.png").rename(root / "beside.png")
    (root / "ant" / "ant1.png").rename(root / "ant" / "0f3a9c")  # without an extension
    Image.new("L", (9, 9)).save(root / "ant" / "ant2_mask.png")
    for number, ending in enumerate(("jfif", "jpe", "tga", "pnm")):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(root / "bee" / f"x.{ending}")
    dataset = load_folder(root)
    assert dataset.classes == ("ant", "bee") and sum(map(len, dataset.splits.values())) == 3 + 4 + 4
    assert dataset.left_out == {
        ".txt files": 2, ".mp4 files": 1, ".pdf files": 1, ".eps files": 1, "files without an extension": 1,
        "images outside the class folders": 1, "images in folders @eaDir": 8, "images in folders thumbs": 4,
        "images in folders mlruns": 4, "images in folders checkpoints": 4, "images in folders .ipynb_checkpoints": 4,
        "broken links": 1, ".zip files": 1, "masks of images": 1,
    }  # fmt: skip
    assert ".mp4 files (1)" in dataset.notes[0]


def test_a_part_of_a_set_may_be_named(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "set", *within("one", "two"))
    dataset = load_folder(root, train_dir="one", test_dir=str(root / "two"))
    assert len(dataset.test) == 12 and dataset.test.ids[0] == "test/ant/ant0.png"
    assert len(load_folder(root, train_dir=".").classes) == 2  # one and two are the classes
    wrong: dict[str, dict[str, str]] = {
        "data.test_dir two: names the test part": {"test_dir": "two"},
        "data.train_dir three: no such folder": {"train_dir": "three"},
        "one part is inside the other": {"train_dir": ".", "test_dir": "two"},
    }
    for said, values in wrong.items():
        with pytest.raises(InputError, match=said):
            load_folder(root, **values)
    with pytest.raises(InputError, match="has its own parts"):
        load_dataset(DataConfig(train_dir="one"))


@pytest.mark.parametrize(
    ("table", "values"),
    [
        ("image_id,species\n{}", "train{},{}"),
        ("Label;File Name\n{}", "{1};train/train{0}.png"),
        ("\ufeffid\tbreed\tage\n{}", "train{}.png\t{}\t3"),
    ],
)
def test_labels_come_from_a_csv(tmp_path: Path, table: str, values: str) -> None:
    root = write_tree(tmp_path / "set", "train", "test", images=8)
    rows = "\n".join(values.format(number, "ab"[number % 2]) for number in range(7))
    (root / "labels.csv").write_text(table.format(rows), encoding="utf-8")
    dataset = load_folder(root, labels="labels.csv")
    found = {id_: dataset.classes[label] for split in dataset.splits.values()
             for id_, label in zip(split.ids, split.labels.tolist(), strict=True)}  # fmt: skip
    assert found == {f"train/train{number}.png": "ab"[number % 2] for number in range(7)}
    assert dataset.left_out == {"images without a label": 9}
    with pytest.raises(InputError, match=r"train and test hold different classes \(a, b\)"):
        load_folder(root, labels="labels.csv", train_dir="train", test_dir="test")


def test_lines_of_a_table_without_a_label_and_those_against_a_folder_are_counted(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "set", "ant", "bee")
    lines = [f"{name}{number}.png,{name}" for name in ("ant", "bee") for number in range(3)]
    (root / "labels.csv").write_text("\n".join(["file,label", *lines, "ant3.png,bee", "bee3.png,NaN", ","]))
    dataset = load_folder(root, labels="labels.csv")
    assert dataset.classes == ("ant", "bee")
    assert dataset.left_out == {
        "rows without a label": 1, "images without a label": 1, "folder names that differ from the table's labels": 1
    }  # fmt: skip


def test_a_table_may_be_written_with_other_forms_of_unicode_and_bars(tmp_path: Path) -> None:
    root, forms = tmp_path / "set", [unicodedata.normalize(form, "Café") for form in ("NFC", "NFD")]
    root.mkdir()
    for number in range(6):
        Image.new("RGB", (9, 9), (40 * number, 9, 9)).save(root / f"{forms[number % 2]}{number}.png")
    rows = [f"{forms[0]}{number}|{[*forms, 'ant'][number % 3]}" for number in range(6)]
    (root / "labels.csv").write_text("\n".join(["file|class|part", *(f"{row}|wing" for row in rows)]), encoding="utf-8")
    assert load_folder(root, labels="labels.csv", validation_fraction=0).classes == (forms[0], "ant")


def test_labels_of_a_part_are_for_its_images_alone(tmp_path: Path) -> None:
    """Both parts hold files of the same names."""
    root = tmp_path / "set"
    for part in ("train", "val"):
        for number in range(6):
            folder = root / part
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 9), (40 * number, 9, 9)).save(folder / f"{number}.png")
    rows = {part: [f"{part}/{number}.png,{'ab'[number % 2]}" for number in range(6)] for part in ("train", "val")}

    def labels(*lines: str) -> DataConfig:
        (root / "labels.csv").write_text("\n".join(["file,label", *lines]))
        return DataConfig(dataset="folder", dir=str(root), labels="labels.csv", image_size=8, validation_fraction=0)

    both = load_dataset(labels(*rows["train"], *rows["val"]))
    assert [id_.partition("/")[0] for id_ in (*both.train.ids, *both.test.ids)] == ["train"] * 6 + ["val"] * 6
    with pytest.raises(InputError, match=r"labels no training image; give the folder that it labels as data.train_dir"):
        load_dataset(labels(*rows["val"]))
    lines = [f"{number}.png,{'ab'[number % 2]}" for number in range(6)]
    with pytest.raises(InputError, match=r"may be .*, or give only the folder that it labels as data.train_dir"):
        load_dataset(labels(*lines))
    (root / "labels.csv").write_text(
        "\n".join(["file,label,split", *(f"{line},{part}" for part in ("train", "val") for line in lines)])
    )
    split = load_dataset(
        DataConfig(dataset="folder", dir=str(root), labels="labels.csv", image_size=8, validation_fraction=0)
    )
    assert (split.train.ids, split.test.ids) == (both.train.ids, both.test.ids)
    with pytest.raises(InputError, match="a label holds a line break"):
        load_dataset(labels('train/0.png,"a', "train/1.png,b"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", r"doesn't name a column of files and one of labels \(it is empty\)"),
        (b"a,b\n1,2\n", r"doesn't name a column .*\(a, b\); name them file and label"),
        (b"file,label\nnone.png,a\nx0,b\n", r"1 of its files don't exist as images \(none.png\)"),
        (b"file,label\nx0,a\nx0.png,b\n", "x0.png has the labels a and b"),
        (b"file,label\ny0.png,a\n", "y0.png may be .*write it with its folder"),
        (b"file,label\n\xff,a\n", "it is not a CSV in UTF-8"),
        (b"file,class,species\nx0,a,c\nx1,a,d\n", "its columns class and species hold different labels; name only the"),
        (b"file,label,Label\nx0,a,c\nx1,a,d\n", "its columns label and Label hold different labels"),
        (
            b"file,label,split\nx0,a,train\nx1,b,dev\n",
            r"its column split names no part in 1 lines \(dev\); write train",
        ),
        (None, "no such file"),
    ],
)
def test_wrong_tables_of_labels_are_explained(tmp_path: Path, content: bytes | None, said: str) -> None:
    root = write_tree(tmp_path / "set", "x", "one/y", "two/y")
    if content is not None:
        (root / "labels.csv").write_bytes(content)
    with pytest.raises(InputError, match=rf"data\.labels .*labels\.csv: .*{said}"):
        load_folder(root, labels="labels.csv")


def test_classes_that_lack_images_are_refused_unless_allowed(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "set", *within("train"), "test/ant", "test/bee")
    write_tree(root, "train/dog", images=1)
    (root / "train" / "empty").mkdir()
    with pytest.raises(InputError, match=r"different classes \(cow, dog, empty\); .*data.allow_incomplete_classes"):
        load_folder(root)
    dataset = load_folder(root, allow_incomplete_classes=True, per_class=2)
    assert dataset.classes == ("ant", "bee", "cow", "dog")
    assert {name: len(split) for name, split in dataset.splits.items()} == {"train": 7, "validation": 3, "test": 8}
    assert dataset.left_out["classes that test lacks, such as cow"] == 2


def test_broken_images_are_skipped_where_that_is_wanted(tmp_path: Path, own_cache: Path) -> None:
    root = write_tree(tmp_path / "set", *within("train", "test"))
    (root / "train" / "ant" / "ant1.png").write_bytes(b"no image")
    (root / "test" / "cow" / "cow0.png").write_bytes((root / "train" / "bee" / "bee0.png").read_bytes())
    for _ in range(2):  # the second time from the cache
        dataset = load_folder(root, skip_broken=True, validation_fraction=0)
        assert len(dataset.train) == 11 and dataset.broken == {"train/ant/ant1.png": "UnidentifiedImageError"}
        assert dataset.notes[0] == "Left out because they can't be read: 1 images, such as train/ant/ant1.png."
        assert dataset.notes[1].endswith("as images of train: test/cow/cow0.png is train/bee/bee0.png.")
        with pytest.raises(InputError, match=r"1 images can't be read .*ant1.*or give data\.skip_broken"):
            load_folder(root)


# Pixels.


def test_sound_files_of_many_pixels_and_with_long_texts_are_taken(tmp_path: Path, own_cache: Path) -> None:
    root = write_tree(tmp_path / "set", "ant", "bee")
    text = PngInfo()
    text.add_text("history", "a" * 3_000_000, zip=True)
    Image.new("RGB", (1500, 1000)).save(root / "ant" / "long.png", pnginfo=text)
    assert sum(map(len, load_folder(root).splits.values())) == 9
    with pytest.raises(InputError, match=r"long.png \(more than 1 megapixels\)\); raise data.max_megapixels"):
        load_folder(root, max_megapixels=1)
    assert len(load_folder(root, max_megapixels=1, skip_broken=True).broken) == 1
    assert DataConfig().max_megapixels == decoder.MEGAPIXELS


@pytest.mark.parametrize("orientation", range(1, 10))
@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "webp"])
def test_images_are_brought_upright(tmp_path: Path, orientation: int, ending: str) -> None:
    corners = Image.fromarray(np.arange(0, 256, 16, dtype=np.uint8).reshape(4, 4)).resize((40, 32), 0).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    corners.save(tmp_path / f"x.{ending}", exif=exif, quality=100)
    with decoder.open_image(tmp_path / f"x.{ending}") as image:
        ours = decoder.to_rgb(image)
    with Image.open(tmp_path / f"x.{ending}") as image:
        theirs = ImageOps.exif_transpose(image).convert("RGB")
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    assert ours.size == ((40, 32) if orientation in (1, 2, 3, 4, 9) else (32, 40))


def icon(mode: str, colour: int, folder: Path) -> Path:
    """Write an image that is transparent except for a square of a grey in its middle."""
    image = Image.new("RGBA", (9, 9), (colour, colour, colour, 0))
    image.paste((colour, colour, colour, 255), (3, 3, 6, 6))
    more: dict[str, Any] = {}
    if mode in ("L", "RGB"):  # a colour that stands for transparency
        more["transparency"] = 77 if mode == "L" else (77, 77, 77)
        image = Image.composite(image, Image.new("RGBA", (9, 9), (77, 77, 77)), image.getchannel("A"))
    image.convert(mode).save(folder / "icon.png", **more)
    return folder / "icon.png"


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
@pytest.mark.parametrize(("colour", "background"), [(0, 255), (100, 255), (255, 0)])
def test_what_is_visible_is_seen_on_its_background(tmp_path: Path, mode: str, colour: int, background: int) -> None:
    with decoder.open_image(icon(mode, colour, tmp_path)) as image:
        pixels = np.asarray(decoder.to_rgb(image))
    assert pixels[4, 4].tolist() == [colour] * 3 and pixels[0, 0].tolist() == [background] * 3


RAMP = np.linspace(0, 1, 64).reshape(8, 8)


@pytest.mark.parametrize(
    ("values", "ending"),
    [
        pytest.param((RAMP * 65_535).astype(np.uint16), "png", id="16 bits"),
        pytest.param((RAMP * 65_535).astype(np.uint16), "tif", id="16 bits in TIFF"),
        pytest.param((RAMP * 4_095).astype(np.uint16), "png", id="12 bits in 16"),
        pytest.param((RAMP * 16_383).astype(np.uint16), "png", id="14 bits in 16"),
        pytest.param((RAMP * 255).astype(np.uint16), "png", id="8 bits in 16"),
        pytest.param((RAMP * 65_535).astype(np.uint16), "pgm", id="16 bits in PGM"),
        pytest.param((RAMP * 60_000 - 30_000).astype(np.int32), "tif", id="signed"),
        pytest.param((RAMP * (2**31 - 1)).astype(np.int32), "tif", id="32 bits"),
        pytest.param(RAMP.astype(np.float32), "tif", id="floats to 1"),
        pytest.param((RAMP * 255).astype(np.float32), "tif", id="floats to 255"),
        pytest.param((RAMP * 8 - 4).astype(np.float32), "tif", id="floats around 0"),
        pytest.param(np.where(RAMP == 0, np.nan, RAMP).astype(np.float32), "tif", id="floats that are no numbers"),
    ],
)
def test_deep_greys_are_scaled_to_bytes(tmp_path: Path, values: Any, ending: str) -> None:
    Image.fromarray(values).save(tmp_path / f"x.{ending}")
    with decoder.open_image(tmp_path / f"x.{ending}") as image:
        pixels = np.asarray(decoder.to_rgb(image))
    assert np.abs(pixels[..., 0] - RAMP * 255).max() <= 4 and np.array_equal(pixels[..., 0], pixels[..., 2])


@pytest.mark.parametrize(
    ("values", "tags"),
    [
        pytest.param((65_535 - RAMP * 65_535).astype(np.uint16), {262: 0}, id="16 bits, 0 is white"),
        pytest.param((1 - RAMP).astype(np.float32), {262: 0}, id="floats, 0 is white"),
        pytest.param((RAMP * 255 - 128).astype(np.int8).view(np.uint8), {339: 2}, id="8 bits with a sign"),
        pytest.param((RAMP * (2**32 - 1)).astype(np.uint32).view(np.int32), {}, id="32 bits without a sign"),
    ],
)
def test_tags_of_tiff_say_what_numbers_mean(values: Any, tags: dict[int, int]) -> None:
    Image.fromarray(values).save(file := BytesIO(), "TIFF", tiffinfo=tags)
    if not tags:  # Pillow always writes a sign
        written, meant = (struct.pack("<HHIH", 339, 3, 1, number) for number in (2, 1))
        file = BytesIO(file.getvalue().replace(written, meant))
    with decoder.open_image(file) as image:
        assert np.abs(np.asarray(decoder.to_rgb(image))[..., 0] - RAMP * 255).max() <= 4


@pytest.mark.parametrize("ending", ["gif", "tif", "png", "webp"])
def test_the_first_frame_that_is_not_blank_is_taken(tmp_path: Path, ending: str) -> None:
    generator = np.random.default_rng(0)
    first, second = (Image.fromarray(generator.integers(0, 2, (9, 9), dtype=np.uint8) * 255) for _ in range(2))
    blank = Image.new("L", (9, 9), 255)
    for name, frames, expected in (("full", (first, second), first), ("blank", (blank, first, second), first)):
        frames[0].save(path := tmp_path / f"{name}.{ending}", save_all=True, append_images=frames[1:], lossless=True)
        with decoder.open_image(path) as image:
            assert np.array_equal(np.asarray(decoder.to_rgb(image))[..., 0], np.asarray(expected)), name
