"""Where evidence comes from: the tracking store, or exports of some, which say the same without the store."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effv2 import __version__
from effv2.core.errors import InputError
from effv2.core.paths import write_atomically
from effv2.core.provenance import sha256_of_file
from effv2.evidence.claims import EXPORTED_AS
from effv2.evidence.quantities import HISTORIES
from effv2.evidence.run_artifacts import write_csv
from effv2.tracking.read import READERS, Images, RunRecord, experiment_name, read_artifacts, read_experiment
from effv2.tracking.tags import PARENT, PID, PROCESS, QUEUE
from effv2.tracking.views import ui_address

EXPORTED = (*HISTORIES, "val/accuracy", "train/loss", "val/loss", "test/loss", "learning_rate")
PREDICTIONS = ("predictions.csv", "unseen/predictions.csv")
MANIFEST = "manifest.json"
TABLES = ("runs.csv", "params.csv", "tags.csv", "metrics.csv", "epochs.csv", "images.csv")
LARGEST_FIELD = 10_000_000  # characters of a CSV field: thousands of class names
# What says where the user's files lie, or who they are.
PRIVATE = {"data.dir", "weights.file", PID, PROCESS, QUEUE}
KEPT = {PARENT}


@dataclass(frozen=True)
class Evidence:
    """The runs of an experiment, the oldest first; `ui` is the address of its pages, empty without a server.

    `predictions` gives, of a run, the texts of those of its prediction files that there are.
    """

    experiment: str
    ui: str
    runs: Sequence[RunRecord]
    predictions: Callable[[RunRecord], Mapping[str, str]]
    claims: Sequence[Path] = ()  # exported: what was judged beside the published ones, several where exports differ

    def right(self, run: RunRecord) -> dict[str, bool]:
        """Return by image whether a run got it right; of published networks those they weren't fitted to, if known."""
        files = self.predictions(run)
        text = next((files[name] for name in reversed(PREDICTIONS) if name in files), "")
        rows = [row for row in csv.DictReader(io.StringIO(text)) if {"id", "true", "predicted"} <= row.keys()]
        return {row["id"]: row["true"] == row["predicted"] for row in rows}


def tracked(experiment_id: str, histories: Sequence[str] = HISTORIES, parent: str = "") -> Evidence:
    """Return the evidence in the tracking store: of a whole experiment, or of one study, the run `parent`."""
    ui = f"{server}/#/experiments/{experiment_id}" if (server := ui_address()) else ""
    read = read_experiment(experiment_id, histories, parent)
    parents = {run.parent for run in read}
    runs = [run for run in read if run.run_id in parents or run.parent or any("." in name for name in run.params)]
    return Evidence(experiment_name(experiment_id), ui, runs, lambda run: read_artifacts(run.run_id, PREDICTIONS))


def export(evidence: Evidence, folder: Path, own: Mapping[str, str]) -> None:
    """Write the evidence as CSV files, the texts of the user's `own` files by name, and a manifest of their hashes."""
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []

    def table(name: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_csv(path, header, rows)
        written.append(path)

    runs = evidence.runs
    table("runs.csv", ("run_id", "name", "status", "started", "ended"), _runs(runs))
    table("params.csv", ("run_id", "name", "value"), _pairs((run, _shown_params(run)) for run in runs))
    table("tags.csv", ("run_id", "name", "value"), _pairs((run, _shown_tags(run)) for run in runs))
    table("metrics.csv", ("run_id", "name", "value"), _pairs((run, run.metrics) for run in runs))
    table("epochs.csv", ("run_id", "name", "epoch", "value"), _epochs(runs))
    table("images.csv", ("run_id", "context", "name", "digest", "images", "classes"), _images(runs))
    for name, text in own.items():
        (folder / name).write_text(text, encoding="utf-8")
        written.append(folder / name)
    finished = [run for run in runs if run.status == "FINISHED"]
    with ThreadPoolExecutor(READERS) as pool:
        for run, texts in zip(finished, pool.map(evidence.predictions, finished), strict=True):
            for name, text in texts.items():
                path = folder / "predictions" / run.run_id / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8", newline="")
                written.append(path)
    hashes = {path.relative_to(folder).as_posix(): sha256_of_file(path) for path in sorted(written)}
    about = {"effv2": __version__, "experiment": evidence.experiment, "ui": evidence.ui, "sha256": hashes}
    write_atomically(folder / MANIFEST, json.dumps(about, indent=1) + "\n")


def _runs(runs: Sequence[RunRecord]) -> Iterator[Sequence[Any]]:
    for run in runs:
        yield run.run_id, run.name, run.status, run.started, run.ended


def _pairs(runs: Iterable[tuple[RunRecord, Mapping[str, Any]]]) -> Iterator[Sequence[Any]]:
    for run, values in runs:
        for name, value in sorted(values.items()):
            yield run.run_id, name, value


def _shown_params(run: RunRecord) -> dict[str, str]:
    return {name: value for name, value in run.params.items() if name not in PRIVATE}


def _shown_tags(run: RunRecord) -> dict[str, str]:
    ours = {name: value for name, value in run.tags.items() if name.startswith("effv2.") or name in KEPT}
    return {name: value for name, value in ours.items() if name not in PRIVATE}


def _epochs(runs: Sequence[RunRecord]) -> Iterator[Sequence[Any]]:
    for run in runs:
        for name in sorted(run.history):
            for epoch, value in sorted(run.history[name].items()):
                yield run.run_id, name, epoch, value


def _images(runs: Sequence[RunRecord]) -> Iterator[Sequence[Any]]:
    for run in runs:
        for context, images in sorted(run.images.items()):
            yield run.run_id, context, images.name, images.digest, images.images, json.dumps(images.classes)


def joined(folders: Sequence[Path]) -> Evidence:
    """Return the evidence in exports as if one store held it; of a run in several, that of the one named last.

    Of several exports no run leads to its page, as their stores differ. InputError for a missing or altered file.
    """
    parts = [exported(folder) for folder in folders]
    if len(parts) == 1:
        return parts[0]
    held = {run.run_id: (run, part) for part in parts for run in part.runs}
    return Evidence(
        experiment=", ".join(dict.fromkeys(part.experiment for part in parts)),
        ui="",
        runs=sorted((run for run, _ in held.values()), key=lambda run: run.started),
        predictions=lambda run: held[run.run_id][1].predictions(run),
        claims=tuple({path.read_bytes(): path for part in parts for path in part.claims}.values()),
    )


def exported(folder: Path) -> Evidence:
    """Return the evidence in an export; InputError for a missing or altered file."""
    about = _manifest(folder)
    for name, wanted in about["sha256"].items():
        path = _inside(folder, name)
        if not path.is_file() or sha256_of_file(path) != wanted:
            raise InputError(f"--from-export {folder}: the file {name} is missing or was changed; export again.")
    csv.field_size_limit(LARGEST_FIELD)
    params, tags = _texts(folder / "params.csv"), _texts(folder / "tags.csv")
    metrics, histories, images = _texts(folder / "metrics.csv"), _histories(folder), _exported_images(folder)
    runs = [
        RunRecord(
            run_id=row["run_id"],
            name=row["name"],
            status=row["status"],
            params=params.get(row["run_id"], {}),
            metrics={name: float(value) for name, value in metrics.get(row["run_id"], {}).items()},
            tags=tags.get(row["run_id"], {}),
            history=histories.get(row["run_id"], {}),
            images=images.get(row["run_id"], {}),
            started=int(row["started"]),
            ended=int(row["ended"]),
        )
        for row in _rows(folder / "runs.csv")
    ]
    if not all(re.fullmatch(r"[\w-]+", run.run_id) for run in runs):
        raise InputError(f"--from-export {folder}: runs.csv names a run that can't be one; export again.")

    def predictions(run: RunRecord) -> dict[str, str]:
        names = {name: f"predictions/{run.run_id}/{name}" for name in PREDICTIONS}
        return {
            name: (folder / place).read_text(encoding="utf-8")
            for name, place in names.items()
            if place in about["sha256"]
        }

    claims = [folder / EXPORTED_AS] if EXPORTED_AS in about["sha256"] else []
    return Evidence(about["experiment"], about["ui"], runs, predictions, claims)


def remove_export(folder: Path) -> None:
    """Remove the files of an earlier export, so that none of them is left among those of the next; no others."""
    try:
        names = _manifest(folder)["sha256"]
    except InputError:  # there is none
        return
    for name in (*names, MANIFEST):
        _inside(folder, name).unlink(missing_ok=True)


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        hashes, ui = about["sha256"], about["ui"]
        texts = [about["experiment"], ui, *hashes, *hashes.values()]
        if not all(isinstance(text, str) for text in texts) or not set(TABLES) <= hashes.keys():
            raise ValueError
        if ui and not ui.startswith(("http://", "https://")):
            raise ValueError
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"--from-export {folder}: has no {MANIFEST} of an export; give a folder that --export wrote."
        ) from error
    return dict(about)


def _inside(folder: Path, name: str) -> Path:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise InputError(f"--from-export {folder}: its manifest names {name}, outside of it; export again.")
    return path


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        yield from csv.DictReader(file)


def _texts(path: Path) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for row in _rows(path):
        found.setdefault(row["run_id"], {})[row["name"]] = row["value"]
    return found


def _histories(folder: Path) -> dict[str, dict[str, dict[int, float]]]:
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in _rows(folder / "epochs.csv"):
        of_run = found.setdefault(row["run_id"], {})
        of_run.setdefault(row["name"], {})[int(row["epoch"])] = float(row["value"])
    return found


def _exported_images(folder: Path) -> dict[str, dict[str, Images]]:
    found: dict[str, dict[str, Images]] = {}
    for row in _rows(folder / "images.csv"):
        images = Images(row["name"], row["digest"], int(row["images"]), tuple(json.loads(row["classes"])))
        found.setdefault(row["run_id"], {})[row["context"]] = images
    return found
