"""Make effv2/evidence/levels.csv: how small a p-value must be if it is checked after every run.

Seeds are drawn one by one, without any effect. The p-value of the t-test is computed after each, from three seeds per
arm to N. In a share of all paths, the smallest p-value falls below a level. The columns are shares, the cells levels.
Kind 1 is Student's test of one sample. Kind 2 is Welch's test of two samples that get their runs in turn. Each cell is
the worst of several ratios of their standard deviations. It takes about a quarter of an hour on two cores:

    python benchmarks/levels.py > effv2/evidence/levels.csv
"""

import argparse
import csv
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
from scipy import special

FEWEST, MOST = 3, (3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20, 25, 30, 40, 50)
ALPHAS = np.array([10**-k * f for k in (5, 4, 3, 2) for f in (1, 2, 3, 5, 7)] + [0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0])
RATIOS = (0, 1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 64, 2, 4, 8)  # of standard deviations; 0 is a single sample
BINS = np.linspace(-9, 0, 18_001)  # of log10 p
CHUNK = 100_000


class Sample:
    """Many samples that grow together: their means, and the variances of the means."""

    def __init__(self, paths: int, deviation: float) -> None:
        self.n, self.deviation = 0, deviation
        self.sums, self.squares = np.zeros(paths), np.zeros(paths)

    def draw(self, random: np.random.Generator) -> None:
        """Add one value to each."""
        values = random.standard_normal(len(self.sums)) * self.deviation
        self.sums += values
        self.squares += values * values
        self.n += 1

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Return means and their variances."""
        means = self.sums / self.n
        return means, np.maximum(self.squares - self.n * means**2, 1e-300) / (self.n - 1) / self.n


def p_values(samples: list[Sample]) -> np.ndarray:
    """Return the two-sided p-values of Student's test of one sample, or Welch's of two."""
    moments = [each.moments() for each in samples]
    variance = sum(v for _, v in moments)
    distance = moments[0][0] - (moments[1][0] if len(samples) > 1 else 0)
    degrees = variance**2 / sum(v**2 / (each.n - 1) for (_, v), each in zip(moments, samples, strict=True))
    found: np.ndarray = 2 * special.stdtr(degrees, -np.abs(distance) / np.sqrt(variance))
    return found


def counts(ratio: float, seed: int) -> np.ndarray:
    """Return for each N a histogram of the smallest p-values of CHUNK paths."""
    random = np.random.default_rng([round(64 * ratio), seed])
    samples = [Sample(CHUNK, deviation) for deviation in ((ratio, 1.0) if ratio else (1.0,))]
    least, found = np.ones(CHUNK), []
    for n in range(1, MOST[-1] + 1):
        for sample in samples:
            sample.draw(random)
            if min(each.n for each in samples) >= FEWEST:
                np.minimum(least, p_values(samples), out=least)
        if n in MOST:
            found.append(np.histogram(np.log10(np.maximum(least, 1e-9)), BINS)[0])
    return np.array(found)


def levels(paths: int, ratio: float, pool: ProcessPoolExecutor) -> np.ndarray:
    """Return the nominal level of each N and alpha."""
    total = np.sum(list(pool.map(partial(counts, ratio), range(-(-paths // CHUNK)))), axis=0).cumsum(1)
    shares = total / total[:, -1:]
    return np.array([10 ** np.interp(np.log(ALPHAS), np.log(np.maximum(each, 1e-9)), BINS[1:]) for each in shares])


def rows(paths: int) -> Iterator[tuple[object, ...]]:
    """Yield the lines of the table."""
    yield "kind", "most", *(f"{alpha:g}" for alpha in ALPHAS)
    with ProcessPoolExecutor() as pool:
        found = {ratio: levels(paths, ratio, pool) for ratio in RATIOS}
    for kind, worst in ((1, found[0]), (2, np.minimum.reduce(list(found.values())))):
        for most, line in zip(MOST, worst, strict=True):
            yield kind, most, *(f"{level:.4g}" for level in line)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--paths", type=int, default=5_000_000)
    csv.writer(sys.stdout, lineterminator="\n").writerows(rows(parser.parse_args().paths))
