"""The meaning of folders by their names: parts of a set, pieces or versions of one, or no classes at all."""

import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

# Names of the parts of a set, in any case and with any digits, dashes and words like `set` and `data` around them.
TRAIN, VALIDATION, TEST, UNLABELLED = "train", "validation", "test", "unlabelled"
PART_WORDS = {
    TRAIN: "train(?:ing)?",
    VALIDATION: "val(?:id(?:ation)?)?",
    TEST: "test(?:ing)?",
    UNLABELLED: "pred(?:ict(?:ion)?s?)?|unlabell?ed",
}
FILLER = "data|sets?|datasets?|(?:jpeg)?images?|imgs?|pictures?|photos?|files?|folders?|parts?|splits?|samples?|seg"
# Folders that aren't classes: thumbnails and bins of other programs, and the output of runs started there.
NO_CLASSES = {"thumbs", "thumbnails", "__macosx", "__pycache__", "lost+found", "system volume information"}
NO_CLASSES |= {"mlruns", "mlartifacts", "checkpoints", "wandb", "lightning_logs", "venv", "node_modules"}
NO_CLASSES |= {"runs", "outputs", "output", "results", "plots", "logs"}
# If all folders have these names, they are versions of one set, not classes.
VERSIONS = {"original", "resized", "raw", "processed", "augmented", "cropped", "color", "colour", "gray", "grey"}
VERSIONS |= {"grayscale", "greyscale", "segmented", "images", "masks", "labels", "annotations"}
PIECES = f"folds?|shards?|chunks?|batch(?:es)?|{FILLER}|{'|'.join(PART_WORDS.values())}"  # before a number
MASKS = "masks?|segmentations?|segmentation(?:class|object)|labels?|annotations?|gt|groundtruth"  # next to their images
MASK_OF = r"(.+?)[\W_]+(?:mask|segmentation|gt|groundtruth)(?:[\W_]*\d+)?"  # the name of a mask next to its image


def part_of(name: str) -> tuple[str, tuple[str, ...]] | None:
    """Return the part that a folder's name means, and the other words of the name; None if it is not a part."""
    words = _words(name)
    found = [
        (part, at)
        for at, word in enumerate(words)
        for part, pattern in PART_WORDS.items()
        if re.fullmatch(f"(?:{pattern})(?:{FILLER})*", word)
    ]
    if len(found) != 1:
        return None
    part, at = found[0]
    rest = (word for number, word in enumerate(words) if number != at and not re.fullmatch(FILLER, word))
    return part, tuple(rest)


def parts_among(names: Sequence[str]) -> dict[str, list[str]]:
    """Return folders by part: by names such as train, or names with equal other words, such as birds_train."""
    known = {name: found for name in names if (found := part_of(name))}
    parts: dict[str, list[str]] = {}
    for name, (part, rest) in known.items():
        if not rest or any(other != part and more == rest for other, more in known.values()):
            parts.setdefault(part, []).append(name)
    return parts


def are_pieces(names: list[str]) -> bool:
    """Say whether folders are pieces of one set by name, such as images_001 and images_002, or trainA and testB."""
    stems = [re.fullmatch(r"(.*?[^\W\d_])(?:[\W_]*\d+|(?<=[a-z])[A-Z])", name) for name in names]
    return all(stem and re.fullmatch(PIECES, _words(stem[1])[-1]) for stem in stems)


def hold_masks(names: list[str]) -> bool:
    """Say whether folders are images and their annotations, such as image and mask, or train and train_masks."""
    words = [_words(name) for name in names]
    drawn = [each[:-1] for each in words if each and re.fullmatch(MASKS, each[-1])]
    return bool(drawn) and any(each in drawn or (each and all(re.fullmatch(FILLER, w) for w in each)) for each in words)


def masks_among(files: Sequence[Path]) -> set[Path]:
    """Return the files that are masks of others by their names, such as a_mask.png, or a_mask_1.png, of a.png."""
    stems = {path.stem.casefold() for path in files}
    return {path for path in files if (of := re.fullmatch(MASK_OF, path.stem.casefold())) and of[1] in stems}


def spelling(name: str) -> str:
    """Return a name without what two spellings of one name differ in: capitals, spaces, dashes, zeros, a word copy."""
    plain = re.sub(r"(?<=[^\W_])[\s_-](?=[^\W_])", " ", unicodedata.normalize("NFKC", name).casefold()).strip()
    plain = re.sub(r"(?<=\w)\W+copy\b\W*\d*\W*$", "", plain)
    return found[1] if (found := re.fullmatch(r"0*(\d+?)(?:\.0+)?", plain)) else plain


def printable(name: str) -> str:
    """Make a file name printable, whatever its bytes: no control characters, which a terminal would obey."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], text)


def _words(name: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", name.casefold())
