"""Where evidence comes from: the tracking store, or exports of some, which say the same without the store."""

import csv
import io
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from effv2 import __version__
from effv2.core.errors import InputError
from effv2.core.paths import from_cell, read_text, write_atomically, write_csv
from effv2.core.provenance import sha256_of_file
from effv2.core.secrets import masked_values
from effv2.evidence.claims import EXPORTED_AS
from effv2.evidence.quantities import HISTORIES
from effv2.tracking.addresses import ui_address
from effv2.tracking.read import READERS, Images, RunRecord, experiment_name, read_artifacts, read_experiment
from effv2.tracking.tags import PARENT, PID, PROCESS, QUEUE

# Predictions of a run: of published networks those of the images that they weren't fitted to, as far as that is known,
# stand last.
PREDICTIONS = ("predictions.csv", "unknown/predictions.csv", "unseen/predictions.csv")
MANIFEST, RUNS = "manifest.json", "runs.csv"
LARGEST_MANIFEST, LARGEST_TABLE = 50_000_000, 2_000_000_000  # bytes: of millions of epochs
LARGEST_FIELD = 10_000_000  # characters of a CSV field: thousands of class names
TABLES = {  # of an export: their titles after `run_id`
    RUNS: "name status started ended",
    "params.csv": "name value",
    "tags.csv": "name value",
    "metrics.csv": "name value",
    "epochs.csv": "name epoch value",
    "images.csv": "context name digest images classes",
}
PRIVATE = {"data.dir", "weights.file", PID, PROCESS, QUEUE}  # where the user's files lie, or who they are


@dataclass(frozen=True)
class Evidence:
    """The runs of an experiment, and what they predicted."""

    experiment: str
    ui: str  # the address of its pages, empty without a server
    runs: Sequence[RunRecord]  # the oldest first
    predictions: Callable[[RunRecord], Mapping[str, str]]  # the texts of those prediction files that a run has
    claims: Sequence[Path] = ()  # exported: what was judged beside the published ones, several where exports differ
    answers: dict[str, dict[str, bool]] = field(default_factory=dict)  # what `right` found, by run

    def right(self, run: RunRecord) -> dict[str, bool]:
        """Return by image whether a run got it right; of published networks those they weren't fitted to, if known."""
        if run.run_id not in self.answers:
            files = self.predictions(run)
            text = next((files[name] for name in reversed(PREDICTIONS) if name in files), "")
            rows = [row for row in csv.DictReader(io.StringIO(text)) if {"id", "true", "predicted"} <= row.keys()]
            self.answers[run.run_id] = {from_cell(row["id"]): row["true"] == row["predicted"] for row in rows}
        return self.answers[run.run_id]


def tracked(experiment_id: str, histories: Sequence[str] = HISTORIES, parent: str = "") -> Evidence:
    """Return the evidence in the tracking store: of a whole experiment, or of one study, the run `parent`."""
    ui = f"{server}/#/experiments/{experiment_id}" if (server := ui_address()) else ""
    read = read_experiment(experiment_id, histories, parent)
    parents = {run.parent for run in read}
    runs = [run for run in read if run.run_id in parents or run.parent or any("." in name for name in run.params)]
    return Evidence(experiment_name(experiment_id), ui, runs, lambda run: read_artifacts(run.run_id, PREDICTIONS))


def _lines(run: RunRecord) -> dict[str, list[tuple[Any, ...]]]:
    """Return what stands of a run in each table of an export, after its id."""
    params = {name: value for name, value in run.params.items() if name not in PRIVATE}
    tags = {name: value for name, value in run.tags.items() if name.startswith("effv2.") or name == PARENT}
    images = [
        (context, each.name, each.digest, each.images, json.dumps(each.classes)) for context, each in run.images.items()
    ]
    return {
        RUNS: [(run.name, run.status, run.started, run.ended)],
        "params.csv": sorted(params.items()),
        "tags.csv": sorted((name, value) for name, value in tags.items() if name not in PRIVATE),
        "metrics.csv": sorted(run.metrics.items()),
        "epochs.csv": [(name, *each) for name, curve in sorted(run.history.items()) for each in sorted(curve.items())],
        "images.csv": sorted(images),
    }


def export(evidence: Evidence, folder: Path, own: Mapping[str, str]) -> None:
    """Write the evidence as CSV files, the texts of the user's `own` files by name, and a manifest of their hashes.

    The files of an earlier export there are removed first, and no others.
    """
    with suppress(InputError):  # there is none
        for name in (*_manifest(folder)["sha256"], MANIFEST):
            (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    lines = {run.run_id: _lines(run) for run in evidence.runs}
    for name, titles in TABLES.items():
        rows = [(run_id, *line) for run_id, of_run in lines.items() for line in of_run[name]]
        write_csv(folder / name, [("run_id", *titles.split()), *rows])
    finished, written = [run for run in evidence.runs if run.status == "FINISHED"], list(TABLES)
    with ThreadPoolExecutor(READERS) as pool:
        read = zip(finished, pool.map(evidence.predictions, finished), strict=True)
        predictions = ((_place(run, name), text) for run, texts in read for name, text in texts.items())
        for name, text in chain(own.items(), predictions):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8", newline="")
            written.append(name)
    hashes = {name: sha256_of_file(folder / name) for name in sorted(written)}
    about = {"effv2": __version__, "experiment": evidence.experiment, "ui": evidence.ui, "sha256": hashes}
    write_atomically(folder / MANIFEST, json.dumps(about, indent=1) + "\n")


def _place(run: RunRecord, name: str) -> str:
    return f"predictions/{run.run_id}/{name}"


def exported(folders: Sequence[Path]) -> Evidence:
    """Return the evidence in exports as if one store held it; of a run in several, that of the one named last.

    Of several exports no run leads to its page, as their stores differ. InputError for a missing or altered file.
    """
    manifests = {folder: _manifest(folder) for folder in folders}
    for folder, about in manifests.items():
        for name, wanted in about["sha256"].items():
            file = folder / name
            if not file.is_file() or file.stat().st_size > LARGEST_TABLE or sha256_of_file(file) != wanted:
                raise InputError("from_export", folder, f"the file {name} is missing or was changed", "export again")
    held: dict[str, tuple[RunRecord, Path]] = {}
    for folder in folders:
        try:
            held |= {run.run_id: (run, folder) for run in _read_runs(folder)}
        except (ValueError, TypeError, OverflowError, RecursionError, csv.Error) as error:
            problem = f"one of its tables holds what no export has ({str(error)[:100]})"
            raise InputError("from_export", folder, problem, "export again") from error

    def predictions(run: RunRecord) -> dict[str, str]:
        folder = held[run.run_id][1]
        there = [name for name in PREDICTIONS if _place(run, name) in manifests[folder]["sha256"]]
        return {name: (folder / _place(run, name)).read_text(encoding="utf-8", errors="replace") for name in there}

    claims = [folder / EXPORTED_AS for folder, about in manifests.items() if EXPORTED_AS in about["sha256"]]
    return Evidence(
        experiment=", ".join(dict.fromkeys(about["experiment"] for about in manifests.values())),
        ui=manifests[folders[0]]["ui"] if len(folders) == 1 else "",
        runs=sorted((run for run, _ in held.values()), key=lambda run: run.started),
        predictions=predictions,
        claims=list({path.read_bytes(): path for path in claims}.values()),
    )


def _read_runs(folder: Path) -> Iterator[RunRecord]:
    """Yield the runs of an export from its tables."""
    csv.field_size_limit(LARGEST_FIELD)
    lines: dict[str, dict[str, list[list[str]]]] = defaultdict(lambda: {name: [] for name in TABLES})  # by run
    for table in TABLES:
        with (folder / table).open(newline="", encoding="utf-8") as file:
            for run_id, *values in [[from_cell(text) for text in row] for row in csv.reader(file)][1:]:
                lines[run_id][table].append(values)
    for run_id, of_run in lines.items():
        if not of_run[RUNS] or not re.fullmatch(r"[\w-]+", run_id):
            raise InputError("from_export", folder, "names a run that can't be one", "export again")
        name, status, started, ended = of_run[RUNS][0]
        params, tags, metrics = (masked_values(dict(of_run[f"{of}.csv"])) for of in ("params", "tags", "metrics"))
        numbers = {metric: float(value) for metric, value in metrics.items()}
        history: dict[str, dict[int, float]] = {}
        for metric, epoch, value in of_run["epochs.csv"]:
            history.setdefault(metric, {})[int(epoch)] = float(value)
        images = {
            context: Images(called, digest, int(count), tuple(map(str, json.loads(classes))))
            for context, called, digest, count, classes in of_run["images.csv"]
        }
        yield RunRecord(run_id, name, status, params, numbers, tags, history, images, int(started), int(ended))


def _manifest(folder: Path) -> dict[str, Any]:
    """Return what an export's manifest says; InputError where there is none, or it names files outside the export."""
    try:
        about = dict(json.loads(read_text(folder / MANIFEST, LARGEST_MANIFEST)))
        hashes, ui = about["sha256"], about["ui"]
        texts = [about["experiment"], ui, *hashes, *hashes.values()]
        whole = all(isinstance(text, str) for text in texts) and TABLES.keys() <= hashes.keys()
        if not whole or not re.match(r"https?://|$", ui):
            raise ValueError
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        remedy = "give a folder that `export` wrote"
        raise InputError("from_export", folder, f"has no {MANIFEST} of an export", remedy) from error
    for name in hashes:
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise InputError("from_export", folder, f"its manifest names {name}, outside of it", "export again")
    return about
