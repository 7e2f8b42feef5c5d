"""The worker processes of a study on this machine: started, watched, replaced, ended."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import SpawnProcess

import torch

from effv2.core.errors import RunError
from effv2.core.reporter import Reporter
from effv2.studies.progress import progress_of
from effv2.studies.queue import Queue
from effv2.studies.session import Session
from effv2.studies.worker import AWAY, worker_process

WATCH_SECONDS = 0.5
MOST_IN_VAIN = 3  # ends of workers, for each of them, in which no run was finished
ENDING_SECONDS = 60  # so long workers may take to end once they were told


def supervise(session: Session, queue: Queue, workers: int, reporter: Reporter) -> None:
    """Start worker processes and watch until all wanted trials are finished; replace those that end before."""
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // workers)

    def start(index: int) -> SpawnProcess:
        process = context.Process(target=worker_process, args=(session, threads), daemon=True)
        with _own_accelerator(index), _deaf_to_the_keyboard():
            process.start()
        return process

    processes: list[SpawnProcess] = []
    finished, in_vain = 0, 0
    try:
        processes += map(start, range(workers))
        while unfinished := queue.unfinished():
            reporter.study_progress(progress_of(session.plan, queue.trials()))
            if len(session.plan.slots) - len(unfinished) > finished:
                finished, in_vain = len(session.plan.slots) - len(unfinished), 0
            for index, process in enumerate(processes):
                if process.exitcode == AWAY:
                    raise RunError(
                        "The storage or the tracking store is away; start it and give the same command again."
                    )
                if process.exitcode is not None:
                    in_vain += 1
                    if in_vain > MOST_IN_VAIN * workers:
                        raise RunError("Workers end before they finish a run; see above why, then go on.")
                    reporter.message("A worker has ended too early; another one takes its place.")
                    processes[index] = start(index)
            time.sleep(WATCH_SECONDS)
    finally:
        _stop(processes)
    reporter.study_progress(progress_of(session.plan, queue.trials()))


def _stop(processes: list[SpawnProcess]) -> None:
    """Tell workers to end, which give back what they work on, and see to it that they do."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + ENDING_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.exitcode is None:
            process.kill()
            process.join()


@contextmanager
def _deaf_to_the_keyboard() -> Iterator[None]:
    """Let a process started inside ignore Ctrl-C, which reaches a whole group: this one ends it in order."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _own_accelerator(index: int) -> Iterator[None]:
    """Let a process that is started inside see one of the visible GPUs, where there are several."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
    if len(devices) < 2:
        yield
        return
    os.environ["CUDA_VISIBLE_DEVICES"] = devices[index % len(devices)]
    try:
        yield
    finally:
        if visible is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
