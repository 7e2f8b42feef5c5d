"""Real trainings with --seeds auto: a network against itself, and one with a known effect.

    python benchmarks/real_studies.py same 100     # equal arms: how many studies find a difference?
    python benchmarks/real_studies.py effect 20    # one arm has a hundredth of the rate: how many seeds are needed?

A small network on digits, with up to 10 seeds. Each study has its own split and its own seeds.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from click.testing import CliRunner

CONFIG: dict[str, dict[str, Any]] = {
    "data": {"image_size": 8},
    "model": {"variant": "tiny", "table": "F 1 3 1 8 8 1 / M 2 3 2 8 16 1"},
    "schedule": {"epochs": 5, "name": "onecycle"},
    "optimiser": {"batch_size": 64, "lr": 3e-3},
    "execution": {"precision": "fp32", "device": "cpu"},
}
CHANGES: dict[str, dict[str, dict[str, Any]]] = {"same": {}, "effect": {"optimiser": {"lr": 3e-5}}}


def study(kind: str, number: int) -> tuple[str, int]:
    """Run a study; return its answer and the largest number of seeds of an arm."""
    import mlflow
    import torch

    from effv2.cli.main import ablate

    torch.set_num_threads(1)
    folder = Path(tempfile.gettempdir()) / f"real-studies-{os.getpid()}"  # one store for all studies of a process
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    config = {**CONFIG, "data": {**CONFIG["data"], "split_seed": number}}
    arms: dict[str, dict[str, dict[str, Any]]] = {
        "one": {"random": {"seed": 1000 * number}},
        "other": {"random": {"seed": 1000 * number + 500}},
    }
    arms["other"] |= CHANGES[kind]
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"name": f"{kind}-{number}", "config": config, "arms": arms}))
    options = ["--study", str(path), "--seeds", "auto", "--max-seeds", "10", "--log-model", "none"]
    ended = CliRunner().invoke(ablate, options, catch_exceptions=False)
    if ended.exit_code:
        raise RuntimeError(ended.output)
    client = mlflow.MlflowClient()
    (parent,) = client.search_runs(["0"], f"tags.`effv2.study` = '{kind}-{number}' and params.`study.kind` = 'ablate'")
    children = client.search_runs(["0"], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    seeds = Counter(run.data.tags["effv2.arm"] for run in children)
    return parent.data.tags["effv2.answer"], max(seeds.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=CHANGES)
    parser.add_argument("count", type=int)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    began = time.monotonic()
    with ProcessPoolExecutor(given.workers) as pool:
        found = []
        for answer, seeds in pool.map(partial(study, given.kind), range(given.count)):
            found.append((answer, seeds))
            print(answer, flush=True)
    decided = sum("beats" in answer or "worse" in answer for answer, _ in found)
    seeds_each = [seeds for _, seeds in found]
    print(
        f"{given.kind}: {decided} of {given.count} studies say that the arms differ; seeds of an arm: median "
        f"{statistics.median(seeds_each):g}, mean {statistics.fmean(seeds_each):.1f}; "
        f"{(time.monotonic() - began) / 60:.0f} minutes"
    )
