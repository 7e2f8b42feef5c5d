"""One MLflow run: opened or adopted, filled, and ended with the status it deserves."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import mlflow
from mlflow.entities import RunInfo
from mlflow.exceptions import MlflowException
from mlflow.tracking.context.registry import resolve_tags
from mlflow.tracking.fluent import _active_run_stack, run_id_to_system_metrics_monitor

from effv2.core.errors import LeaseLost, RunError, Terminated
from effv2.core.processes import this_process
from effv2.core.provenance import GitState
from effv2.tracking import entries
from effv2.tracking.entries import Entry, deliver, is_missing
from effv2.tracking.outbox import PATIENCE, Outbox, TrackingAway
from effv2.tracking.store import TRACKING_ERRORS, impatient, shown_uri
from effv2.tracking.tags import (
    CONTINUES,
    ERROR,
    GIT_COMMIT,
    GIT_DIRTY,
    LONGEST_TAG,
    NOTE,
    OUTCOME,
    PID,
    PROCESS,
    REPORT,
    RUN_NAME,
)

EARLY_PATIENCE = 3.0  # seconds that a run which ends early waits for the store
GENERATED_NAME = re.compile(r"[a-z]+-[a-z]+-\d+")  # what MLflow calls a run that nobody named


class TrackedRun:
    """Writes to one run: at once, or through the outbox of the run that this process has open."""

    def __init__(self, run_id: str, experiment_id: str, outbox: Outbox | None = None) -> None:
        self.run_id, self.experiment_id, self._outbox = run_id, experiment_id, outbox
        self.completed = False

    def _write(self, entry: Entry) -> None:
        if self._outbox is None:
            deliver(self.run_id, [entry])
        else:
            self._outbox.put(entry)

    def check(self) -> None:
        """Wait until the store has all that was written so far; RunError if it doesn't take it."""
        if self._outbox is not None:
            self._outbox.check()

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log parameters under dotted names, which never collide with those that `mlflow run` logs."""
        self._write(entries.params(params))

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics, at `step` where they belong to an epoch."""
        self._write(entries.metrics(metrics, step))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags in one call."""
        self._write(entries.tags(tags))

    def describe(self, markdown: str) -> None:
        """Set the description that the UI shows, cut at the last line that fits."""
        if len(markdown) > LONGEST_TAG:
            markdown = markdown[:LONGEST_TAG].rpartition("\n")[0]
        self.set_tags({NOTE: markdown})

    def log_dataset(self, name: str, context: str, digest: str, location: str, profile: Mapping[str, Any]) -> None:
        """Record a data set that the run used as `context` (train, validation or test)."""
        source, about = json.dumps({"uri": location}), json.dumps(dict(profile))
        content = {"name": name, "digest": digest, "source": source, "profile": about, "context": context}
        self._write(Entry("dataset", content))

    def log_git(self, state: GitState | None) -> None:
        """Record commit and dirty flag as tags, the uncommitted changes as an artifact."""
        if state is None:
            return
        self.set_tags({GIT_COMMIT: state.commit, GIT_DIRTY: str(state.dirty).lower()})
        if state.dirty:
            self.log_text(state.diff, "source/uncommitted.diff")

    def log_text(self, text: str, name: str) -> None:
        """Store a text as an artifact."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            self.log_folder(Path(folder))

    def log_folder(self, folder: Path) -> None:
        """Upload everything in `folder` as the run's artifacts."""
        self._write(Entry("artifacts", {}, folder))

    def complete(self) -> None:
        """Say that all was logged: from here on the run ends FINISHED, whatever interrupts its delivery."""
        self.set_tags({OUTCOME: "complete"})
        self.completed = True

    def log_only(self, path: Path, place: str) -> None:
        """Upload a file to the folder `place` of the artifacts, then delete all others there.

        While the one before still waits to be delivered, nothing is done.
        """
        if self._outbox is not None and self._outbox.holds(place):
            return
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:  # so that a link will do
            try:
                Path(folder, path.name).hardlink_to(path)
            except OSError:
                shutil.copyfile(path, Path(folder, path.name))
            self._write(Entry("artifacts", {"place": place}, Path(folder)))
        self._write(Entry("discard", {"name": place, "but": path.name}))

    def params(self) -> dict[str, str]:
        """Return the parameters that were logged."""
        return dict(mlflow.MlflowClient().get_run(self.run_id).data.params)

    def steps(self, name: str) -> set[int]:
        """Return the steps at which a metric was logged."""
        return {each.step for each in mlflow.MlflowClient().get_metric_history(self.run_id, name)}

    def metrics(self) -> dict[str, float]:
        """Return the last value of each metric."""
        values: dict[str, float] = mlflow.MlflowClient().get_run(self.run_id).data.metrics
        return values

    def fetch(self, name: str, folder: Path) -> Path | None:
        """Download an artifact into `folder`; None where the run has none of that name."""
        client = mlflow.MlflowClient()
        above = name.rpartition("/")[0] or None
        if name not in {file.path for file in client.list_artifacts(self.run_id, above)}:
            return None
        return Path(client.download_artifacts(self.run_id, name, str(folder)))

    def names_in(self, place: str) -> list[str]:
        """Return the names of the artifacts in a folder of theirs."""
        found = mlflow.MlflowClient().list_artifacts(self.run_id, place)
        return [PurePosixPath(file.path).name for file in found if not file.is_dir]

    def fetch_folder(self, name: str, folder: Path) -> bool:
        """Download the artifacts in a folder of theirs into `folder`; False where there are none."""
        client, found = mlflow.MlflowClient(), self.names_in(name)
        with tempfile.TemporaryDirectory() as place:
            for each in found:
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy(client.download_artifacts(self.run_id, f"{name}/{each}", place), folder)
        return bool(found)

    def discard(self, name: str) -> None:
        """Delete an artifact, or all in a folder of them, where there are some and the store lets us."""
        self._write(Entry("discard", {"name": name}))

    def set_status(self, status: str) -> None:
        """Set the status of a run that isn't open in this process: RUNNING, FINISHED, FAILED or KILLED.

        One that has it already keeps its end time.
        """
        client = mlflow.MlflowClient()
        if client.get_run(self.run_id).info.status == status:
            return
        if status == "RUNNING":
            client.update_run(self.run_id, status)
        else:
            client.set_terminated(self.run_id, status)

    def end_left_open(self) -> bool:
        """End a run that its process left open: FINISHED if all was logged, which is returned, KILLED otherwise."""
        run = mlflow.MlflowClient().get_run(self.run_id)
        complete = run.data.tags.get(OUTCOME) == "complete"
        if run.info.status == "RUNNING":
            self.set_status("FINISHED" if complete else "KILLED")
        return complete

    def is_running(self) -> bool:
        """Say whether the run is marked as running."""
        return bool(mlflow.MlflowClient().get_run(self.run_id).info.status == "RUNNING")

    def tags(self) -> dict[str, str]:
        """Return the tags."""
        return dict(mlflow.MlflowClient().get_run(self.run_id).data.tags)

    def model_address(self) -> str:
        """Return the address of the model that was logged, empty where there is none."""
        return entries.model_address(self.run_id)

    def log_model(self, files: Mapping[str, Path], example: str, torch_version: str) -> None:
        """Log the served model: image in, class names and probabilities out, no pickle. The run may have ended.

        `files`, all in one folder, are the artifacts that the serving file names, `example` is a base64 image.
        """
        (folder,) = {path.parent for path in files.values()}
        names = {name: path.name for name, path in files.items()}
        self._write(Entry("model", {"files": names, "example": example, "torch_version": torch_version}, folder))


@contextmanager
def start_run(
    name: str,
    experiment_id: str,
    tags: Mapping[str, str],
    *,
    parent: str = "",
    continues: str = "",
    message: Callable[[str], None],
    patience: float = PATIENCE,
) -> Iterator[TrackedRun]:
    """Open a run, a child of `parent` where that is given, and end it FINISHED, FAILED or KILLED.

    With `continues`, the run of that id is opened again. A run without a parent adopts the one that `mlflow run` made.
    What the run writes goes through its outbox. The end waits `patience` seconds for a store that is away: then
    TrackingAway is raised. RunError if the store refuses something for good.
    """
    outer = mlflow.active_run()
    outbox = Outbox(continues, message, patience, continues=True) if continues else None  # refuses a run in use
    run: TrackedRun | None = None
    try:
        if continues:
            mlflow.MlflowClient().set_tag(continues, PROCESS, this_process())  # before it is RUNNING under a dead one
            active = mlflow.start_run(continues, nested=True)
        elif parent:
            active = mlflow.start_run(experiment_id=experiment_id, run_name=name, nested=True, parent_run_id=parent)
        elif os.environ.get("MLFLOW_RUN_ID"):
            active = mlflow.start_run()
            _name_adopted(active.info, name)
        else:
            active = mlflow.start_run(experiment_id=experiment_id, run_name=name)
        outbox = outbox or Outbox(active.info.run_id, message, patience)
        run = TrackedRun(active.info.run_id, active.info.experiment_id, outbox)
        run.set_tags(dict(tags) | {PID: str(os.getpid()), PROCESS: this_process()})
        yield run
        delivered = outbox.wait(patience)
    except BaseException as error:
        complete = run is not None and run.completed and not isinstance(error, RunError)
        with suppress(*TRACKING_ERRORS, RunError):  # a store that is away must not hide why the run ends
            if _opened(outer):
                _end(outbox, "FINISHED" if complete else status_after(error), error, EARLY_PATIENCE)
            elif outbox is not None:
                outbox.close([], 0)
        raise
    _end(outbox, "FINISHED", None, patience if delivered else 0)


def _end(outbox: Outbox | None, status: str, error: BaseException | None, patience: float) -> None:
    """End the active run: through its outbox, if it came that far, so that its status is the last that arrives.

    One that ends early gets its status past what its outbox still holds.
    """
    active = mlflow.active_run()
    assert active is not None  # noqa: S101
    run_id = active.info.run_id
    try:
        if outbox is None:
            _set_terminated(run_id, status)
            return
        said = entries.tags({ERROR: f"{type(error).__name__}: {error}", OUTCOME: "failed"})
        ended = Entry("status", {"status": status, "end_time": entries.milliseconds()})
        last = [said, ended] if status == "FAILED" else [ended]
        if isinstance(error, LeaseLost) and _is_of_another(run_id):
            last = []
        try:
            outbox.close(last, patience)
        except TrackingAway:
            if error is not None and last:
                _set_terminated(run_id, status)
            raise
    finally:
        _forget_active_run()


def _set_terminated(run_id: str, status: str) -> None:
    with impatient(), suppress(*TRACKING_ERRORS):
        mlflow.MlflowClient().set_terminated(run_id, status)


def _is_of_another(run_id: str) -> bool:
    """Say whether another process went on with the run."""
    return bool(mlflow.MlflowClient().get_run(run_id).data.tags.get(PROCESS) != this_process())


def _forget_active_run() -> None:
    """Take the run off MLflow's stack without asking the store, which may take its time to be away."""
    if stack := _active_run_stack.get():  # type: ignore[no-untyped-call]
        run_id = stack.pop().info.run_id
        if (monitor := run_id_to_system_metrics_monitor.pop(run_id, None)) is not None:
            monitor.finish()


def open_parent(name: str, experiment_id: str, tags: Mapping[str, str]) -> TrackedRun:
    """Create the run of a study, or adopt the one that `mlflow run` made.

    Several processes may work on a study, so its run belongs to none of them: whoever ends the study ends it.
    """
    client, adopted = mlflow.MlflowClient(), os.environ.pop("MLFLOW_RUN_ID", "")
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
    client, tags = mlflow.MlflowClient(), {REPORT: "true", PROCESS: this_process()}
    known = client.search_runs([experiment_id], f"tags.`{REPORT}` = 'true'", max_results=1)
    if os.environ.get("MLFLOW_RUN_ID") or not known:
        return open_parent("report", experiment_id, tags)
    run = TrackedRun(known[0].info.run_id, experiment_id)
    run.set_tags(tags)
    return run


@contextmanager
def working_on(run: TrackedRun) -> Iterator[None]:
    """Mark a run that isn't the active one as running inside, and end it as the way out of the block deserves."""
    run.set_status("RUNNING")
    try:
        yield
    except BaseException as error:
        with impatient(), suppress(*TRACKING_ERRORS):  # a store that is away must not hide why the run ends
            run.set_status(status_after(error))
        raise
    run.set_status("FINISHED")


def status_after(error: BaseException) -> str:
    """Return the status of a run that `error` ended."""
    return "KILLED" if isinstance(error, (KeyboardInterrupt, Terminated, LeaseLost)) else "FAILED"


def find_run(run_id: str) -> TrackedRun | None:
    """Return a run of the tracking store; None where it has none of that id, or the run was deleted."""
    try:
        info = mlflow.MlflowClient().get_run(run_id).info
    except MlflowException as error:
        if is_missing(error):
            return None
        raise
    return TrackedRun(info.run_id, info.experiment_id) if info.lifecycle_stage == "active" else None


def point_adopted_run_to(run: TrackedRun) -> None:
    """Make the run that `mlflow run` opened, if it did, a pointer to the one that this command goes on with."""
    adopted = os.environ.pop("MLFLOW_RUN_ID", "")
    if adopted:
        pointer = TrackedRun(adopted, run.experiment_id)
        pointer.set_tags({CONTINUES: run.run_id})
        pointer.describe(f"This command went on with {run_address(run.run_id, run.experiment_id)}")


def _name_adopted(info: RunInfo, name: str) -> None:
    """Name a run that `mlflow run` made, unless the user did."""
    if GENERATED_NAME.fullmatch(info.run_name or ""):
        mlflow.MlflowClient().set_tag(info.run_id, RUN_NAME, name)


def _opened(outer: mlflow.ActiveRun | None) -> bool:
    active = mlflow.active_run()
    return active is not None and (outer is None or active.info.run_id != outer.info.run_id)


def run_address(run_id: str, experiment_id: str) -> str:
    """Say where the run can be seen: its page on a server, else the command that opens the UI on the store."""
    uri = shown_uri()
    if uri.startswith("http"):
        return f"{uri.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"
    return f"run {run_id}; see it with: mlflow ui --backend-store-uri {uri}"
