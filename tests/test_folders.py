"""Folders of images: layouts, parts, tables of labels, and files that are left out."""

from __future__ import annotations

import shutil
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from effv2.config.schema import DataConfig
from effv2.core.errors import InputError
from effv2.data.dataset import load_dataset
from tests.conftest import load_folder, make_image_tree, within, write_tree


def test_folder_with_all_three_parts_and_with_none(tmp_path: Path) -> None:
    three = make_image_tree(tmp_path / "three", ("train", "val", "test"))
    dataset = load_folder(three)
    assert {name: len(split) for name, split in dataset.splits.items()} == {"train": 18, "validation": 18, "test": 18}
    assert all(id_.startswith("val/") for id_ in dataset.splits["validation"].ids)
    flat = make_image_tree(tmp_path / "flat", images=10)
    dataset = load_folder(flat)
    assert {name: len(split) for name, split in dataset.splits.items()} == {"train": 21, "validation": 3, "test": 6}
    assert dataset.classes == ("class 0", "class 1", "class 2")


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


def test_a_folder_next_to_train_that_is_no_part_is_named(tmp_path: Path) -> None:
    for other in ("dev", "bus"):  # another name for validation; a class next to a class called train
        root = make_image_tree(tmp_path / other, ("train", other))
        (root / "mlruns" / "1").mkdir(parents=True)  # a command in that folder leaves it there
        with pytest.raises(InputError, match=f"train is the training part by its name, but {other} next to it is not"):
            load_folder(root)
        (root / other).rename(root / "val")
        assert load_folder(root).classes == ("class 0", "class 1", "class 2")


def test_forms_of_unicode_are_one_name(tmp_path: Path) -> None:
    """Archives from macOS write é as e and a combining accent."""
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
        (("ant", "bee", *within("bees_and_ants")), "bees_and_ants in it is a data set of its own"),
        ((*within("data"), "samples"), "data in it is a data set of its own"),
        (within("indoors/images", "outdoors/images"), "indoors and outdoors hold the same folders"),
        (("2024-05-01", "2024-05-02"), "are versions or pieces of one set by their names"),
        (("100CANON", "101CANON"), "are versions or pieces of one set by their names"),
        (("ant", "ant (2)", "bee"), "'ant .2.' and 'ant' look like two spellings"),
        (("ant/images", "ant/masks", "bee"), r"ant in it holds images and their masks"),
        (("Ant", "ant", "bee"), "the classes 'Ant' and 'ant' look like two spellings of one name"),
        (("ant_hill", "ant hill", "bee"), "'ant hill' and 'ant_hill' look like two spellings"),
        (("1", "01", "2"), "'01' and '1' look like two spellings"),
        (("ant", "ant - Copy (2)", "bee"), "'ant' and 'ant - Copy .2.' look like two spellings"),
        (("logs", "planks"), r"holds 1 class folder \(not counting logs, which"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value[::3]),
)
def test_layouts_that_may_be_read_in_two_ways_are_refused(tmp_path: Path, folders: tuple[str, ...], said: str) -> None:
    with pytest.raises(InputError, match=said):
        load_folder(write_tree(tmp_path / "set", *folders))


def test_files_outside_the_classes_are_left_out_and_counted(tmp_path: Path, own_cache: Path) -> None:
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
        ("file,label\n{}", "train{}.png,{}\t\xa0"),
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


def test_rows_without_a_label_or_against_their_folder_are_counted(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "set", "ant", "bee")
    lines = [f"{name}{number}.png,{name}" for name in ("ant", "bee") for number in range(3)]
    (root / "labels.csv").write_text("\n".join(["file,label", *lines, "ant3.png,bee", "bee3.png,NaN", ","]))
    dataset = load_folder(root, labels="labels.csv")
    assert dataset.classes == ("ant", "bee")
    assert dataset.left_out == {
        "rows without a label": 1, "images without a label": 1, "folder names that differ from the table's labels": 1
    }  # fmt: skip


def test_labels_of_a_part_are_only_for_its_images(tmp_path: Path) -> None:
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


def test_classes_without_images_are_refused_unless_allowed(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "set", *within("train"), "test/ant", "test/bee")
    write_tree(root, "train/dog", images=1)
    (root / "train" / "empty").mkdir()
    with pytest.raises(InputError, match=r"different classes \(cow, dog, empty\); .*data.allow_incomplete_classes"):
        load_folder(root)
    dataset = load_folder(root, allow_incomplete_classes=True, per_class=2)
    assert dataset.classes == ("ant", "bee", "cow", "dog")
    assert {name: len(split) for name, split in dataset.splits.items()} == {"train": 7, "validation": 3, "test": 8}
    assert dataset.left_out["classes that test lacks, such as cow"] == 2
    single = write_tree(
        tmp_path / "single", "ant", "bee", images=2
    )  # one of each remains for training, none to validate
    with pytest.raises(
        InputError, match=r"'ant' has only 1 images to split for validation, but 2 are needed; add images\."
    ):
        load_folder(single, allow_incomplete_classes=True)


def test_a_table_may_be_written_with_other_forms_of_unicode_and_bars(tmp_path: Path) -> None:
    root, forms = tmp_path / "set", [unicodedata.normalize(form, "Café") for form in ("NFC", "NFD")]
    root.mkdir()
    for number in range(6):
        Image.new("RGB", (9, 9), (40 * number, 9, 9)).save(root / f"{forms[number % 2]}{number}.png")
    rows = [f"{forms[0]}{number}|{[*forms, 'ant'][number % 3]}" for number in range(6)]
    (root / "labels.csv").write_text("\n".join(["file|class|part", *(f"{row}|wing" for row in rows)]), encoding="utf-8")
    assert load_folder(root, labels="labels.csv", validation_fraction=0).classes == (forms[0], "ant")
