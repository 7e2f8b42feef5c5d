"""Images/s of bare forward passes in float32 on a CPU, by memory layout, folding and images per pass.

    python benchmarks/inference_forms.py

The images are random. The networks are torchvision's, freshly initialised, at the image size of their weights. All
forms take turns in several rounds of one process.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import click
import torch
from torch import Tensor, nn
from torchvision import models

from effv2.execution.device import fold_batch_norm

ROUND_IMAGES = 128


def rate(network: nn.Module, images: Tensor) -> float:
    """Return images/s from bytes to logits: the median over passes of ROUND_IMAGES in total."""
    seconds = []
    memory_format = torch.channels_last if images.is_contiguous(memory_format=torch.channels_last) else None
    with torch.inference_mode():
        for _ in range(max(1, ROUND_IMAGES // len(images))):
            started = time.perf_counter()
            network(images.to(torch.float32, memory_format=memory_format or torch.preserve_format).div_(255))
            seconds.append(time.perf_counter() - started)
    return len(images) / statistics.median(seconds)


def forms(name: str) -> dict[str, Callable[[], float]]:
    """Return a function for each form of a network, which measures its images/s."""
    size = models.get_model_weights(name).DEFAULT.transforms().crop_size[0]
    pixels = torch.randint(0, 256, (ROUND_IMAGES, 3, size, size), dtype=torch.uint8)
    last = pixels.to(memory_format=torch.channels_last)
    plain = models.get_model(name).eval()
    channels_last = models.get_model(name).eval().to(memory_format=torch.channels_last)
    folded = models.get_model(name).eval()
    fold_batch_norm(folded)
    folded.to(memory_format=torch.channels_last)
    found: dict[str, Callable[[], float]] = {
        "NCHW, 128": lambda: rate(plain, pixels),
        "channels last, 128": lambda: rate(channels_last, last),
        "folded, 128": lambda: rate(folded, last),
    }
    for count in (32, 16, 8, 4, 2, 1):
        found[f"folded, {count}"] = lambda count=count: rate(folded, last[:count])  # type: ignore[misc]
    return found


@click.command()
@click.option("--networks", default="squeezenet1_1,efficientnet_b0,resnet50,efficientnet_v2_s", show_default=True)
@click.option("--rounds", default=3, show_default=True, help="Rounds after a warm-up round.")
def main(networks: str, rounds: int) -> None:
    """Measure and print images/s."""
    for name in networks.split(","):
        measured = forms(name)
        rates: dict[str, list[float]] = {form: [] for form in measured}
        for round_ in range(rounds + 1):
            for form, measure in measured.items():
                value = measure()
                if round_:
                    rates[form].append(value)
        for form, values in rates.items():
            click.echo(f"{name}, {form}: {statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})")


if __name__ == "__main__":
    main()
