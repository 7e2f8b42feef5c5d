"""Decoding: the cache, broken images, and the pixels of all kinds of files."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from effv2.config.schema import DataConfig
from effv2.core.errors import InputError
from effv2.data import decoder
from effv2.data.dataset import load_dataset
from effv2.data.images import LabelledImages, Square, decode, image_hashes, sha256_of
from tests.conftest import load_folder, make_image_tree, within, write_tree


def files_in(folder: Path) -> LabelledImages:
    paths = sorted(folder.rglob("*.*"))
    return LabelledImages.of_files(paths, [0] * len(paths), [path.name for path in paths])


def test_decoding_equals_pillow_in_every_mode(tmp_path: Path, own_cache: Path) -> None:
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
        assert np.array_equal(decode(copy, Square(8)).pixels, first.pixels)  # found by content, in any folder
    Image.new("RGB", (9, 9), "red").save(images.items[0])
    assert not np.array_equal(decode(images, Square(8)).pixels, first.pixels)


def test_second_start_hashes_no_pixels(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_image_tree(tmp_path / "set")
    config = DataConfig(dataset="folder", dir=str(root), image_size=8)
    first = load_dataset(config)
    plain = [hashlib.sha256(image.data).digest() for image in first.train.pixels.numpy()]
    assert first.train.image_hashes == [plain[row] for row in first.train.rows]
    for name in ("images.sha256_of", "images.image_hashes", "dataset.image_hashes"):
        monkeypatch.setattr(f"effv2.data.{name}", lambda array: pytest.fail("hashed again"))
    assert load_dataset(config).train.image_hashes == first.train.image_hashes


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "no index", "wrong index", "hashes", "stamp"])
def test_damaged_entry_is_rebuilt(tmp_path: Path, own_cache: Path, damage: str) -> None:
    images = files_in(make_image_tree(tmp_path / "set"))
    decoded = decode(images, Square(8))
    first, hashes = np.array(decoded.pixels), image_hashes(decoded.pixels)
    assert np.array_equal(decoded.hashes, hashes)
    (pixels,) = own_cache.rglob("pixels.npy")
    if damage == "flip":
        content = bytearray(pixels.read_bytes())
        content[-1] ^= 1
        pixels.write_bytes(content)
    elif damage == "truncate":
        pixels.write_bytes(pixels.read_bytes()[:-10])
    elif damage == "empty":
        pixels.write_bytes(b"")
    elif damage == "hashes":
        pixels.with_name("hashes.npy").write_bytes(bytes(100))
    elif damage == "stamp":
        for stamp in (own_cache / "stamps").iterdir():
            stamp.write_bytes(b"\xff../..")
    elif damage == "wrong index":
        pixels.with_name("index.json").write_text("{}")
    else:
        pixels.with_name("index.json").unlink()
    again = decode(images, Square(8))
    assert np.array_equal(again.pixels, first) and np.array_equal(again.hashes, hashes)
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
    head = b"IHDR" + struct.pack(">IIBBBBB", 100_000_000, 1, 8, 2, 0, 0, 0)  # a row that is longer than Pillow decodes
    claims = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    (root / "class 2" / "0.jpg").write_bytes(claims + struct.pack(">I", 9) + b"IDAT" + bytes(13))
    with pytest.raises(InputError, match=r"3 images.*class 0/0\.jpg.*class 1/0\.jpg.*class 2/0\.jpg"):
        load_folder(root)
    assert not list(own_cache.rglob("pixels.npy"))


def test_an_unreadable_file_is_named_though_others_are_cached(tmp_path: Path, own_cache: Path) -> None:
    root = make_image_tree(tmp_path / "set")
    load_folder(root)
    (root / "class 0" / "9.jpg").symlink_to(tmp_path / "nowhere.jpg")
    for _ in range(2):
        with pytest.raises(InputError, match=r"1 image .*class 0/9\.jpg"):
            load_folder(root)


def test_cache_that_can_not_be_written_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EFFV2_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"EFFV2_CACHE .*file: can't be written"):
        load_dataset(DataConfig(image_size=8))


@pytest.mark.parametrize(
    ("broken", "said"),
    [("test/*/*", "no image of the test part can be read"), ("train/ant/*", "no training image of the class 'ant'")],
)
def test_skipping_may_not_leave_a_part_or_a_class_empty(
    tmp_path: Path, own_cache: Path, broken: str, said: str
) -> None:
    root = write_tree(tmp_path / "set", "train/ant", "train/bee", "test/ant", "test/bee")
    for path in root.glob(broken):
        path.write_bytes(b"no image")
    with pytest.raises(InputError, match=said):
        load_folder(root, skip_broken=True, validation_fraction=0)


def test_broken_images_are_skipped_if_requested(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_tree(tmp_path / "set", *within("train", "test"))
    (root / "train" / "ant" / "ant1.png").write_bytes(b"no image")
    (root / "test" / "cow" / "cow0.png").write_bytes((root / "train" / "bee" / "bee0.png").read_bytes())
    for _ in range(2):  # the second time from the cache
        dataset = load_folder(root, skip_broken=True, validation_fraction=0)
        assert len(dataset.train) == 11 and dataset.broken == {"train/ant/ant1.png": "Pillow doesn't know its format"}
        assert dataset.notes[0] == "Left out because they can't be read: 1 image (train/ant/ant1.png)."
        assert dataset.notes[1].endswith("as images of train: test/cow/cow0.png is train/bee/bee0.png.")
        with pytest.raises(InputError, match=r"1 image can't be read .*ant1.*or give data\.skip_broken"):
            load_folder(root)
        monkeypatch.setattr(LabelledImages, "digest", lambda _: pytest.fail("all files were read again"))


def test_valid_files_of_many_pixels_and_with_long_texts_are_taken(tmp_path: Path, own_cache: Path) -> None:
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
def test_images_are_rotated_upright(tmp_path: Path, orientation: int, ending: str) -> None:
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
    """Write a transparent image with a grey square in its middle."""
    image = Image.new("RGBA", (9, 9), (colour, colour, colour, 0))
    image.paste((colour, colour, colour, 255), (3, 3, 6, 6))
    more: dict[str, Any] = {}
    if mode in ("L", "RGB"):  # one colour means transparency
        more["transparency"] = 77 if mode == "L" else (77, 77, 77)
        image = Image.composite(image, Image.new("RGBA", (9, 9), (77, 77, 77)), image.getchannel("A"))
    image.convert(mode).save(folder / "icon.png", **more)
    return folder / "icon.png"


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
@pytest.mark.parametrize(("colour", "background"), [(0, 255), (100, 255), (255, 0)])
def test_a_transparent_image_gets_a_background_that_shows_it(
    tmp_path: Path, mode: str, colour: int, background: int
) -> None:
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
