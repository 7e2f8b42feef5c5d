"""The cost of checkpoints and logging for a training.

    python benchmarks/safety_cost.py [--minutes 3]

Trains the default network on digits at 32 pixels with averaged weights and default checkpoints. Starts an MLflow server
and kills it half-way. Prints one line of JSON: the share of the training time for writing checkpoints; seconds and size
of one; milliseconds of the training for logging an epoch (median, 95th percentile, largest), with and without the
server; median seconds of an epoch in both cases.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import numpy as np


@click.command()
@click.option("--minutes", default=3.0, show_default=True, help="Minutes of training, half of them without a server.")
def main(minutes: float) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.chdir(folder)
        with closing(socket.create_server(("127.0.0.1", 0))) as free:
            port = free.getsockname()[1]
        os.environ |= {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}", "EFFV2_CACHE": str(folder / "cache")}
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder / 'm.db'}"]
        command += ["--workers", "1", "--port", str(port)]
        with Path(folder, "log").open("w") as log:
            server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)  # noqa: S603
        try:
            print(json.dumps(measure(60 * minutes, server)))
        finally:
            stop(server)


def stop(server: subprocess.Popen[bytes]) -> None:
    """End a server with all its processes."""
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def measure(seconds: float, server: subprocess.Popen[bytes]) -> dict[str, object]:
    """Train for this time; return the figures."""
    from effv2.config.options import CheckpointOptions
    from effv2.config.schema import TrainConfig
    from effv2.core.errors import StoreAway
    from effv2.data.dataset import load_dataset
    from effv2.execution.resolve import resolve_study
    from effv2.tracking.run import open_run
    from effv2.tracking.store import WAIT_SECONDS, answers, open_store
    from effv2.training.checkpoint import Checkpointer
    from effv2.training.loop import Training

    asked = TrainConfig.model_validate({"optimiser": {"ema_decay": 0.99}, "schedule": {"epochs": 100_000}})
    (config,) = resolve_study([asked], print)
    while not answers():
        time.sleep(WAIT_SECONDS)
    training = Training(config, load_dataset(config.data))
    state = training.state
    costs: list[float] = []

    class Timed(Checkpointer):
        def _write(self, state: Any, step: int) -> Path:
            began = time.perf_counter()
            path = super()._write(state, step)
            costs.append(time.perf_counter() - began)
            return path

    logging: dict[bool, list[float]] = {True: [], False: []}
    epochs: dict[bool, list[float]] = {True: [], False: []}
    try:
        with open_run("safety_cost", open_store(""), {}, message=lambda text: None, patience=0.0) as run:
            checkpointer = Timed(run.run_id, CheckpointOptions(), {}, print)
            run.sender.check()
            began = time.perf_counter()
            training.on_step = lambda step, steps: checkpointer.save_if_due(state, epoch_ended=False)
            for metrics in training:
                there = server.poll() is None
                started = time.perf_counter()
                run.log_metrics(metrics, step=state.progress.epoch)
                logging[there].append(1000 * (time.perf_counter() - started))
                epochs[there].append(metrics["time/epoch_seconds"])
                checkpointer.save_if_due(state, epoch_ended=True)
                gone = time.perf_counter() - began
                if there and gone > seconds / 2:
                    stop(server)
                if gone > seconds:
                    break
            size = max(path.stat().st_size for path in checkpointer.folder.glob("*.pt"))
    except StoreAway:
        pass
    return {
        "checkpoints": len(costs),
        "checkpoint share of training": sum(costs) / state.progress.train_seconds,
        "seconds a checkpoint": statistics.median(costs),
        "megabytes a checkpoint": size / 1e6,
        "logging an epoch, ms": {
            "server there" if there else "server away": {
                "median": statistics.median(values),
                "p95": float(np.quantile(values, 0.95)),
                "largest": max(values),
            }
            for there, values in logging.items()
        },
        "epoch seconds": {
            ("there" if there else "away"): statistics.median(each[1:]) for there, each in epochs.items()
        },
    }


if __name__ == "__main__":
    main()
