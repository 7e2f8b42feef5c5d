"""The capacity of an MLflow server: processes log runs as fast as they can, without training.

    MLFLOW_TRACKING_URI=http://127.0.0.1:5000 python benchmarks/server_load.py [--clients 4]

Each client logs runs as `train` does: parameters, tags, the metrics of each epoch, a summary. Prints the epochs per
second of all clients and the seconds of a call. The first figure limits how many workers a server can serve.
"""

from __future__ import annotations

import json
import statistics
import time
from multiprocessing import get_context
from typing import Any

import click

from effv2.config.schema import TrainConfig
from effv2.tracking.run import open_run
from effv2.tracking.store import open_store
from effv2.tracking.writer import TrackedRun

EPOCH_METRICS = 13


def log_runs(runs: int, epochs: int, results: Any, start: Any) -> None:
    """Log runs; put the seconds of the call for each epoch into `results`."""
    experiment = open_store("server_load")
    metrics = {f"metric/{number}": 0.5 for number in range(EPOCH_METRICS)}
    seconds = []
    start.wait()
    for number in range(runs):
        tags = {f"tag.{name}": "value" for name in range(20)}
        with open_run(f"run {number}", experiment, tags, message=print) as opened:
            run = TrackedRun(opened.run_id, experiment)  # directly to the server, without the sender's thread
            run.log_params(TrainConfig().flat())
            for epoch in range(1, epochs + 1):
                began = time.perf_counter()
                run.log_metrics(metrics, step=epoch)
                seconds.append(time.perf_counter() - began)
            run.log_metrics(metrics)
    results.put(seconds)


@click.command()
@click.option("--clients", default=4, show_default=True, help="Processes that log.")
@click.option("--runs", default=5, show_default=True, help="Runs per process.")
@click.option("--epochs", default=40, show_default=True, help="Epochs per run.")
def main(clients: int, runs: int, epochs: int) -> None:
    """Measure and print one line of JSON."""
    open_store("server_load")
    context = get_context("spawn")
    results, start = context.Queue(), context.Barrier(clients + 1)
    processes = [context.Process(target=log_runs, args=(runs, epochs, results, start)) for _ in range(clients)]
    for process in processes:
        process.start()
    start.wait()
    began = time.perf_counter()
    seconds = [second for _ in processes for second in results.get()]
    elapsed = time.perf_counter() - began
    for process in processes:
        process.join()
    figures = {
        "clients": clients,
        "epochs per second, whole runs": round(clients * runs * epochs / elapsed, 1),
        "median seconds per epoch": round(statistics.median(seconds), 4),
        "95th percentile": round(statistics.quantiles(seconds, n=20)[-1], 4),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
