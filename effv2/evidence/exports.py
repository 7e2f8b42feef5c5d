"""The sources of evidence: the tracking store, or exports, which give the same results without a store."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from effv2.evidence.claims import EXPORTED_AS
from effv2.evidence.quantities import HISTORIES
from effv2.tracking.addresses import ui_address
from effv2.tracking.exports import Manifest, Predictions, answers_of, read_export, write_export
from effv2.tracking.read import READERS, RunRecord, experiment_name, read_artifacts, read_experiment

# Predictions of a run. The last ones of a published network are those of images that it wasn't trained on, as far as
# known.
PREDICTIONS = ("predictions.csv", "unknown/predictions.csv", "unseen/predictions.csv")


@dataclass(frozen=True)
class Evidence:
    """The runs of an experiment, and their predictions."""

    experiment: str
    ui: str  # the address of its pages, empty without a server
    runs: Sequence[RunRecord]  # the oldest first
    predictions: Callable[[RunRecord], Predictions]
    claims: Sequence[Path] = ()  # exported: claims besides the published ones, several if exports differ
    answers: dict[str, dict[str, bool]] = field(default_factory=dict)  # the results of `right`, by run

    def right(self, run: RunRecord) -> dict[str, bool]:
        """Return by image whether a run was right, for published networks on images not trained on, if known."""
        if run.run_id not in self.answers:
            files = self.predictions(run)
            found = next((files[name] for name in reversed(PREDICTIONS) if name in files), ())
            self.answers[run.run_id] = {image: true == predicted for image, true, predicted, _ in found}
        return self.answers[run.run_id]


def tracked(experiment_id: str, histories: Sequence[str] = HISTORIES, parent: str = "") -> Evidence:
    """Return the evidence in the tracking store: of a whole experiment, or of one study, the run `parent`."""
    ui = f"{server}/#/experiments/{experiment_id}" if (server := ui_address()) else ""
    read = read_experiment(experiment_id, histories, parent)
    parents = {run.parent for run in read}
    runs = [run for run in read if run.run_id in parents or run.parent or any("." in name for name in run.params)]
    return Evidence(experiment_name(experiment_id), ui, runs, predictions_of)


def predictions_of(run: RunRecord) -> Predictions:
    """Return the predictions of a tracked run, by the names of its files."""
    texts = read_artifacts(run.run_id, PREDICTIONS)
    return {name: answers for name, text in texts.items() if (answers := answers_of(text))}


def export(evidence: Evidence, folder: Path, own: Mapping[str, str]) -> None:
    """Write the evidence to a folder, with the texts of the user's `own` files by name."""
    finished = [run for run in evidence.runs if run.status == "FINISHED"]
    with ThreadPoolExecutor(READERS) as pool:
        predictions = dict(zip((run.run_id for run in finished), pool.map(evidence.predictions, finished), strict=True))
    write_export(folder, Manifest(experiment=evidence.experiment, ui=evidence.ui), evidence.runs, predictions, own)


def exported(folders: Sequence[Path]) -> Evidence:
    """Return the evidence in exports as if it were in one store. If several have a run, the last one counts.

    With several exports, no run links to its page, because their stores differ. InputError for a missing or changed
    file.
    """
    exports = list(map(read_export, folders))
    held = {run.run_id: (run, each) for each in exports for run in each.runs}
    claims = {sha: each.folder / EXPORTED_AS for each in exports if (sha := each.manifest.sha256.get(EXPORTED_AS))}
    return Evidence(
        experiment=", ".join(dict.fromkeys(name for each in exports for name in each.manifest.experiment.split(", "))),
        ui=exports[0].manifest.ui if len(exports) == 1 else "",
        runs=sorted((run for run, _ in held.values()), key=lambda run: run.started),
        predictions=lambda run: held[run.run_id][1].predictions.get(run.run_id, {}),
        claims=list(claims.values()),
    )
