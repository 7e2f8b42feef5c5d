"""The speed of effv2 against plain loops over the same images: training, evaluation, start-up, cache, tracking.

    pip install -e '.[benchmark]'
    python benchmarks/speed.py --data-dir <folder of imagenette2-160> [--sizes 32:128,128:64] [--variants default,...]

For every image size and variant, all forms take turns in one process, after a warm-up round:

    effv2     the `train` path: its loop with augmentation, checkpoints and progress, precision=auto
    fp32      the same with precision=fp32
    compiled  the same as effv2 with compiled blocks
    post      as in the post: NCHW, float32, Adam, a DataLoader with 2 workers
    plain     channels last, float32, the images in memory
    plain16   the same under bfloat16 autocast, if the processor computes in bfloat16
    timm      timm's model of the same network in the loop of `plain` (default variant only)
    floor     forward, backward and step of effv2's network, always on the same batch

A round is STEPS training steps and one evaluation pass of each form. Rates are medians over the rounds, with their
extremes. The time of an epoch is computed from them: training on all images, then evaluation of these and of the test
images in eval mode, as in the post. Peak memory is that of a process with a few steps of one form of the default
variant. Writes speed.md, speed.json and speed.png into --out and logs them to MLflow.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import click

from effv2.core.processes import tune_allocator

EFFV2 = ("effv2", "fp32", "compiled", "floor")
FORMS = (*EFFV2, "post", "plain", "plain16", "timm")
STEPS, EVALUATED = 4, 2048
Form = tuple[Callable[[], float], Callable[[], float]]  # seconds per training step, seconds per evaluated image


@dataclass(frozen=True)
class Case:
    """The images and settings of a measurement."""

    data_dir: str
    size: int
    batch: int
    variant: str = "default"


@dataclass
class Rates:
    """Images/s of every round."""

    train: list[float] = field(default_factory=list)
    evaluate: list[float] = field(default_factory=list)


class _Stop(Exception):
    """Ends effv2's loop after enough steps."""


def make_config(case: Case, precision: str, compiled: bool = False) -> Any:
    """Return the resolved configuration: Imagenette, 1000 outputs as the post has them, AdamW without clipping."""
    from effv2.config.schema import TrainConfig
    from effv2.execution.resolve import resolve_study

    groups = {
        "data": {"dataset": "imagenette", "dir": case.data_dir, "image_size": case.size, "validation_fraction": 0},
        "model": {"variant": case.variant, "outputs": 1000},
        "optimiser": {"lr": 1e-4, "batch_size": case.batch, "clip_norm": 0},
        "schedule": {"epochs": 1000},
        "execution": {"precision": precision, "compile": compiled},
    }
    return resolve_study([TrainConfig.model_validate(groups)], lambda text: click.echo(text, err=True))[0]


def effv2_form(config: Any, dataset: Any, folder: Path) -> Form:
    """The training loop as `train` runs it."""
    from effv2.api.console import ConsoleReporter
    from effv2.config.options import CheckpointOptions
    from effv2.training.checkpoint import Checkpointer
    from effv2.training.evaluation import evaluate
    from effv2.training.loop import Training

    training = Training(config, dataset)
    reporter = ConsoleReporter()
    reporter.run_started("speed", config.schedule.epochs)
    checkpointer = Checkpointer("speed", CheckpointOptions(checkpoint_dir=str(folder)), {}, print)
    marks: list[float] = []

    def on_step(step: int, steps: int) -> None:
        reporter.step(1, step, steps, 0.0)
        checkpointer.save_if_due(training.state, epoch_ended=False)
        marks.append(time.perf_counter())
        if len(marks) > STEPS:
            raise _Stop

    training.on_step = on_step

    def train() -> float:
        marks.clear()
        with suppress(_Stop):
            for _ in training:
                marks.clear()  # after the end of an epoch: its evaluation is no step
        return statistics.median(b - a for a, b in pairwise(marks))

    few = _first(dataset.test, EVALUATED)

    def evaluate_some() -> float:
        started = time.perf_counter()
        evaluate(training.network_for_inference(), few, config.evaluation.batch_size)
        return (time.perf_counter() - started) / EVALUATED

    return train, evaluate_some


def floor_form(config: Any, dataset: Any) -> Form:
    """Only forward, backward and optimiser step."""
    import torch
    from torch.nn import functional as F

    from effv2.data.batches import NORMALISATIONS, normalised
    from effv2.execution.device import make_execution
    from effv2.training.loop import TrainState

    execution = make_execution(config.execution)
    state = TrainState(config, dataset, execution)
    positions = torch.arange(config.optimiser.batch_size)
    inputs = normalised(dataset.train.images(positions), NORMALISATIONS["none"], True)
    labels = dataset.train.labels[positions]

    def train() -> float:
        seconds = []
        state.model.train()
        for _ in range(STEPS):
            started = time.perf_counter()
            state.optimiser.zero_grad(set_to_none=True)
            with execution.autocast():
                logits = state.model(inputs)
            F.cross_entropy(logits.float(), labels).backward()
            state.optimiser.step()
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds)

    return train, lambda: float("nan")


def loop_form(kind: str, config: Any, dataset: Any) -> Form:
    """A plain hand-written loop."""
    import torch
    from torch.nn import functional as F

    from effv2.data.batches import NORMALISATIONS, epoch_order, normalised, training_batches

    if kind == "timm":
        import timm

        model = timm.create_model("efficientnetv2_s", num_classes=1000)
    else:
        from effv2.architecture import build_model

        model = build_model(config.model.build_table(), 1000)
    last = kind != "post"
    model = model.to(memory_format=torch.channels_last) if last else model
    optimiser: Any = (torch.optim.AdamW if last else torch.optim.Adam)(model.parameters(), lr=1e-4)
    batch_size, few = config.optimiser.batch_size, _first(dataset.test, EVALUATED)

    def endless() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if kind == "post":
            loader: Any = torch.utils.data.DataLoader(
                cast(Any, _Images(dataset.train)), batch_size, shuffle=True, num_workers=2, persistent_workers=True
            )
            while True:
                yield from loader
        while True:
            for images, labels in training_batches(dataset.train, epoch_order(len(dataset.train), 0, 1), batch_size):
                yield normalised(images, NORMALISATIONS["none"], last), labels

    batches = endless()

    def train() -> float:
        model.train()
        marks = []
        for _ in range(STEPS + 1):
            inputs, labels = next(batches)
            with torch.autocast("cpu", torch.bfloat16, enabled=kind == "plain16"):
                logits = model(inputs)
            loss = F.cross_entropy(logits.float(), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            marks.append(time.perf_counter())
        return statistics.median(b - a for a, b in pairwise(marks))

    def evaluate_some() -> float:
        model.eval()
        started = time.perf_counter()
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=kind == "plain16"):
            for positions in torch.arange(len(few)).split(config.evaluation.batch_size):
                images = few.images(positions)
                model(normalised(images, NORMALISATIONS["none"], last))
        return (time.perf_counter() - started) / EVALUATED

    return train, evaluate_some


def _peak_kilobytes() -> int:
    found = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())  # ru_maxrss begins at the parent's
    return int(found[1]) if found else 0


class _Images:
    """A map-style data set of single images in [0, 1], as torchvision's ToTensor gives them."""

    def __init__(self, split: Any) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        import torch

        image = self.split.images(torch.tensor([index]))[0]
        return image.contiguous().float().div_(255), int(self.split.labels[index])


def _first(split: Any, count: int) -> Any:
    return replace(split, rows=split.rows[:count], labels=split.labels[:count], ids=split.ids[:count])


def make_form(name: str, case: Case, folder: Path) -> Form:
    """Build a form with its own network."""
    from effv2.data.dataset import load_dataset

    config = make_config(case, "fp32" if name == "fp32" else "auto", name == "compiled")
    dataset = load_dataset(config.data)
    if name == "floor":
        return floor_form(config, dataset)
    return effv2_form(config, dataset, folder / name) if name in EFFV2 else loop_form(name, config, dataset)


def measure(case: Case, rounds: int) -> dict[str, Rates]:
    """Let all forms take turns."""
    from effv2.execution.resolve import cpu_has_bf16

    without = {"" if case.variant == "default" else "timm", "" if cpu_has_bf16() else "plain16"}
    names = [name for name in FORMS if name not in without]
    found = {name: Rates() for name in names}
    with tempfile.TemporaryDirectory() as folder:
        forms = {name: make_form(name, case, Path(folder)) for name in names}
        for round_ in range(rounds + 1):
            for name, (train, evaluate) in forms.items():
                seconds, image_seconds = train(), evaluate()
                if round_:
                    found[name].train.append(case.batch / seconds)
                    found[name].evaluate.append(1 / image_seconds)
            click.echo(f"{case.size} pixels, {case.variant}: round {round_} of {rounds}", err=True)
    return found


def peak_gigabytes(name: str, case: Case) -> float:
    """Return the peak memory of a process with a few steps. Plain loops use the system's allocator."""
    words = ["--data-dir", case.data_dir, "--sizes", f"{case.size}:{case.batch}", "--peak", name]
    environment = os.environ | ({} if name in EFFV2 else {"EFFV2_ALLOCATOR": "system"})
    done = subprocess.run([sys.executable, __file__, *words], env=environment, capture_output=True, check=True)  # noqa: S603
    return float(done.stdout)


FIRST_STEP = """
import os, sys
from effv2.api.console import ConsoleReporter
ConsoleReporter.step = lambda *_: os._exit(0)
from effv2.cli.main import main
sys.argv = ["effv2", "train", *sys.argv[1:]]
main()
"""
IMPORTS = """
import torch, mlflow
from effv2.architecture import VARIANTS, build_model
build_model(VARIANTS["default"], 1000)
"""


def start_up(data_dir: str, rounds: int) -> dict[str, float]:
    """Return the median seconds to the first step, with a warm cache and a store, and those of the imports."""
    words = ["--dataset", "imagenette", "--data-dir", data_dir, "--fresh"]
    seconds: dict[str, list[float]] = {"train": [], "imports": []}
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
        for round_ in range(rounds + 1):
            for name, script in (("train", [FIRST_STEP, *words]), ("imports", [IMPORTS])):
                started = time.perf_counter()
                command = [sys.executable, "-c", *script]
                subprocess.run(command, env=environment, cwd=folder, check=True, capture_output=True)  # noqa: S603
                if round_:
                    seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    return medians | {"ratio": medians["train"] / medians["imports"]}


def data_cache(data_dir: str, size: int) -> dict[str, float]:
    """Return the seconds of loading the data set with an empty cache and with a full one."""
    script = (
        "import sys, time\nfrom effv2.config.schema import DataConfig\nfrom effv2.data.dataset import load_dataset\n"
    )
    script += "config = DataConfig(dataset='imagenette', dir=sys.argv[1], image_size=int(sys.argv[2]))\n"
    script += "started = time.perf_counter()\nload_dataset(config)\nprint(time.perf_counter() - started)\n"
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"EFFV2_CACHE": folder}
        words = [sys.executable, "-c", script, data_dir, str(size)]
        runs = [subprocess.run(words, env=environment, capture_output=True, check=True).stdout for _ in range(2)]  # noqa: S603
    return dict(zip(("cold", "warm"), map(float, runs), strict=True))


def logging_an_epoch() -> float:
    """Return the median seconds to log the twelve metrics of an epoch to a sqlite store, as a run does."""
    import mlflow

    from effv2.tracking.run import open_run
    from effv2.tracking.store import open_store

    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        before = mlflow.get_tracking_uri()
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        with open_run("speed", open_store(""), {}, message=lambda text: None, patience=10.0) as run:
            for epoch in range(30):
                started = time.perf_counter()
                run.log_metrics({f"metric/{i}": epoch / (i + 1) for i in range(12)}, step=epoch)
                seconds.append(time.perf_counter() - started)
            run.complete()
        mlflow.set_tracking_uri(before)
    return statistics.median(seconds)


def table(case: Case, found: dict[str, Rates], peaks: dict[str, float]) -> list[str]:
    """Return a Markdown table of the forms, with their ratios to `plain` (medians over the rounds)."""
    from effv2.data.dataset import load_dataset

    dataset = load_dataset(make_config(case, "fp32").data)
    trained, evaluated = len(dataset.train), len(dataset.train) + len(dataset.test)

    def cell(values: list[float], base: list[float]) -> str:
        ratio = statistics.median(a / b for a, b in zip(values, base, strict=True))
        return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f}) | {ratio:.2f}"

    def epoch(rates: Rates) -> list[float]:
        pairs = zip(rates.train, rates.evaluate, strict=True)
        return [trained / (trained / train + evaluated / evaluate) for train, evaluate in pairs]

    plain = found["plain"]
    rows = ["| form | training, images/s | times plain | evaluation, images/s | times plain | epoch, images/s "]
    rows[0] += "| times plain | peak GB |"
    rows.append("|---" * 8 + "|")
    for name, rates in found.items():
        cells = [cell(rates.train, plain.train)]
        cells += (
            ["| "] * 2 if name == "floor" else [cell(rates.evaluate, plain.evaluate), cell(epoch(rates), epoch(plain))]
        )
        cells.append(f"{peaks[name]:.2f}" if name in peaks else "")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    slower = [b / a - 1 for a, b in zip(found["effv2"].train, found["floor"].train, strict=True)]
    rows += ["", f"effv2's path is {100 * statistics.median(slower):+.1f} % slower than its floor (median of pairs)."]
    return rows


def draw(found: dict[str, dict[str, Rates]], path: Path) -> None:
    """Draw the training rates, one group of bars for each size and variant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 1.6 * len(found)), layout="constrained")
    for axes, (title, rates) in zip(figure.subplots(len(found), squeeze=False)[:, 0], found.items(), strict=True):
        medians = [statistics.median(each.train) for each in rates.values()]
        spread = [[m - min(r.train) for m, r in zip(medians, rates.values(), strict=True)]]
        spread.append([max(r.train) - m for m, r in zip(medians, rates.values(), strict=True)])
        axes.barh(list(rates), medians, xerr=spread)
        axes.invert_yaxis()
        axes.set(title=title, xlabel="training, images/s")
    figure.savefig(path, dpi=100)


@click.command()
@click.option("--data-dir", required=True, help="Folder that holds imagenette2-160.")
@click.option("--sizes", default="32:128,128:64", show_default=True, help="Pixels per side and images per step.")
@click.option("--variants", default="default", show_default=True, help="Architecture variants.")
@click.option("--rounds", default=9, show_default=True, help="Rounds after a warm-up round.")
@click.option("--out", default="speed", show_default=True, help="Folder for the results.")
@click.option("--peak", default="", hidden=True)
def main(data_dir: str, sizes: str, variants: str, out: str, **others: Any) -> None:
    """Measure and write the tables."""
    tune_allocator()
    asked = [Case(data_dir, int(size), int(batch)) for size, batch in (each.split(":") for each in sizes.split(","))]
    if others["peak"]:
        with tempfile.TemporaryDirectory() as empty:
            train, _ = make_form(others["peak"], asked[0], Path(empty))
            train()
        click.echo(_peak_kilobytes() / 1e6)
        return
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    lines, found = ["# Speed", ""], {}
    for plain in asked:
        for variant in variants.split(","):
            case = replace(plain, variant=variant)
            title = f"{case.size}x{case.size}, batch {case.batch}, {variant}"
            found[title] = measure(case, others["rounds"])
            peaks = {name: peak_gigabytes(name, case) for name in found[title]} if variant == "default" else {}
            lines += [f"## {title}", "", *table(case, found[title], peaks), ""]
    more = {
        "start-up, seconds": start_up(data_dir, 5),
        "data cache, seconds": data_cache(data_dir, 32),
        "logging an epoch to sqlite, seconds": {"median": logging_an_epoch()},
    }
    for what, figures in more.items():
        lines.append(f"- {what}: " + ", ".join(f"{name} {value:.3g}" for name, value in figures.items()))
    (folder / "speed.md").write_text("\n".join(lines) + "\n")
    rates: dict[str, Any] = {
        title: {name: vars(each) for name, each in forms.items()} for title, forms in found.items()
    }
    (folder / "speed.json").write_text(json.dumps(rates | more, indent=1))
    draw(found, folder / "speed.png")
    click.echo("\n".join(lines))

    import mlflow

    with mlflow.start_run(run_name="speed"):
        for title, forms in found.items():
            for name, each in forms.items():
                key = f"{title.replace(', ', '/')}/{name}/train_images_per_second"
                mlflow.log_metric(key, statistics.median(each.train))
        mlflow.log_artifacts(out)


if __name__ == "__main__":
    main()
