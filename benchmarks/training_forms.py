"""The fastest form of a training step: precision, fast paths, allocator.

    python benchmarks/training_forms.py [--variant default] [--image-size 32] [--batch-size 128] [--rounds 3]

Each form runs once per round in its own process: a warm-up, then steps (forward, backward, AdamW) of EfficientNetV2-S
(or another variant) with 1000 outputs, on random bytes in memory, channels last. Prints a Markdown table: images/s of
training (median of all steps, range of the rounds' medians) and of evaluation, the gain over plain float32, and peak
memory.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import click

# name: (bfloat16, fast paths and fused optimiser, allocator settings)
FORMS = {
    "float32": (False, False, False),
    "bf16": (True, False, False),
    "float32, allocator": (False, False, True),
    "float32, fast paths": (False, True, False),
    "float32, fast paths, allocator": (False, True, True),
    "bf16, fast paths": (True, True, False),
    "bf16, fast paths, allocator": (True, True, True),
}
BATCHES = 4


def measure(form: str, variant: str, size: int, batch: int) -> dict[str, Any]:
    """Return the seconds of each step and of an evaluated batch, and the peak memory of this process in GB."""
    bf16, fast, allocator = FORMS[form]
    if allocator:
        from effv2.core.processes import tune_allocator

        tune_allocator()
    import torch
    from torch.nn import functional as F

    from effv2.architecture import VARIANTS, build_model
    from effv2.execution.fast_paths import use_fast_paths

    torch.manual_seed(0)
    model = build_model(VARIANTS[variant], 1000)
    if fast:
        use_fast_paths(model)
    model = model.to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fast)
    images = torch.randint(0, 256, (BATCHES, batch, size, size, 3), dtype=torch.uint8)
    labels = torch.randint(0, 10, (BATCHES, batch))

    def forward(number: int) -> torch.Tensor:
        inputs = images[number % BATCHES].permute(0, 3, 1, 2).float() / 255
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output: torch.Tensor = model(inputs)
        return output.float()

    def step(number: int) -> None:
        optimiser.zero_grad(set_to_none=True)
        F.cross_entropy(forward(number), labels[number % BATCHES]).backward()
        optimiser.step()

    def timed(function: Any, warm_up: int, count: int) -> list[float]:
        for number in range(warm_up):
            function(number)
        seconds = []
        for number in range(count):
            started = time.perf_counter()
            function(number)
            seconds.append(time.perf_counter() - started)
        return seconds

    steps = 12 if size <= 64 else 5
    training = timed(step, 3, steps)
    model.eval()
    with torch.inference_mode():
        evaluation = timed(forward, 2, steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"training": training, "evaluation": evaluation, "peak": peak}


@click.command()
@click.option("--variant", default="default", show_default=True, help="The architecture.")
@click.option("--image-size", default=32, show_default=True, help="Side of the images in pixels.")
@click.option("--batch-size", default=128, show_default=True, help="Images per step.")
@click.option("--rounds", default=3, show_default=True, help="Measurements of every form.")
@click.option("--form", default="", hidden=True)
def main(variant: str, image_size: int, batch_size: int, rounds: int, form: str) -> None:
    """Measure and print a table."""
    if form:
        click.echo(json.dumps(measure(form, variant, image_size, batch_size)))
        return
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in FORMS}
    for _ in range(rounds):
        for name, results in found.items():
            words = ["--variant", variant, "--image-size", image_size, "--batch-size", batch_size, "--form", name]
            done = subprocess.run([sys.executable, __file__, *map(str, words)], stdout=subprocess.PIPE, check=True)  # noqa: S603
            results.append(json.loads(done.stdout))
    click.echo("| form | training, images/s | times float32 | evaluation, images/s | times float32 | peak GB |")
    click.echo("|---|---|---|---|---|---|")
    base: dict[str, float] = {}
    for name, results in found.items():
        cells = []
        for what in ("training", "evaluation"):
            rates = [batch_size / statistics.median(result[what]) for result in results]
            median = statistics.median(rates)
            base.setdefault(what, median)
            cells.append(f"{median:.0f} ({min(rates):.0f} to {max(rates):.0f}) | {median / base[what]:.2f}")
        click.echo(f"| {name} | {' | '.join(cells)} | {max(result['peak'] for result in results):.2f} |")


if __name__ == "__main__":
    main()
