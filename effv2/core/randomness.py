"""Independent random streams, each a pure function of the seed and a position.

No generator lives from one step to the next: order, augmentation and dropout are each seeded from (seed, stream name,
epoch or step). One stream never disturbs another, and a run that resumes at step n draws what it would have drawn.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def stream_seed(seed: int, stream: str, *position: int) -> int:
    """Return a 63-bit seed for `stream` at `position`; distinct arguments give unrelated seeds."""
    text = "/".join([str(seed), stream, *map(str, position)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the generators that are drawn from on `device`, the CPU's among them.

    As torch.manual_seed, which formats a stack trace on each call where CUDA was never used.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.manual_seed(seed)


@contextmanager
def private_randomness() -> Iterator[None]:
    """Give torch's global generators back as they were found, whatever is seeded or drawn inside."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield
