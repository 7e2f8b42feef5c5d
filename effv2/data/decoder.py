"""The decoder of training, evaluation and serving: from an image file to upright RGB bytes (docs/data.md).

The served model contains this file and works without the rest of the package, so this file imports nothing of it.
"""

from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

Transpose = Image.Transpose
# The operation that turns an image upright, by the value of its EXIF tag Orientation.
UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
ORIENTATION = 0x0112
MEGAPIXELS = 200.0  # megapixels of an image: scans have 120, and files made to exhaust the memory many more
FRAMES = 16  # frames that are searched for one that isn't blank
PROGRAMS = ("EPS", "IPTC")  # formats of PostScript, or of what may hold it
WHITES = (255, 1_023, 4_095, 16_383, 65_535)  # for greys of unknown depth: the first that no value exceeds
PHOTOMETRIC, SAMPLE_FORMAT = 262, 339  # tags of TIFF: 0 if 0 is white; 2 if numbers have a sign
LONGEST = 100  # largest ratio of an image's sides, because the whole image is enlarged
# Pillow's errors for files that aren't images or are broken, and for images with more pixels than `allow` permits.
TOO_LARGE = (Image.DecompressionBombWarning, Image.DecompressionBombError)
BROKEN = (OSError, ValueError, SyntaxError, TypeError, IndexError, KeyError, RuntimeError, OverflowError)


def allow(megapixels: float) -> None:
    """Set the largest image that Pillow opens in this process, and let it open PNGs with long texts."""
    Image.MAX_IMAGE_PIXELS = round(megapixels * 1e6)
    PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = 2**26, 2**28


def open_image(file: Path | IO[bytes]) -> Image.Image:
    """Open an image without decoding it. ValueError for PostScript, and the errors in BROKEN and TOO_LARGE."""
    image = Image.open(file)
    if hasattr(image, "filename"):  # else Pillow maps the file into memory, and gives such a TIFF a wrong shape
        image.filename = ""
    if image.format in PROGRAMS:
        image.close()
        raise ValueError("it is or may contain PostScript, a program that Pillow would run")
    return image


def prepare(image: Image.Image, size: int, shorter_side: int = 0, interpolation: str = "BILINEAR") -> NDArray[np.uint8]:
    """Return the RGB bytes (size, size, 3) of an image of any size and mode, as a network gets them.

    Both sides are resized to `size`. With `shorter_side`, the shorter side is resized to that, and the central square
    is cropped, as in torchvision's presets. ValueError for an image that is too long to be enlarged.
    """
    image = to_rgb(image)
    if not shorter_side:
        return np.asarray(image.resize((size, size), Image.Resampling[interpolation]), dtype=np.uint8)
    width, height = image.size
    longer = int(shorter_side * max(width, height) / min(width, height))
    if longer > LONGEST * shorter_side:
        raise ValueError(f"an image of {width}x{height} pixels is too long for its width")
    shape = (shorter_side, longer) if width <= height else (longer, shorter_side)
    image = image.resize(shape, Image.Resampling[interpolation])
    left, top = (round((length - size) / 2) for length in shape)
    return np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.uint8)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode upright in RGB: its first frame, or if that is blank, the first that isn't."""
    first = _frame_in_rgb(image)
    with suppress(EOFError, AttributeError, *BROKEN):  # if there is no other, or it is broken
        if getattr(image, "is_animated", False) and _is_blank(first):
            for number in range(1, FRAMES):
                image.seek(number)
                if not _is_blank(frame := _frame_in_rgb(image)):
                    return frame
    return first


def _is_blank(image: Image.Image) -> bool:
    return all(low == high for low, high in image.getextrema())  # type: ignore[misc]  # RGB has three pairs


def _frame_in_rgb(image: Image.Image) -> Image.Image:
    """Return the current frame upright in RGB, with a background behind transparent pixels."""
    image.load()
    tags = getattr(image, "tag_v2", {})
    signed = 2 in tags.get(SAMPLE_FORMAT, ())
    if image.mode in ("I", "F") or image.mode.startswith("I;") or (signed and image.mode == "L"):
        values = np.asarray(image)  # which Pillow would clip at 255
        if tags and values.dtype.kind == ("u" if signed else "i"):  # it confuses 32 bits, and 8 bits with a sign
            values = values.view(f"{'i' if signed else 'u'}{values.itemsize}")
        grey = _grey_bytes(values)
        rgb = Image.fromarray(255 - grey if tags.get(PHOTOMETRIC) == 0 else grey).convert("RGB")
    elif image.has_transparency_data:
        colours = image.convert("LA" if image.mode == "La" else image.mode).convert("RGBA")
        for background in ("white", "black"):  # black, if the image would be white on white
            rgb = Image.alpha_composite(Image.new("RGBA", image.size, background), colours).convert("RGB")
            if not _is_blank(rgb):
                break
    else:
        rgb = image.convert("RGB")
    orientation = None
    with suppress(Exception):  # whatever errors a camera's EXIF data may have
        orientation = image.getexif().get(ORIENTATION)
    return rgb.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else rgb


def _grey_bytes(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Scale greys of 16 bits, of 32 bits and floats to bytes, by their range, because their depth is unknown.

    White is 1 for floats from 0 to 1, otherwise the first of WHITES that no value exceeds. Other ranges, such as those
    with values below 0, are stretched from their smallest value to their largest.
    """
    if values.dtype.kind == "f":
        finite = np.isfinite(values)
        values = np.where(finite, values, values[finite].min() if finite.any() else 0)
    low, high = values.min(), values.max()
    white = next((white for white in WHITES if low >= 0 and high <= white), None)
    if white is None:
        span = max(float(high) - float(low), 1e-30)
        return ((values.astype(np.float32) - np.float32(low)) * np.float32(255 / span)).astype(np.uint8)
    if values.dtype.kind == "f":
        return np.rint(values * np.float32(255 / (white if high > 1 else 1))).astype(np.uint8)
    return (values >> (white.bit_length() - 8)).astype(np.uint8)
