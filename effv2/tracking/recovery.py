"""What dead processes left: entries that the tracking store lacks are sent, runs left open are marked KILLED."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import mlflow

from effv2.core.paths import outbox_folder
from effv2.core.processes import is_gone
from effv2.core.reporter import Message
from effv2.tracking.entries import Entry, deliver, is_missing, is_refusal
from effv2.tracking.journal import Journal
from effv2.tracking.outbox import MOST_AT_ONCE, REFUSED
from effv2.tracking.run import TrackedRun
from effv2.tracking.store import TRACKING_ERRORS, TrackingError, open_store, reason, store_name
from effv2.tracking.tags import PROCESS


@dataclass(frozen=True)
class Sending:
    """What became of a run's journal: there was none, its process lives, or it was sent, put aside, or waits."""

    end: Literal["none", "busy", "sent", "refused", "waits"]
    store: str = ""  # that it waits for, where that isn't the one in use


def open_experiment(experiment: str, message: Message, create: bool = True) -> str:
    """Open the tracking store as `open_store` does, after which nothing is left in it by dead processes."""
    experiment_id = open_store(experiment, create)
    send_all(message)
    for run in mlflow.MlflowClient().search_runs([experiment_id], "attributes.status = 'RUNNING'"):
        if is_gone(run.data.tags.get(PROCESS, "")):
            with suppress(*TRACKING_ERRORS):  # what matters more will fail next, and say so
                TrackedRun(run.info.run_id, experiment_id).end_left_open()
    return experiment_id


def left() -> list[str]:
    """Return the runs that have a journal here, of dead processes and of living ones."""
    found = outbox_folder().glob("*/journal")
    return sorted(path.parent.name for path in found if path.parent.suffix != REFUSED)


def send_all(message: Message) -> list[Sending]:
    """Send what dead processes on this machine left for the tracking store in use."""
    return [send(run_id, message) for run_id in left()]


def send(run_id: str, message: Message) -> Sending:
    """Send the journal that a dead process left of a run, and end the run, which nobody works on, if it is open."""
    folder = outbox_folder() / run_id
    if not (folder / "journal").exists():
        return Sending("none")
    try:
        journal = Journal.take_over(folder)
        if journal is None:
            return Sending("busy")
        header, entries, damaged = journal.read()
        store = str(header.get("store", store_name()))
        if store != store_name():
            journal.close()
            return Sending("waits", store)
        try:
            refusal = _deliver(run_id, str(header.get("process", "")), entries, journal)
        except BaseException:
            journal.close()
            raise
    except Exception as error:  # one journal must not keep commands from their work
        message(f"What the run {run_id} had logged can't be sent ({reason(error)}); it stays in {folder}.")
        return Sending("waits")
    if refusal is not None:
        aside = journal.put_aside(REFUSED)
        message(
            f"The tracking store refused some of what the run {run_id} had logged ({reason(refusal)}): see {aside}."
        )
        return Sending("refused")
    journal.remove()
    message(f"Sent what the run {run_id} had logged before its process ended.")
    if damaged:
        message(f"{damaged} of its entries were damaged on the disk and are left out.")
    return Sending("sent")


def is_busy(run_id: str) -> bool:
    """Say whether a living process of this machine works on the run."""
    try:
        journal = Journal.take_over(outbox_folder() / run_id)
    except FileNotFoundError:
        return False
    if journal is not None:
        journal.close()
    return journal is None


def _deliver(run_id: str, process: str, entries: list[Entry], journal: Journal) -> Exception | None:
    """Deliver what a dead process left; return the first refusal, after which the rest was delivered all the same."""
    try:
        now = mlflow.MlflowClient().get_run(run_id).data.tags.get(PROCESS, "")
    except TrackingError as error:
        if not is_missing(error):
            raise
        return error  # the run was deleted for good, or its store begun anew
    own = bool(process) and process == now  # else another one went on with the run: what that says of it stands
    wanted = _without_old_discards(entries) if own else [entry for entry in entries if entry.kind == "metrics"]
    refusal: Exception | None = None
    for begin in range(0, len(wanted), MOST_AT_ONCE):
        some = wanted[begin : begin + MOST_AT_ONCE]
        refused = _deliver_some(run_id, some)
        refusal = refusal or refused
        if refusal is None:
            journal.delivered(some)
    if own and refusal is None:
        TrackedRun(run_id, "").end_left_open()
    return refusal


def _deliver_some(run_id: str, entries: list[Entry]) -> Exception | None:
    """Deliver entries, one by one where the store refuses them together; return the first refusal."""
    refusal: Exception | None = None
    try:
        deliver(run_id, entries, again=True)
    except Exception as error:
        if not is_refusal(error):
            raise
        if len(entries) == 1:
            return error
        for entry in entries:
            refused = _deliver_some(run_id, [entry])
            refusal = refusal or refused
    return refusal


def _without_old_discards(entries: list[Entry]) -> list[Entry]:
    """Leave out all but the last discard of a name: an earlier one may name what came to stay since."""
    last = {entry.content["name"]: entry for entry in entries if entry.kind == "discard"}
    return [entry for entry in entries if entry.kind != "discard" or last[entry.content["name"]] is entry]
