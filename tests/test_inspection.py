"""Inspection of a data set: counts, broken images and duplicates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image, ImageFilter

from effv2.cli.main import main
from effv2.config.schema import DataConfig
from effv2.data.dataset import load_dataset
from effv2.data.inspection import COLUMNS, GAP, LINE, NEAR_BITS, TILE, check, contact_sheet, in_short, near

random = np.random.default_rng(0)


def photo() -> Image.Image:
    """Return a unique picture: blurred noise."""
    noise = Image.fromarray(random.integers(0, 256, (120, 90, 3), np.uint8))
    return noise.filter(ImageFilter.GaussianBlur(6))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a set of two parts and two classes, four images each."""
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            folder = tmp_path / "set" / part / name
            folder.mkdir(parents=True)
            for number in range(4):
                photo().save(folder / f"{number}.png")
    return tmp_path / "set"


def test_broken_and_duplicate_images_are_named(tree: Path) -> None:
    assert not check(DataConfig(dataset="folder", dir=str(tree))).alike
    (tree / "test" / "dog" / "0.png").write_bytes((tree / "train" / "dog" / "3.png").read_bytes())
    with Image.open(tree / "train" / "cat" / "1.png") as image:  # the same picture, smaller and compressed
        image.resize((60, 80)).save(tree / "test" / "cat" / "again.jpg", quality=60)
    (tree / "train" / "cat" / "2.png").write_bytes(b"no image")
    Image.fromarray(random.integers(0, 256, (40, 40), np.uint8)).save(tree / "train" / "cat" / "grey.png")
    found = check(DataConfig(dataset="folder", dir=str(tree)))
    assert found.counts == {"train": [4, 4], "test": [5, 4]} and found.modes == {"RGB": 16, "L": 1}
    assert found.sizes == {(90, 120): 15, (60, 80): 1, (40, 40): 1}
    assert [name.partition(" ")[0] for name in found.broken] == ["train/cat/2.png"]
    assert "data.skip_broken" in found.remedy(False)
    assert {each[:2] for each in found.alike if each.identical} == {("train/dog/3.png", "test/dog/0.png")}
    assert {each[:2] for each in found.alike if not each.identical} == {("train/cat/1.png", "test/cat/again.jpg")}
    assert all(each.across for each in found.alike)
    # Without a test part, the test images are split off, so duplicates leak. Two labels of one image always harm.
    (tree / "train" / "dog" / "0.png").write_bytes((tree / "train" / "cat" / "0.png").read_bytes())
    alone = check(DataConfig(dataset="folder", dir=str(tree / "train")))
    assert alone.remedy(True) == "keep one image of each identical pair" and "split off" in " ".join(alone.sentences())
    assert "Of these pairs, 1 in two classes: cat/0.png and dog/0.png" in " ".join(alone.sentences())


def test_the_command_reports_problems_and_its_exit_code_says_so(tree: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    words = ["data", "check", str(tree), "--image-size", "40"]
    sound = CliRunner().invoke(main, [*words, "--sheet", str(sheet)])
    assert sound.exit_code == 0 and "all 90x120" in sound.output and sheet.is_file()
    *_, summary, _, advice = sound.output.splitlines()
    assert summary.startswith("Training would use: 2 classes; train 6, validation 2, test 8 images.")
    assert advice.endswith(f": effv2 train --dataset folder --data-dir {tree} --image-size 40")
    (tree / "test" / "dog" / "0.png").write_bytes((tree / "train" / "dog" / "3.png").read_bytes())
    leaking = CliRunner().invoke(main, ["data", "check", str(tree)])
    assert leaking.exit_code == 1 and "train/dog/3.png and test/dog/0.png" in leaking.output
    (tree / "test" / "dog" / "1.png").write_bytes(b"no image")
    *_, advice = CliRunner().invoke(main, words).output.splitlines()
    assert advice.startswith("First repair or remove the broken images, or give --skip-broken true; keep one image of")
    for wrong, named in (
        (["/nowhere"], "--data-dir /nowhere: no such folder"),
        (["--data-dir", "/nowhere"], "--data-dir /nowhere: no such folder"),
        (["--dataset", "birds"], "--data-dir: the data set 'birds' needs"),
        ([str(tree), "--data-dir", "/nowhere"], "--data-dir /nowhere: the folder "),
        ([str(tree), "--skip-broken", "true", "--sheet", "x.nothing"], "sheet x.nothing: can't be written"),
    ):
        done = CliRunner().invoke(main, ["data", "check", *wrong])
        assert done.exit_code == 2 and named in done.stderr


def test_folders_between_the_classes_and_their_images_are_named(tree: Path) -> None:
    nested = tree / "train"
    for name, breeds in {"cat": ("manx", "siamese"), "dog": ("poodle", "pug")}.items():
        for image in [*(nested / name).glob("*.png")]:
            folder = image.parent / breeds[int(image.stem) % 2]
            folder.mkdir(exist_ok=True)
            image.rename(folder / image.name)
    words = "Every class holds folders, such as cat/manx."
    assert words in check(DataConfig(dataset="folder", dir=str(nested))).note
    (nested / "dog" / "poodle" / "0.png").rename(nested / "dog" / "0.png")
    assert not check(DataConfig(dataset="folder", dir=str(nested))).note


def test_a_training_that_would_fail_is_told_with_names_as_they_are(tmp_path: Path) -> None:
    rows = []
    for number, name in enumerate(("[b]", "[/b]", "\x1b[31m", "rare")):
        for copy in range(1 if name == "rare" else 3):
            photo().save(tmp_path / f"{number}{copy}.png")
            rows.append(f"{number}{copy}.png,{name}")
    (tmp_path / "labels.csv").write_text("\n".join(["file,label", *rows]))
    found = CliRunner().invoke(main, ["data", "check", str(tmp_path), "--labels", "labels.csv"])
    assert found.exit_code == 1 and all(name in found.output for name in ("[b]", "[/b]")) and "\x1b" not in found.output
    *_, advice = found.output.splitlines()
    assert advice.startswith("Training would fail: --data-dir: the class 'rare' has only 1 images to split for test")


def test_a_training_begins_with_the_same_findings_in_three_lines(tree: Path) -> None:
    config = DataConfig(dataset="folder", dir=str(tree), validation_fraction=0)
    assert in_short(load_dataset(config))[1:] == ["Sizes in pixels: all 90x120. Modes: 16 RGB."]
    with Image.open(tree / "train" / "cat" / "1.png") as image:
        image.resize((60, 80)).save(tree / "test" / "cat" / "again.jpg", quality=60)
    data, kinds, pairs = in_short(load_dataset(config))
    assert data == load_dataset(config).summary and "from 60x80 to 90x120, most often 90x120" in kinds
    assert pairs.startswith("1 nearly identical pair in two parts") and pairs[:-1].endswith("test/cat/again.jpg")


def test_near_hashes_are_all_found() -> None:
    base = random.integers(0, 2**63, 60, dtype=np.uint64)
    flips = [np.uint64(sum(1 << int(bit) for bit in random.choice(64, count, replace=False))) for count in range(7)]
    hashes = np.concatenate([base, [base[0] ^ flip for flip in flips], [base[1] ^ flips[4]]])
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None])
    assert near(hashes) == [tuple(pair) for pair in np.argwhere(np.triu(apart <= NEAR_BITS, 1)).tolist()]
    assert near(hashes[:0]) == []


def test_a_contact_sheet_shows_what_enters_the_network(tree: Path) -> None:
    dataset = load_dataset(DataConfig(dataset="folder", dir=str(tree), image_size=TILE, validation_fraction=0))
    sheet, labels = contact_sheet(dataset), dataset.train.labels.tolist()
    each = min(COLUMNS, *(labels.count(label) for label in set(labels)))  # images per class
    width, height = TILE + 4 * GAP, TILE + LINE + 4 * GAP
    left, top = each % COLUMNS * width + GAP, each // COLUMNS * height + GAP  # of the first image of the second class
    first = np.asarray(sheet.crop((left, top, left + TILE, top + TILE)))
    assert np.array_equal(first, dataset.train.pixels[int(dataset.train.rows[labels.index(1)])].numpy())
