"""The ONNX form of a logged model, compared with the form that runs in torch: answers, speed, size.

    effv2 train --dataset imagenette --data-dir DATA --image-size 32 --per-class 100 --epochs 10
    python benchmarks/onnx_export.py models:/ID DATA/imagenette2-160/val

Compares the answers on all images of a folder. Times both forms in one process, for single images and batches of 32.
Installs the requirements of both in new environments, and serves one image with the ONNX form in its environment. Then
deletes the environments.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import numpy as np

from effv2.tracking.models import export_onnx

BATCH, TIMED, WARM_UP = 32, 103, 3  # images per batch, timed calls, and those of them that are discarded
Answers = list[dict[str, Any]]


def milliseconds(function: Callable[[Any], Any], inputs: Iterable[Any]) -> float:
    """Return the median milliseconds per call, without the first few."""
    found = []
    for each in inputs:
        began = time.perf_counter()
        function(each)
        found.append(1e3 * (time.perf_counter() - began))
    return statistics.median(found[WARM_UP:])


def probabilities(answers: Answers) -> np.ndarray:
    """Return the probabilities (N, columns) of the answers."""
    return np.array([list(answer["probabilities"].values()) for answer in answers])


def compare(forms: dict[str, Any], paths: list[Path], size: int) -> None:
    """Print how the answers of both forms differ, and their times for images of `size` pixels."""
    batches = [paths[start : start + BATCH] for start in range(0, len(paths), BATCH)]
    pixels = np.random.default_rng(0).integers(0, 256, (TIMED, BATCH, 3, size, size), dtype=np.uint8)
    answers = []
    for name, model in forms.items():
        answers.append([answer for batch in batches for answer in model.predict(batch)])
        network = model.unwrap_python_model().network
        whole = milliseconds(model.predict, ([path] for path in paths[:TIMED]))
        batched = milliseconds(model.predict, batches[:-1]) / BATCH
        bare = milliseconds(network, pixels[:, :1]), milliseconds(network, pixels) / BATCH
        click.echo(
            f"{name}: milliseconds per image, singly and in batches of {BATCH}: from a file on {whole:.2f} and "
            f"{batched:.2f}, of the network only {bare[0]:.2f} and {bare[1]:.2f}"
        )
    torch, onnx = answers
    labels = [[answer["label"] for answer in each] for each in (torch, onnx)]
    differing = sum(ours != theirs for ours, theirs in zip(*labels, strict=True))
    largest = np.abs(probabilities(torch) - probabilities(onnx)).max()
    click.echo(f"{differing} of {len(paths):,} predictions differ, probabilities by at most {largest:.1e}")
    click.echo(f"({len(set(labels[0]))} classes are predicted)")


def environment(requirements: Path, place: Path) -> Path:
    """Install requirements in a new environment, print its size, return its Python."""
    subprocess.run([sys.executable, "-m", "venv", place], check=True)  # noqa: S603
    python = place / "bin" / "python"
    install: list[str | Path] = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir", "-r", requirements]
    subprocess.run(install, check=True)  # noqa: S603
    packages = next(place.glob("lib/python*/site-packages"))
    sizes = {
        path.name: sum(file.lstat().st_size for file in (path, *path.rglob("*"))) / 1e6 for path in packages.iterdir()
    }
    cuda = sum(size for name, size in sizes.items() if name in ("nvidia", "triton"))
    click.echo(f"environment of {requirements}: {sum(sizes.values()):,.0f} MB, of which CUDA's {cuda:,.0f}")
    return python


def serve(python: Path, folder: Path, image: Path) -> Answers:
    """Serve a folder with the MLflow of an environment; return its answer to an image."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["-m", "mlflow", "models", "serve", "--model-uri", str(folder), "--env-manager", "local", "-p", str(port)]
    path = {"PATH": f"{python.parent}:{os.environ['PATH']}"}
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command: list[str | Path] = [python, *words]
    with subprocess.Popen(command, env=outside | path, cwd=folder, start_new_session=True) as server:  # noqa: S603
        try:
            began = time.monotonic()
            while server.poll() is None:
                with suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=1).close()
                    break
                time.sleep(0.1)
            click.echo(f"served after {time.monotonic() - began:.1f} s")
            body = json.dumps({"inputs": [base64.b64encode(image.read_bytes()).decode()]}).encode()
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", body, headers)
            with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
                found: Answers = json.load(answer)["predictions"]
                return found
        finally:
            os.killpg(server.pid, 15)


@click.command()
@click.argument("model")
@click.argument("images", type=click.Path(path_type=Path))
@click.option("--environments/--no-environments", default=True, show_default=True, help="Install and measure both.")
def main(model: str, images: Path, environments: bool) -> None:
    """Export, compare, time, install and serve."""
    import mlflow.pyfunc
    from mlflow.artifacts import download_artifacts

    paths = sorted(path for path in images.rglob("*") if path.is_file())
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "onnx")
        began = time.perf_counter()
        export_onnx(model, folder)
        size = (folder / "artifacts" / "model.onnx").stat().st_size / 1e6
        click.echo(f"exported in {time.perf_counter() - began:.0f} s, {size:.1f} MB")
        logged = Path(download_artifacts(artifact_uri=model, dst_path=str(Path(place, "torch"))))
        forms = {"torch": mlflow.pyfunc.load_model(str(logged)), "ONNX": mlflow.pyfunc.load_model(str(folder))}
        compare(forms, paths, forms["ONNX"].unwrap_python_model().settings["image_size"])
        if environments:
            python = environment(folder / "requirements.txt", Path(place, "small"))
            (served,), (expected,) = serve(python, folder, paths[0]), forms["ONNX"].predict(paths[:1])
            click.echo(f"served without torch: {'the same answer' if served == expected else 'another answer'}")
            environment(logged / "requirements.txt", Path(place, "large"))


if __name__ == "__main__":
    main()
