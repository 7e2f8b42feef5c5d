"""One MLflow run: opened, adopted or resumed, filled, and ended with the right status."""

import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from mlflow.entities import RunTag
from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING
from mlflow.tracking.context.registry import resolve_tags

from effv2.core.errors import LeaseLost, RunError
from effv2.core.processes import is_gone, this_process, uninterrupted
from effv2.core.reporter import Message
from effv2.core.secrets import masked, masked_values
from effv2.tracking.read import find_runs
from effv2.tracking.sender import Sender
from effv2.tracking.store import TRACKING_ERRORS, MlflowClient, TrackingAway, answers, open_store
from effv2.tracking.tags import CREATION, ERROR, LONGEST_TAG, OUTCOME, PARENT, PID, PROCESS, REPORT, RUN_NAME
from effv2.tracking.writer import Item, TrackedRun, discard, status_after

PATIENCE = 120.0  # seconds that the end of a run waits for an unreachable store
EARLY_PATIENCE = 3.0  # seconds that a run that ends early waits for the store
UPLOAD_PATIENCE = 30.0  # the same, while its last checkpoint is uploaded to a store that answers
CHECKPOINTS = "checkpoints"  # folder of the artifacts: the last checkpoint, for other machines
GENERATED_NAME = re.compile(r"[a-z]+-[a-z]+-\d+")  # MLflow's tag for a run without a name from the user


class OpenRun(TrackedRun):
    """A run that this process has open. A thread sends its values until it ends. Calls with files wait for the thread.

    TrackingAway if the store is away for `patience` seconds; RunError if the store permanently refuses something.
    """

    def __init__(self, run_id: str, experiment_id: str, message: Message, patience: float, resumed: bool) -> None:
        super().__init__(run_id, experiment_id)
        self.patience, self.resumed = patience, resumed
        self.completed, self.delivered, self._uploading = False, False, False
        self.sender = Sender(run_id, message, resumed)

    def _send(self, *items: Item) -> None:
        if self.sender.closed:
            super()._send(*items)
            return
        self.sender.put(*items)
        if any(map(callable, items)):
            self.sender.flush(self.patience)

    def complete(self, outcome: str = "complete") -> None:
        """Declare that everything is logged. From here on, the run ends FINISHED, even if it is interrupted."""
        self.set_tags({OUTCOME: outcome})
        self.completed = True

    def upload_checkpoint(self, path: Path) -> None:
        """Upload a checkpoint for other machines in the background, and replace the last, unless that still waits."""
        if self._uploading:
            return
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix="."))  # next to it, so that a hard link suffices
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
        """Deliver waiting values, then the status. After an error, values that can't be delivered are skipped.

        After an ending signal, or if the store never accepted anything of the run, this waits only for seconds.
        """
        ended = int(time.time() * 1000)
        last: list[Item] = [lambda: MlflowClient().set_terminated(self.run_id, status, ended)]
        if status == "FAILED":
            why = masked(f"{type(error).__name__}: {error}")[:LONGEST_TAG]
            last = [RunTag(ERROR, why), RunTag(OUTCOME, "failed"), *last]
        uploads = self._uploading and self.sender.trouble is None
        briefly = error is not None and (status_after(error) == "KILLED" or not self.sender.checked)
        seconds = UPLOAD_PATIENCE if uploads else EARLY_PATIENCE if briefly else self.patience
        self.delivered = self.sender.finish(last, seconds)
        if error is None and not self.delivered:
            self.sender.flush(0)
        elif not self.delivered and answers():
            self.set_status("KILLED" if status == "FINISHED" else status)  # a finished run must be readable


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
    """Begin a run as `begin_run` does, and end it FINISHED, FAILED or KILLED. Raises the errors of OpenRun."""
    known = {**tags, PID: str(os.getpid()), PROCESS: this_process()}
    begun = run = monitor = None
    try:
        with uninterrupted():
            begun = begin_run(name, experiment_id, known, parent, resumes)
            run = OpenRun(begun.run_id, experiment_id, message, patience, bool(resumes))
        monitor = _monitor(run.run_id, bool(resumes), message)
        yield run
        run.sender.flush(patience)
        run.end("FINISHED")
    except BaseException as error:
        with suppress(*TRACKING_ERRORS, RunError):  # an unreachable store must not hide why the run ends
            if run is not None:
                _end_early(run, error)
            elif begun is not None:
                begun.set_status(status_after(error))
        raise
    finally:
        if run is not None:
            run.sender.close()
        if monitor is not None:
            monitor.finish()


def _end_early(run: OpenRun, error: BaseException) -> None:
    """End a run after an error, unless another process has resumed it, or it has already waited in vain."""
    lost = isinstance(error, LeaseLost)
    ours = not lost or MlflowClient().get_run(run.run_id).data.tags.get(PROCESS) == this_process()
    if ours and not isinstance(error, TrackingAway):
        complete = run.completed and not isinstance(error, RunError)
        run.end("FINISHED" if complete else status_after(error), error)


def begin_run(
    name: str, experiment_id: str, tags: Mapping[str, str], parent: str = "", resumes: str = ""
) -> TrackedRun:
    """Return a RUNNING run: the one with the id `resumes`, that of `mlflow run`, or a new one.

    A child of `parent` adopts no run. Several processes may work on a study, so its run belongs to none of them: the
    process that ends the study ends it.
    """
    client, adopted = MlflowClient(), "" if parent or resumes else os.environ.pop("MLFLOW_RUN_ID", "")
    run = TrackedRun(resumes or adopted, experiment_id)
    if not run.run_id:
        known = {**masked_values(resolve_tags()), **tags, **({PARENT: parent} if parent else {})}
        return TrackedRun(_create_run(experiment_id, name, known), experiment_id)
    if adopted and GENERATED_NAME.fullmatch(client.get_run(adopted).info.run_name or ""):  # the user gave no name
        tags = {**tags, RUN_NAME: name}
    ended = dict.fromkeys((OUTCOME, ERROR), "") if resumes else {}  # of the attempt before
    run.set_tags({**ended, **tags})  # otherwise it would be RUNNING for a process that is gone
    client.update_run(run.run_id, "RUNNING")
    return run


def _create_run(experiment_id: str, name: str, tags: dict[str, str]) -> str:
    """Create a run and return its id. If answers of the server were lost, delete the additional runs."""
    client, creation = MlflowClient(), uuid.uuid4().hex
    run_id = str(client.create_run(experiment_id, tags={**tags, CREATION: creation}, run_name=name).info.run_id)
    for twin in client.search_runs([experiment_id], f"tags.`{CREATION}` = '{creation}'"):
        if twin.info.run_id != run_id:
            client.delete_run(twin.info.run_id)
    return run_id


def _monitor(run_id: str, resumed: bool, message: Message) -> Any:
    """Log the machine's load to the run, if the user turned this on in MLflow."""
    try:
        if not MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.get():  # type: ignore[no-untyped-call]
            return None
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(run_id, resume_logging=resumed)  # type: ignore[no-untyped-call]
        monitor.start()  # type: ignore[no-untyped-call]
    except Exception as error:  # as MLflow itself does, for example if a package is missing
        message(f"System metrics can't be logged: {error}")
        return None
    return monitor


def open_experiment(experiment: str, message: Message, create: bool = True) -> str:
    """Open the tracking store as `open_store` does, and end runs that dead processes of this machine left open."""
    experiment_id = open_store(experiment, create, message)
    for run in find_runs(experiment_id, {}, running=True):
        if is_gone(run.tags.get(PROCESS, "")):
            with suppress(*TRACKING_ERRORS):  # a more important call will fail next, with a message
                end_left_open(run.run_id)
    return experiment_id


def end_left_open(run_id: str) -> bool:
    """End a run that its process left open: FINISHED if everything was logged (which is returned), otherwise KILLED."""
    run = MlflowClient().get_run(run_id)  # read again: its process may just have ended it
    complete = run.data.tags.get(OUTCOME) in ("complete", "pruned")
    if run.info.status == "RUNNING":
        TrackedRun(run_id, run.info.experiment_id).set_status("FINISHED" if complete else "KILLED")
    return complete


def open_report_run(experiment_id: str, message: Message) -> AbstractContextManager[OpenRun]:
    """Open the run for the report of an experiment: the one that `mlflow run` opened, the last one, or a new one."""
    known = MlflowClient().search_runs([experiment_id], f"tags.`{REPORT}` = 'true'", max_results=1)
    last = known[0].info.run_id if known and not os.environ.get("MLFLOW_RUN_ID") else ""
    return open_run("report", experiment_id, {REPORT: "true"}, resumes=last, message=message)
