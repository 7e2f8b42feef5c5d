"""What dead processes left: entries that the tracking store lacks are sent, runs left open are marked KILLED."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import mlflow

from effv2.liveness import is_gone
from effv2.places import outbox_folder
from effv2.tracking.entries import PROCESS, Entry, deliver
from effv2.tracking.journal import Journal
from effv2.tracking.outbox import MOST_AT_ONCE, REFUSALS
from effv2.tracking.run import TrackedRun
from effv2.tracking.store import TRACKING_ERRORS, TrackingError, open_store, reason, store_name

Remark = Callable[[str], None]
REFUSED = ".refused"  # suffix of a journal that the store wants nothing of


def open_experiment(experiment: str, remark: Remark) -> str:
    """Open the tracking store as `open_store` does, after which nothing is left in it by dead processes."""
    experiment_id = open_store(experiment)
    send_all(remark)
    for run in mlflow.MlflowClient().search_runs([experiment_id], "attributes.status = 'RUNNING'"):
        if is_gone(run.data.tags.get(PROCESS, "")):
            with suppress(*TRACKING_ERRORS):  # what matters more will fail next, and say so
                TrackedRun(run.info.run_id, experiment_id).end_left_open()
    return experiment_id


@dataclass
class Sent:
    """How many journals were sent, and the stores (without passwords) that others wait for."""

    journals: int = 0
    waiting: tuple[str, ...] = ()


def left() -> list[str]:
    """Return the runs that have a journal here, of dead processes and of living ones."""
    found = outbox_folder().glob("*/journal")
    return sorted(path.parent.name for path in found if path.parent.suffix != REFUSED)


def send_all(remark: Remark) -> Sent:
    """Send what dead processes on this machine left for the tracking store in use."""
    ends = [send(run_id, remark) for run_id in left()]
    return Sent(ends.count(""), tuple(store for store in ends if store))


def send(run_id: str, remark: Remark) -> str | None:
    """Send the journal that a dead process left of a run, and remove it.

    Return the store that it still waits for, an empty text if none; None where there is none, or its process lives.
    """
    folder = outbox_folder() / run_id
    journal = Journal.take_over(folder) if (folder / "journal").exists() else None
    if journal is None:
        return None
    header, entries, damaged = journal.read()
    store = str(header.get("store", store_name()))
    if store != store_name():
        journal.close()
        return store
    try:
        _deliver(run_id, str(header.get("process", "")), entries, journal)
    except Exception as error:  # one journal must not keep commands from their work
        journal.close()
        if isinstance(error, TrackingError) and error.error_code in REFUSALS:
            refused = folder.rename(_free(folder))
            remark(f"The tracking store wants nothing of the run {run_id} ({reason(error)}); it is kept in {refused}.")
            return ""
        remark(f"What the run {run_id} had logged can't be sent ({reason(error)}); it stays in {folder}.")
        return store
    journal.remove()
    remark(f"Sent what the run {run_id} had logged before its process ended.")
    if damaged:
        remark(f"{damaged} of its entries were damaged in {folder} and are left out.")
    return ""


def is_busy(run_id: str) -> bool:
    """Say whether a living process of this machine works on the run."""
    folder = outbox_folder() / run_id
    if not (folder / "journal").exists():
        return False
    journal = Journal.take_over(folder)
    if journal is not None:
        journal.close()
    return journal is None


def _deliver(run_id: str, process: str, entries: list[Entry], journal: Journal) -> None:
    """Deliver what a dead process left, and end its run if it is open: who held the journal's lock is gone."""
    now = mlflow.MlflowClient().get_run(run_id).data.tags.get(PROCESS, "")
    of_another = bool(process and now and now != process)  # which went on with the run: what it says of it stands
    if of_another:
        entries = [entry for entry in entries if entry.kind == "metrics"]
    for begin in range(0, len(entries), MOST_AT_ONCE):
        some = entries[begin : begin + MOST_AT_ONCE]
        deliver(run_id, some, again=True)
        journal.delivered(some)
    if not of_another:
        TrackedRun(run_id, "").end_left_open()


def _free(folder: Path) -> Path:
    """Return a name for a refused journal that isn't taken."""
    number = 0
    while (path := folder.with_name(f"{folder.name}-{number}{REFUSED}")).exists():
        number += 1
    return path
