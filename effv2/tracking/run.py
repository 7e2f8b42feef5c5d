"""One MLflow run: opened, adopted or resumed, filled, and ended with the status it deserves."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import RunInfo
from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING
from mlflow.tracking.context.registry import resolve_tags

from effv2.core.errors import LeaseLost, RunError, Terminated
from effv2.core.processes import is_gone, this_process
from effv2.core.reporter import Message
from effv2.tracking.sender import Item, Sender, Values, send_values
from effv2.tracking.store import TRACKING_ERRORS, TrackingAway, answers, open_store, shown_uri
from effv2.tracking.tags import CONTINUES, ERROR, OUTCOME, PARENT, PID, PROCESS, REPORT, RUN_NAME
from effv2.tracking.writer import TrackedRun, discard

PATIENCE = 120.0  # seconds that the end of a run waits for a store that is away
EARLY_PATIENCE = 3.0  # seconds that a run which ends early waits for the store
UPLOAD_PATIENCE = 30.0  # the same, while its last checkpoint is uploaded to a store that answers
CHECKPOINTS = "checkpoints"  # folder of the artifacts: the last checkpoint, for other machines
GENERATED_NAME = re.compile(r"[a-z]+-[a-z]+-\d+")  # what MLflow calls a run that nobody named


class OpenRun(TrackedRun):
    """A run that this process has open. Values are sent by a thread; what has files waits until it is sent.

    TrackingAway where the store is away for `patience` seconds; RunError where the store refuses something for good.
    """

    def __init__(self, info: RunInfo, message: Message, patience: float, resumed: bool) -> None:
        super().__init__(info.run_id, info.experiment_id)
        self.patience, self.completed, self.delivered, self._uploading = patience, False, False, False
        self.sender = Sender(info.run_id, message, resumed)

    def _log(self, values: Values) -> None:
        self.sender.put(values)

    def _call(self, write: Callable[[], None]) -> None:
        self.sender.put(write)
        self.sender.flush(self.patience)

    def ended(self) -> TrackedRun:
        """Return the run for writing to it once it has ended."""
        return TrackedRun(self.run_id, self.experiment_id)

    def complete(self, outcome: str = "complete") -> None:
        """Say that all was logged: from here on the run ends FINISHED, whatever interrupts it."""
        self.set_tags({OUTCOME: outcome})
        self.completed = True

    def upload_checkpoint(self, path: Path) -> None:
        """Upload a checkpoint for other machines, without waiting for it, then delete the one before.

        While the one before still waits to be delivered, nothing is done.
        """
        if self._uploading:
            return
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix="."))  # beside it, so that a link will do
        try:
            (folder / path.name).hardlink_to(path)
        except OSError:
            shutil.copyfile(path, folder / path.name)

        def upload() -> None:
            MlflowClient().log_artifacts(self.run_id, str(folder), CHECKPOINTS)
            discard(self.run_id, CHECKPOINTS, path.name)
            self._uploading = False
            shutil.rmtree(folder, ignore_errors=True)

        self._uploading = True
        self.sender.put(upload)

    def end(self, status: str, error: BaseException | None = None) -> None:
        """Deliver what waits, then the status; past what can't be delivered where an error ended the run.

        One that is told to end, or that the store never took anything of, waits for seconds alone.
        """
        failed = {ERROR: f"{type(error).__name__}: {error}", OUTCOME: "failed"} if status == "FAILED" else {}
        ended = int(time.time() * 1000)
        last: list[Item] = [Values(tags=failed), lambda: MlflowClient().set_terminated(self.run_id, status, ended)]
        uploads = self._uploading and self.sender.trouble is None
        hurries = error is not None and (status_after(error) == "KILLED" or not self.sender.checked)
        seconds = UPLOAD_PATIENCE if uploads else EARLY_PATIENCE if hurries else self.patience
        self.delivered = self.sender.finish(last, seconds)
        if error is None and not self.delivered:
            self.sender.flush(0)
        elif not self.delivered and answers():
            self.set_status("KILLED" if status == "FINISHED" else status)  # finished is what can be read


@contextmanager
def open_run(
    name: str,
    experiment_id: str,
    tags: Mapping[str, str],
    *,
    parent: str = "",
    resumes: str = "",
    message: Message,
    patience: float = PATIENCE,
) -> Iterator[OpenRun]:
    """Open a run, a child of `parent` where that is given, and end it FINISHED, FAILED or KILLED.

    With `resumes`, the run of that id is opened again. A run without a parent adopts the one that `mlflow run` made.
    The end waits `patience` seconds for a store that is away, then TrackingAway is raised. RunError if the store
    refuses something for good.
    """
    known = dict(tags) | {PID: str(os.getpid()), PROCESS: this_process()}
    run = OpenRun(_open(name, experiment_id, known, parent, resumes), message, patience, bool(resumes))
    monitor = _monitor(run.run_id, bool(resumes), message)
    try:
        yield run
        run.sender.flush(patience)
        run.end("FINISHED")
    except BaseException as error:
        complete = run.completed and not isinstance(error, RunError)
        with suppress(*TRACKING_ERRORS, RunError):  # a store that is away must not hide why the run ends
            lost = isinstance(error, LeaseLost) and _is_of_another(run.run_id)
            if not lost and not isinstance(error, TrackingAway):
                run.end("FINISHED" if complete else status_after(error), error)
        raise
    finally:
        run.sender.close()
        if monitor is not None:
            monitor.finish()


def _open(name: str, experiment_id: str, tags: Mapping[str, str], parent: str, resumes: str) -> RunInfo:
    client = MlflowClient()
    adopted = "" if resumes or parent else os.environ.pop("MLFLOW_RUN_ID", "")
    if not (resumes or adopted):
        child = {PARENT: parent} if parent else {}
        return client.create_run(experiment_id, run_name=name, tags={**resolve_tags(), **tags, **child}).info
    run_id = resumes or adopted
    send_values(run_id, [Values(tags=tags)])  # before it is RUNNING under a process that is gone
    client.update_run(run_id, "RUNNING")
    info = client.get_run(run_id).info
    if adopted:
        _name_adopted(info, name)
    return info


def _monitor(run_id: str, resumed: bool, message: Message) -> Any:
    """Log the machine's load to the run where the user asked MLflow for that."""
    if not MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.get():  # type: ignore[no-untyped-call]
        return None
    try:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(run_id, resume_logging=resumed)  # type: ignore[no-untyped-call]
        monitor.start()  # type: ignore[no-untyped-call]
    except Exception as error:  # as MLflow itself does: for want of a package, for one
        message(f"System metrics can't be logged: {error}")
        return None
    return monitor


def _is_of_another(run_id: str) -> bool:
    """Say whether another process has resumed the run."""
    return bool(MlflowClient().get_run(run_id).data.tags.get(PROCESS) != this_process())


def open_experiment(experiment: str, create: bool = True) -> str:
    """Open the tracking store as `open_store` does, and end the runs that dead processes of this machine left open."""
    experiment_id = open_store(experiment, create)
    for run in MlflowClient().search_runs([experiment_id], "attributes.status = 'RUNNING'"):
        if is_gone(run.data.tags.get(PROCESS, "")):
            with suppress(*TRACKING_ERRORS):  # what matters more will fail next, and say so
                end_left_open(run.info.run_id)
    return experiment_id


def end_left_open(run_id: str) -> bool:
    """End a run that its process left open: FINISHED if all was logged, which is returned, KILLED otherwise."""
    run = MlflowClient().get_run(run_id)
    complete = run.data.tags.get(OUTCOME) in ("complete", "pruned")
    if run.info.status == "RUNNING":
        TrackedRun(run_id, run.info.experiment_id).set_status("FINISHED" if complete else "KILLED")
    return complete


def open_parent(name: str, experiment_id: str, tags: Mapping[str, str]) -> TrackedRun:
    """Create the run of a study, or adopt the one that `mlflow run` made.

    Several processes may work on a study, so its run belongs to none of them: whoever ends the study ends it.
    """
    client, adopted = MlflowClient(), os.environ.pop("MLFLOW_RUN_ID", "")
    if not adopted:
        info = client.create_run(experiment_id, run_name=name, tags={**resolve_tags(), **tags}).info
        return TrackedRun(info.run_id, info.experiment_id)
    info = client.get_run(adopted).info
    _name_adopted(info, name)
    run = TrackedRun(info.run_id, info.experiment_id)
    run.set_tags(tags)
    return run


def open_report_run(experiment_id: str) -> TrackedRun:
    """Return the run of an experiment's report: the one that `mlflow run` opened, the last one, or a new one."""
    tags = {REPORT: "true", PROCESS: this_process()}
    known = MlflowClient().search_runs([experiment_id], f"tags.`{REPORT}` = 'true'", max_results=1)
    if os.environ.get("MLFLOW_RUN_ID") or not known:
        return open_parent("report", experiment_id, tags)
    run = TrackedRun(known[0].info.run_id, experiment_id)
    run.set_tags(tags)
    return run


@contextmanager
def working_on(run: TrackedRun) -> Iterator[None]:
    """Mark a run that isn't open in this process as running inside, and end it as the way out of the block deserves."""
    run.set_status("RUNNING")
    try:
        yield
    except BaseException as error:
        with suppress(*TRACKING_ERRORS):  # a store that is away must not hide why the run ends
            if answers():
                run.set_status(status_after(error))
        raise
    run.set_status("FINISHED")


def status_after(error: BaseException) -> str:
    """Return the status of a run that `error` ended."""
    return "KILLED" if isinstance(error, (KeyboardInterrupt, Terminated, LeaseLost)) else "FAILED"


def point_adopted_run_to(run: TrackedRun) -> None:
    """Make the run that `mlflow run` opened, if it did, a pointer to the one that this command resumes or found."""
    if adopted := os.environ.pop("MLFLOW_RUN_ID", ""):
        pointer = TrackedRun(adopted, run.experiment_id)
        pointer.set_tags({CONTINUES: run.run_id})
        pointer.describe(f"This command resumed, or found finished, {run_address(run.run_id, run.experiment_id)}")


def _name_adopted(info: RunInfo, name: str) -> None:
    """Name a run that `mlflow run` made, unless the user did."""
    if GENERATED_NAME.fullmatch(info.run_name or ""):
        MlflowClient().set_tag(info.run_id, RUN_NAME, name)


def run_address(run_id: str, experiment_id: str) -> str:
    """Say where the run can be seen: its page on a server, else the command that opens the UI on the store."""
    uri = shown_uri()
    if uri.startswith("http"):
        return f"{uri.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"
    return f"run {run_id}; see it with: mlflow ui --backend-store-uri {uri}"
