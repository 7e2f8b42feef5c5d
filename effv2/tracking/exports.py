"""Exports: tracked runs as CSV files with a manifest of their hashes, which can be read back without loss.

Predictions of the same images share a table, with two columns per run.
"""

import csv
import io
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Any

from pydantic import BaseModel, Field

from effv2 import __version__
from effv2.core.errors import InputError
from effv2.core.paths import from_cell, read_text, write_atomically, write_csv
from effv2.core.provenance import sha256_of_file, sha256_of_values
from effv2.core.secrets import masked_values
from effv2.tracking.read import Images, RunRecord
from effv2.tracking.tags import PARENT, PID, PROCESS, QUEUE

MANIFEST, RUNS, EPOCHS = "manifest.json", "runs.csv", "epochs.csv"
LARGEST_MANIFEST, LARGEST_FILE = 50_000_000, 2_000_000_000  # bytes: enough for millions of epochs
csv.field_size_limit(10_000_000)  # characters: thousands of class names
TABLES = {  # tables of an export: their titles after `run_id`; those of epochs.csv end with a column per metric
    RUNS: "name status started ended",
    "params.csv": "name value",
    "tags.csv": "name value",
    "metrics.csv": "name value",
    EPOCHS: "epoch",
    "images.csv": "context name digest images classes",
}
ANSWERS = ["id", "true", "predicted", "probability"]  # titles of the predictions of a run
SHARED = re.compile(r"(.*predictions)-[0-9a-f]{12}(\.csv)")  # tables with predictions of several runs
PRIVATE = {"data.dir", "data.train_dir", "data.test_dir", "data.labels", "weights.file"}  # paths of the user's files
PRIVATE |= {PID, PROCESS, QUEUE}  # with the user's name


class Manifest(BaseModel):
    """The description of an export: the experiment, the address of its pages (or empty), the SHA-256 of its files."""

    effv2: str = __version__
    experiment: str
    ui: Annotated[str, Field(pattern="^(https?://|$)")]
    sha256: dict[str, str] = {}


Answers = Sequence[tuple[str, ...]]  # for each image its id, true and predicted class, and probability
Predictions = Mapping[str, Answers]  # of a run, by the names of its files


@dataclass(frozen=True)
class Export:
    """An export that was read: its folder, its manifest, its runs, and their predictions by run."""

    folder: Path
    manifest: Manifest
    runs: Sequence[RunRecord]
    predictions: Mapping[str, Predictions]


def answers_of(text: str) -> Answers | None:
    """Return the predictions in a file of a run; None for another table."""
    with suppress(csv.Error):
        rows = [[row.get(name) for name in ANSWERS] for row in csv.DictReader(io.StringIO(text))]
        cells = [tuple(from_cell(cell or "") for cell in row) for row in rows if None not in row[:-1]]
        if cells and len(cells) == len(rows):  # the probability may be missing
            return cells
    return None


def write_export(
    folder: Path,
    manifest: Manifest,
    runs: Sequence[RunRecord],
    predictions: Mapping[str, Predictions],
    texts: Mapping[str, str],
) -> None:
    """Write runs as tables, their predictions, `texts` by file name, and a manifest with all hashes.

    First, the files of an earlier export there are removed, and no others.
    """
    with suppress(InputError):  # there is none
        for name in (*_manifest(folder).sha256, MANIFEST):
            (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    metrics = sorted({metric for run in runs for metric in run.history})
    lines = {run.run_id: _lines(run, metrics) for run in runs}
    for name, titles in TABLES.items():
        rows = [(run_id, *line) for run_id, of_run in lines.items() for line in of_run[name]]
        write_csv(folder / name, [("run_id", *titles.split(), *(metrics if name == EPOCHS else ())), *rows])
    tables = _shared(predictions)
    for name, table in tables.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_csv(folder / name, table)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="")
    hashes = {name: sha256_of_file(folder / name) for name in sorted((*TABLES, *tables, *texts))}
    whole = manifest.model_copy(update={"sha256": hashes})
    write_atomically(folder / MANIFEST, json.dumps(whole.model_dump(), indent=1) + "\n")


def _shared(predictions: Mapping[str, Predictions]) -> dict[str, Iterable[tuple[str, ...]]]:
    """Return the tables of predictions by name: an image's id and true class, then the prediction of each run."""
    columns: dict[str, list[tuple[str, ...]]] = {}
    for run_id, files in predictions.items():
        for file, answers in files.items():
            ids, true, predicted, probability = zip(*answers, strict=True)
            name = f"{file.removesuffix('.csv')}-{sha256_of_values([*zip(ids, true, strict=True)])[:12]}.csv"
            columns.setdefault(name, [("id", *ids), ("true", *true)])
            columns[name] += [(f"{run_id} predicted", *predicted), (f"{run_id} probability", *probability)]
    return {name: zip(*each, strict=True) for name, each in columns.items()}


def _lines(run: RunRecord, metrics: Sequence[str]) -> dict[str, list[tuple[Any, ...]]]:
    """Return the rows of a run in each table, without its id; in epochs.csv with the values of `metrics`."""
    params = {name: value for name, value in run.params.items() if name not in PRIVATE}
    weights = params.get("model.weights", "")
    if not weights.startswith(("runs:/", "models:/")):  # otherwise perhaps a path, of which only the file name is kept
        params |= {"model.weights": PurePath(weights).name} if weights else {}
    tags = {name: value for name, value in run.tags.items() if name.startswith("effv2.") or name == PARENT}
    epochs = sorted({epoch for curve in run.history.values() for epoch in curve})
    images = [
        (context, each.name, each.digest, each.images, json.dumps(each.classes)) for context, each in run.images.items()
    ]
    return {
        RUNS: [(run.name, run.status, run.started, run.ended)],
        "params.csv": sorted(params.items()),
        "tags.csv": sorted((name, value) for name, value in tags.items() if name not in PRIVATE),
        "metrics.csv": sorted(run.metrics.items()),
        EPOCHS: [(epoch, *(run.history.get(name, {}).get(epoch, "") for name in metrics)) for epoch in epochs],
        "images.csv": sorted(images),
    }


def read_export(folder: Path) -> Export:
    """Read an export; InputError if one of its files is missing, changed or invalid."""
    manifest = _manifest(folder)
    for name, wanted in manifest.sha256.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size > LARGEST_FILE or sha256_of_file(file) != wanted:
            raise _wrong(folder, f"the file {name} is missing or was changed")
    try:
        return Export(folder, manifest, list(_read_runs(folder)), _read_predictions(folder, manifest))
    except (ValueError, TypeError, OverflowError, RecursionError, csv.Error) as error:
        raise _wrong(folder, f"one of its tables is invalid ({str(error)[:100]})") from error


def _manifest(folder: Path) -> Manifest:
    """Return the manifest of an export; InputError if it is missing, or names files outside of the export."""
    try:
        manifest = Manifest.model_validate_json(read_text(folder / MANIFEST, LARGEST_MANIFEST))
        if not manifest.sha256.keys() >= TABLES.keys():
            raise ValueError
    except (OSError, ValueError) as error:
        raise _wrong(folder, f"has no {MANIFEST} of an export", "give a folder that `export` wrote") from error
    for name in manifest.sha256:
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise _wrong(folder, f"its manifest names {name}, outside of it")
    return manifest


def _read_runs(folder: Path) -> Iterator[RunRecord]:
    """Yield the runs of an export from its tables."""
    lines: dict[str, dict[str, list[list[str]]]] = defaultdict(lambda: {name: [] for name in TABLES})  # by run
    titles: dict[str, list[str]] = {}  # by table, after `run_id`
    for table in TABLES:
        with (folder / table).open(newline="", encoding="utf-8") as file:
            (_, *titles[table]), *rows = [[from_cell(text) for text in row] for row in csv.reader(file)]
        for run_id, *values in rows:
            lines[run_id][table].append(values)
    for run_id, of_run in lines.items():
        if not of_run[RUNS] or not re.fullmatch(r"[\w-]+", run_id):
            raise ValueError("an invalid run")
        name, status, started, ended = of_run[RUNS][0]
        params, tags, metrics = (masked_values(dict(of_run[f"{of}.csv"])) for of in ("params", "tags", "metrics"))
        numbers = {metric: float(value) for metric, value in metrics.items()}
        history: dict[str, dict[int, float]] = {}
        for epoch, *values in of_run[EPOCHS]:
            for metric, value in zip(titles[EPOCHS][1:], values, strict=True):
                if value:
                    history.setdefault(metric, {})[int(epoch)] = float(value)
        images = {
            context: Images(called, digest, int(count), tuple(map(str, json.loads(classes))))
            for context, called, digest, count, classes in of_run["images.csv"]
        }
        yield RunRecord(run_id, name, status, params, numbers, tags, history, images, int(started), int(ended))


def _read_predictions(folder: Path, manifest: Manifest) -> dict[str, dict[str, Answers]]:
    """Return the predictions of an export's runs, by run and the name of the run's file."""
    found: dict[str, dict[str, Answers]] = defaultdict(dict)
    for name in manifest.sha256:
        if file := SHARED.fullmatch(name):
            with (folder / name).open(newline="", encoding="utf-8") as table:
                rows = [[from_cell(text) for text in row] for row in csv.reader(table)]
            (_, *ids), (_, *true), *said = zip(*rows, strict=True)
            for (title, *predicted), (_, *probability) in zip(said[::2], said[1::2], strict=True):
                answers = list(zip(ids, true, predicted, probability, strict=True))
                found[title.split()[0]]["".join(file.groups())] = answers
    return found


def _wrong(folder: Path, problem: str, remedy: str = "export again") -> InputError:
    return InputError("from_export", folder, problem, remedy)
