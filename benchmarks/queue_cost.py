"""The cost of the queue: several processes lease and finish trivial trials.

    python benchmarks/queue_cost.py [--storage postgresql://USER@HOST/DATABASE] [--workers 4] [--trials 200]

Prints the seconds of a worker from the request of a trial to its end, including enqueueing and waiting for other
workers. Prints also the trials per second of all workers. Without --storage, it uses sqlite in a temporary folder.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
import uuid
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
from optuna.study import StudyDirection
from optuna.trial import TrialState

from effv2.studies.queue import Queue
from effv2.studies.storage import open_storage


def work(url: str, study: str, trials: int, results: Any, start: Any) -> None:
    """Lease and finish trials until none is left, then put the seconds of each into `results`."""
    wanted: dict[str, dict[str, Any]] = {str(number): {} for number in range(trials)}
    queue = Queue(open_storage(url), study, 0, lambda _: wanted)
    seconds = []
    start.wait()
    while True:
        began = time.perf_counter()
        lease = queue.lease()
        if lease is None:
            break
        queue.finish(lease, TrialState.COMPLETE, 0.5, "")
        seconds.append(time.perf_counter() - began)
    results.put(seconds)


@click.command()
@click.option("--storage", default="", help="Optuna's storage.  [default: a temporary sqlite file]")
@click.option("--workers", default=4, show_default=True, help="Processes.")
@click.option("--trials", default=200, show_default=True, help="Trials in all.")
def main(storage: str, workers: int, trials: int) -> None:
    """Measure and print one line of JSON."""
    with tempfile.TemporaryDirectory() as folder:
        url = storage or f"sqlite:///{Path(folder, 'optuna.db')}"
        opened = open_storage(url)
        study = f"queue benchmark {uuid.uuid4().hex}"
        study_id = opened.optuna.create_new_study([StudyDirection.MAXIMIZE], study)
        context = get_context("spawn")
        results, start = context.Queue(), context.Barrier(workers + 1)
        processes = [context.Process(target=work, args=(url, study, trials, results, start)) for _ in range(workers)]
        for process in processes:
            process.start()
        start.wait()
        began = time.perf_counter()
        seconds = [second for _ in processes for second in results.get()]
        elapsed = time.perf_counter() - began
        for process in processes:
            process.join()
        assert len(seconds) == trials == len(opened.optuna.get_all_trials(study_id))  # noqa: S101
        opened.optuna.delete_study(study_id)
        opened.close()
    figures = {
        "storage": url.partition(":")[0],
        "workers": workers,
        "trials": trials,
        "median seconds per trial": round(statistics.median(seconds), 4),
        "95th percentile": round(statistics.quantiles(seconds, n=20)[-1], 4),
        "trials per second": round(trials / elapsed, 1),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
