"""How often `promote` moves the alias: pairs of models with known accuracies, decided by effv2's code.

    python benchmarks/promotion.py --pairs 1000

Some images are harder than others, so two models tend to fail on the same ones. Each image has its own probability of a
right answer, from a beta distribution. Both models answer it independently with this probability.
"""

import argparse
from collections.abc import Iterator
from itertools import product

import numpy as np

from effv2.evidence.promotion import Contender, decide
from effv2.tracking.read import RunRecord

RUN = RunRecord("", "", "FINISHED", {}, {}, {})
SPREAD = 0.5  # of a beta distribution, a + b: most images are easy or hard


def contender(name: str, chances: np.ndarray, random: np.random.Generator) -> Contender:
    """Return a model that is right on each image with its probability (N)."""
    right = random.random(len(chances)) < chances
    return Contender(name, RUN, {str(image): ("a", "a" if each else "b") for image, each in enumerate(right)})


def moved(images: int, accuracy: float, better_by: float, pairs: int) -> float:
    """Return the share of pairs in which the alias moves to a model that is better by so much."""
    count = 0
    for seed in range(pairs):
        random = np.random.default_rng(seed)
        chances = random.beta(SPREAD * accuracy, SPREAD * (1 - accuracy), images)
        champion = contender("champion", chances, random)
        candidate = contender("candidate", chances + better_by / (1 - accuracy) * (1 - chances), random)
        count += decide(candidate, champion, {}).verdict == "promoted"
    return count / pairs


def lines(pairs: int) -> Iterator[str]:
    """Yield the lines of a table."""
    steps = (0.0, 0.01, 0.02, 0.05)
    yield f"| test images | accuracy | {' | '.join(f'better by {100 * step:g} points' for step in steps)} |"
    yield f"|---|---|{'---|' * len(steps)}"
    for images, accuracy in product((360, 1000, 3925), (0.8, 0.94)):
        shares = " | ".join(f"{moved(images, accuracy, step, pairs):.1%}" for step in steps)
        yield f"| {images:,} | {accuracy:.0%} | {shares} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1000)
    for line in lines(parser.parse_args().pairs):
        print(line, flush=True)
