"""The speed of CUDA graphs: the training loop with and without them, in float32 and bfloat16, and timm's network.

    python benchmarks/gpu.py [--variant default] [--image-size 32] [--batch-size 128]

Each form runs in its own process. In each epoch, it trains on STEPS batches of random bytes on the GPU and evaluates as
many, as `train` does. Without graphs, it makes a new copy for inference after each epoch. Medians exclude the first
WARM_UP epochs. With the default variant, timm's efficientnetv2_s also trains, in a plain loop on one batch on the GPU,
under bfloat16 autocast, channels last. It isn't evaluated. Prints a Markdown table: images/s, gain over eager float32,
peak memory.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from dataclasses import replace

import click
import torch

from effv2.config.schema import TrainConfig
from effv2.data.dataset import Dataset, Split
from effv2.execution.device import make_execution
from effv2.training.loop import Training

STEPS, WARM_UP, EPOCHS = 16, 2, 5
TIMM = {"timm, bf16": False, "timm, bf16, compiled": True}
FORMS = {f"{precision}{how}": (precision, how) for precision in ("fp32", "bf16") for how in ("", ", CUDA graphs")}


def random_split(images: int, size: int) -> Split:
    """Return random bytes with random labels of ten classes."""
    pixels = torch.randint(0, 256, (images, size, size, 3), dtype=torch.uint8)
    return Split(pixels, torch.arange(images), torch.randint(0, 10, (images,)), tuple(map(str, range(images))))


def measure(config: TrainConfig, cuda_graphs: bool) -> dict[str, float]:
    """Return images/s of training and of evaluation, and the peak of memory in GB."""
    execution = replace(make_execution(config.execution), cuda_graphs=cuda_graphs)
    images, size = STEPS * config.optimiser.batch_size, config.data.image_size
    classes = tuple(map(str, range(10)))
    dataset = Dataset("random", "", classes, random_split(images, size), None, random_split(images, size))
    epochs = list(Training(config, dataset, execution))[WARM_UP:]
    rates = {
        what: statistics.median(metrics[f"throughput/{what}_images_per_second"] for metrics in epochs)
        for what in ("train", "evaluate")
    }
    return rates | {"peak": torch.cuda.max_memory_reserved() / 1e9}


def measure_timm(image_size: int, batch_size: int, compiled: bool) -> dict[str, float]:
    """Return the figures of `measure` for timm's network in a plain loop."""
    import timm

    device = torch.device("cuda")
    model = timm.create_model("efficientnetv2_s", num_classes=10).to(device, memory_format=torch.channels_last)
    network = torch.compile(model) if compiled else model
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    images = torch.rand(batch_size, 3, image_size, image_size, device=device)
    images, labels = images.contiguous(memory_format=torch.channels_last), torch.zeros(batch_size, dtype=torch.int64)
    labels = labels.to(device)

    def epoch() -> float:
        started = time.perf_counter()
        for _ in range(STEPS):
            optimiser.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                logits = network(images)
            torch.nn.functional.cross_entropy(logits.float(), labels).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
        torch.cuda.synchronize()
        return STEPS * batch_size / (time.perf_counter() - started)

    rates = [epoch() for _ in range(EPOCHS)][WARM_UP:]
    peak = torch.cuda.max_memory_reserved() / 1e9
    return {"train": statistics.median(rates), "evaluate": math.nan, "peak": peak}


@click.command()
@click.option("--variant", default="default", show_default=True, help="The architecture.")
@click.option("--image-size", default=32, show_default=True, help="Side of the images in pixels.")
@click.option("--batch-size", default=128, show_default=True, help="Images per step.")
@click.option("--form", default="", hidden=True)
def main(variant: str, image_size: int, batch_size: int, form: str) -> None:
    """Measure and print a table."""
    if form in TIMM:
        click.echo(json.dumps(measure_timm(image_size, batch_size, TIMM[form])))
        return
    if form:
        precision, how = FORMS[form]
        config = TrainConfig.model_validate(
            {
                "data": {"image_size": image_size, "validation_fraction": 0},
                "model": {"variant": variant},
                "optimiser": {"batch_size": batch_size},
                "schedule": {"epochs": EPOCHS},
                "evaluation": {"batch_size": batch_size},
                "execution": {"device": "cuda", "precision": precision},
            }
        )
        click.echo(json.dumps(measure(config, bool(how))))
        return
    click.echo(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {image_size}x{image_size}, {batch_size}\n")
    click.echo("| form | training, images/s | times fp32 | evaluation, images/s | times fp32 | peak GB |")
    click.echo("|---|---|---|---|---|---|")
    base: dict[str, float] = {}
    for name in [*FORMS, *(TIMM if variant == "default" else ())]:
        words = ["--variant", variant, "--image-size", image_size, "--batch-size", batch_size, "--form", name]
        done = subprocess.run([sys.executable, __file__, *map(str, words)], stdout=subprocess.PIPE, check=True)  # noqa: S603
        found: dict[str, float] = json.loads(done.stdout)
        base = base or found
        cells = (f"{found[what]:.0f} | {found[what] / base[what]:.2f}" for what in ("train", "evaluate"))
        click.echo(f"| {name} | {' | '.join(cells)} | {found['peak']:.2f} |")


if __name__ == "__main__":
    main()
