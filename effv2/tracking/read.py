"""Tracked runs read as plain data, for tables, figures and verdicts."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TypeVar

from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from effv2.core.secrets import masked_values
from effv2.tracking.store import MISSING, MlflowClient
from effv2.tracking.tags import DATA_CONTEXT, PARENT, reused_in

# Accuracies on the test set: at its best epoch, at the selected one (the best on validation, or the last), at the last.
BEST_TEST, SELECTED_TEST, LAST_TEST = "best/test_accuracy", "selected/test_accuracy", "final/test_accuracy"
SELECTED_VALIDATION = "selected/val_accuracy"
OF_TRIALS = "val/accuracy"  # the metric whose epochs are read for the trials of a search
T = TypeVar("T")
READERS = 8  # simultaneous requests for histories: a server answers each in milliseconds, but with a delay


@dataclass(frozen=True)
class Images:
    """A data set of a run: its name, and if logged, its digest, number of images and names of classes."""

    name: str
    digest: str
    images: int = 0
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunRecord:
    """A tracked run: parameters, last metrics and tags as logged; `history` maps a metric to {epoch: value}.

    `images` holds data sets by their use: train, validation or test. Times are milliseconds since 1970.
    """

    run_id: str
    name: str
    status: str
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]
    history: dict[str, dict[int, float]] = field(default_factory=dict)
    images: dict[str, Images] = field(default_factory=dict)
    started: int = 0
    ended: int = 0

    @property
    def parent(self) -> str:
        """Return the id of the parent run; empty if there is none."""
        return self.tags.get(PARENT, "")


def reached_accuracy(run: RunRecord) -> float:
    """Return the accuracy that decides which of several finished runs is best: on validation, if they have that.

    For published networks it is that on the images by which they are ranked.
    """
    names = SELECTED_VALIDATION, BEST_TEST, f"{run.params.get('evaluation.ranked_on', 'eval')}/top1_accuracy"
    return next((run.metrics[name] for name in names if name in run.metrics), 0.0)


def decisive_accuracy(runs: Sequence[RunRecord]) -> str:
    """Return the metric by which runs are compared: for published sampling without validation, that of the best epoch.

    Otherwise it is that of the selected epoch. If the test set was not evaluated, it is the accuracy on validation.
    """
    if not any(SELECTED_TEST in run.metrics for run in runs):
        return SELECTED_VALIDATION
    published = any(run.params.get("data.sampling") == "published" for run in runs)
    validated = all(SELECTED_VALIDATION in run.metrics for run in runs)
    return BEST_TEST if published and not validated else SELECTED_TEST


def find_runs(experiment_id: str, tags: Mapping[str, str], *, running: bool | None = None) -> list[RunRecord]:
    """Return the experiment's runs with these tags, all or only those that are RUNNING, or not, the latest first."""
    wanted = [] if running is None else [f"attributes.status {'=' if running else '!='} 'RUNNING'"]
    wanted += [f"tags.`{name}` = '{value}'" for name, value in tags.items()]
    found = MlflowClient().search_runs([experiment_id], " and ".join(wanted), order_by=["attributes.start_time DESC"])
    return [_record(run) for run in found]


def read_runs(run_ids: Iterable[str]) -> list[RunRecord]:
    """Read runs without histories."""
    client = MlflowClient()
    return [_record(client.get_run(run_id)) for run_id in run_ids]


def read_history(run_id: str, name: str) -> dict[int, float]:
    """Read the values of a metric, by epoch."""
    return {each.step: each.value for each in MlflowClient().get_metric_history(run_id, name)}


def read_experiment(experiment_id: str, histories: Sequence[str], parent: str = "") -> list[RunRecord]:
    """Read all runs of an experiment, the oldest first, or a study's run, its children, and the runs that it reuses.

    Finished runs have the histories of the metrics with these prefixes. The trials of a search, which may be thousands,
    have none. If only the study is read, its trials have that of the accuracy on validation.
    """
    runs = list(map(_record, _all_runs(experiment_id, f"tags.`{PARENT}` = '{parent}'" if parent else "")))
    if parent:
        (study,) = read_runs([parent])
        runs = [study, *runs, *filter(None, map(read_run, reused_in(study.tags)))]
    searches = {run.run_id for run in runs if run.params.get("study.kind") == "search"}

    def history(run: RunRecord) -> dict[str, dict[int, float]]:
        names = tuple(histories) if run.status == "FINISHED" else ()
        if run.parent in searches or (parent in searches and run.run_id != parent):
            names = (OF_TRIALS,) if parent and OF_TRIALS in histories else ()
        return {name: read_history(run.run_id, name) for name in run.metrics if name.startswith(names)}

    with ThreadPoolExecutor(READERS) as pool:
        return [replace(run, history=read) for run, read in zip(runs, pool.map(history, runs), strict=True)]


def known_runs(experiment_id: str) -> set[str]:
    """Return the ids of the experiment's runs, without deleted ones."""
    return {run.info.run_id for run in _all_runs(experiment_id)}


def _all_runs(experiment_id: str, condition: str = "") -> Iterator[Run]:
    """Yield all runs of an experiment, the oldest first."""
    token: str | None = ""
    while token is not None:
        order, after = ["start_time ASC"], token or None
        page = MlflowClient().search_runs([experiment_id], condition, order_by=order, page_token=after)
        yield from page
        token = page.token or None


def if_there(read: Callable[[str], T], name: str, signs: Sequence[str] = ()) -> T | None:
    """Return what `read` returns; None if the store has nothing of that name, by MISSING or another of `signs`."""
    try:
        return read(name)
    except MlflowException as error:
        if error.error_code not in (MISSING, *signs):
            raise
        return None


def read_run(run_id: str) -> RunRecord | None:
    """Return a run without histories; None if the store has no run of that id, or the run was deleted."""
    run = if_there(MlflowClient().get_run, run_id)
    return _record(run) if run is not None and run.info.lifecycle_stage == "active" else None


def experiment_name(experiment_id: str) -> str:
    """Return the name of an experiment."""
    return str(MlflowClient().get_experiment(experiment_id).name)


def artifact_names(run_id: str, folder: str) -> list[str]:
    """Return the names of the artifacts in a folder of artifacts."""
    found = MlflowClient().list_artifacts(run_id, folder or None)
    return [PurePosixPath(file.path).name for file in found if not file.is_dir]


def download(run_id: str, name: str, folder: Path) -> Path | None:
    """Download an artifact into `folder`, which is created; None if the run has no artifact of that name."""
    above, _, own = name.rpartition("/")
    if own not in artifact_names(run_id, above):
        return None
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        return Path(shutil.copy(MlflowClient().download_artifacts(run_id, name, place), folder))


def read_artifacts(run_id: str, names: Iterable[str]) -> dict[str, str]:
    """Return the texts of the named artifacts, as far as the run has them."""
    client, found = MlflowClient(), dict[str, str]()
    there = {file.path for file in client.list_artifacts(run_id)}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            above = name.rpartition("/")[0]
            if above and above in there:
                there |= {file.path for file in client.list_artifacts(run_id, above)}
            if name in there:
                with suppress(UnicodeDecodeError):  # not a file of effv2
                    found[name] = Path(client.download_artifacts(run_id, name, folder)).read_text(encoding="utf-8")
    return found


def _record(run: Run) -> RunRecord:
    info, data = run.info, run.data
    return RunRecord(
        run_id=info.run_id,
        name=info.run_name,
        status=info.status,
        params=masked_values(data.params),  # `mlflow run` logs the options as given
        metrics=data.metrics,
        tags=masked_values(data.tags),
        images=dict(_images(run)),
        started=info.start_time or 0,
        ended=info.end_time or 0,
    )


def _images(run: Run) -> Iterable[tuple[str, Images]]:
    for logged in run.inputs.dataset_inputs if run.inputs else ():
        context = next((tag.value for tag in logged.tags if tag.key == DATA_CONTEXT), "")
        about, digest = logged.dataset, logged.dataset.digest
        try:
            profile = json.loads(about.profile or "{}")
            count = profile.get("images", 0)
            count = count if isinstance(count, int) else max(count.values())  # by weights
            yield context, Images(about.name, digest, count, tuple(profile.get("classes", ())))
        except (ValueError, TypeError, AttributeError, LookupError):  # logged by another program
            yield context, Images(about.name, digest)
