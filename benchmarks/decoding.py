"""Decoding in threads against processes.

    python benchmarks/decoding.py FOLDER [--size 32] [--images 3000] [--rounds 3]

Decodes JPEG files of FOLDER to squares with effv2's decoder, in as many threads, or as many processes, as the machine
has cores. They take turns, after one warm-up of the file cache. The processes are started before the clock. Prints
images/s (median and range over the rounds) and whether the pixels are equal.
"""

import os
import statistics
import time
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from effv2.data.decoder import open_image, prepare


def one(path: Path, size: int) -> Any:
    """Return the pixels of a file."""
    with open_image(path) as image:
        return prepare(image, size)


@click.command()
@click.argument("folder")
@click.option("--size", default=32, show_default=True, help="Side of the squares in pixels.")
@click.option("--images", default=3000, show_default=True, help="Largest number of files.")
@click.option("--rounds", default=3, show_default=True, help="Measurements of each.")
def main(folder: str, size: int, images: int, rounds: int) -> None:
    """Measure and print."""
    paths, cores = sorted(Path(folder).rglob("*.JPEG"))[:images], os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as threads, ProcessPoolExecutor(cores) as processes:

        def decoded(pool: Executor) -> Any:
            return np.stack(list(pool.map(partial(one, size=size), paths, chunksize=32)))

        pools: dict[str, Executor] = {"threads": threads, "processes": processes}
        click.echo(f"equal: {np.array_equal(*map(decoded, pools.values()))}")  # also starts the processes
        rates: dict[str, list[float]] = {name: [] for name in pools}
        for _ in range(rounds):
            for name, pool in pools.items():
                began = time.perf_counter()
                decoded(pool)
                rates[name].append(len(paths) / (time.perf_counter() - began))
    for name, each in rates.items():
        click.echo(f"{name}: {statistics.median(each):.0f} images/s ({min(each):.0f} to {max(each):.0f})")


if __name__ == "__main__":
    main()
