"""Time and size of a report on many runs: `python -m benchmarks.reporting --runs 200`.

The runs are simulated: studies of five arms by ten seeds, with 100 epochs each. They are in a sqlite store. With
--server, an MLflow server on that store is used.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from effv2.config.schema import TrainConfig
from effv2.core.reporter import Reporter
from effv2.evidence.claims import read_claims
from effv2.evidence.publication import publish
from effv2.evidence.quantities import HISTORIES
from tests.servers import Server

PROTOCOL = read_claims().protocols["ablate-imagenette"]
ARMS, SEEDS, EPOCHS = ("default", "mbconv_only", "fused_only", "half_layers", "drop_one"), 10, 100


def make_study(client: MlflowClient, number: int, random: np.random.Generator) -> None:
    """Log a study of simulated runs."""
    parent = client.create_run("0", run_name=f"study {number}").info.run_id
    client.log_batch(parent, params=[Param("study.kind", "ablate"), Param("study.name", f"study {number}")])
    for arm in ARMS:
        for seed in range(SEEDS):
            name = f"{arm}, seed {seed}"
            run_id = client.create_run("0", run_name=name, tags={"mlflow.parentRunId": parent}).info.run_id
            values = TrainConfig().flat() | PROTOCOL.runs | {"model.variant": arm, "random.seed": seed}
            values |= {"optimiser.lr": 1e-4 * (number + 1)}  # one study follows a protocol with claims
            client.log_batch(run_id, params=[Param(key, str(value)) for key, value in values.items()])
            curve = 0.5 * (1 - np.exp(-np.arange(1, EPOCHS + 1) / 20)) + random.normal(0, 0.01, EPOCHS)
            metrics = [Metric(h, float(v), 0, e) for h in HISTORIES for e, v in enumerate(curve, 1)]
            best = [Metric("best/test_accuracy", float(curve.max()), 0, 0), Metric("time/total_train_seconds", 9, 0, 0)]
            client.log_batch(run_id, metrics=metrics + best, tags=[RunTag("effv2.arm", arm)])
            client.set_terminated(run_id)
    client.set_terminated(parent)


def main() -> None:
    """Make the runs, report on them, print seconds and bytes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--server", action="store_true", help="read and log through an MLflow server")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        client, random = MlflowClient(), np.random.default_rng(0)
        for number in range(options.runs // (len(ARMS) * SEEDS)):
            make_study(client, number, random)
        if not options.server:
            measure()
            return
        server = Server(os.environ["MLFLOW_TRACKING_URI"], Path(folder))
        server.start()
        try:
            mlflow.set_tracking_uri(server.uri)
            measure()
        finally:
            server.stop()


def measure() -> None:
    """Report on the experiment."""
    begun = time.monotonic()
    report, _ = publish("", None, Path("out"), Reporter())
    seconds = time.monotonic() - begun
    size = len(report.files["report.html"].encode()) / 1e6
    print(f"{report.summary}\n{seconds:.1f} s, page {size:.2f} MB")


if __name__ == "__main__":
    main()
