"""The cost of a set of 226,000 files: the first start, the second start, memory, and an epoch without the network.

    python benchmarks/large_set.py FOLDER [--images 226000] [--size 32]

If they are missing, FOLDER gets that many JPEG files in 25 classes, like the birds of the post. The cache of decoded
images is deleted first. Each start is a process that loads the set and hashes it as a run logs it.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

CLASSES, BATCH = 25, 512


def fill(root: Path, size: int, count: int, label: int) -> None:
    """Write the images of a class: noise around a colour of the class."""
    from PIL import Image

    random, folder = np.random.default_rng(label), root / f"class-{label:02}"
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = random.integers(0, 256, (size, size, 3), np.uint8) // 2 + np.uint8(5 * label)
        Image.fromarray(pixels).save(folder / f"{number:05}.jpg", quality=75)


def start(root: str, size: int) -> dict[str, float]:
    """Load the set, and go through its training images once."""
    from effv2.config.schema import DataConfig
    from effv2.data import batches
    from effv2.data.dataset import load_dataset

    began = time.perf_counter()
    data = load_dataset(DataConfig(dataset="folder", dir=root, image_size=size))
    loaded = time.perf_counter()
    data.digest()
    hashed = time.perf_counter()
    passes = []
    for epoch in (1, 2):
        order, begins = batches.epoch_order(len(data.train), 0, epoch), time.perf_counter()
        for images, _ in batches.training_batches(data.train, order, BATCH):
            batches.normalised(images, batches.NORMALISATIONS["none"], channels_last=True)
        passes.append(time.perf_counter() - begins)
    return {
        "load, s": loaded - began,
        "hash, s": hashed - loaded,
        "an epoch without the network, s": passes[-1],
        "training images": len(data.train),
        "pixels, MB": data.bytes / 1e6,
        "peak memory, MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=226_000)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--start", action="store_true", help="Load the set, in this process.")
    given = parser.parse_args()
    images = given.folder / f"{given.images}-{given.size}"
    if given.start:
        print(json.dumps(start(str(images), given.size)))
        sys.exit()
    if not images.is_dir():
        with ProcessPoolExecutor() as pool:
            list(pool.map(partial(fill, images, given.size, given.images // CLASSES), range(CLASSES)))
    cache = given.folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    print("| start | load, s | hash, s | an epoch without the network, s | pixels, MB | peak memory, MB |")
    print("|---|---|---|---|---|---|")
    for name in ("first", "second"):
        environment = {**os.environ, "EFFV2_CACHE": str(cache)}
        child = subprocess.run([sys.executable, *sys.argv, "--start"], env=environment, check=True, capture_output=True)  # noqa: S603
        found = json.loads(child.stdout)
        print(f"| {name} | " + " | ".join(f"{found[key]:,.1f}" for key in found if key != "training images") + " |")
