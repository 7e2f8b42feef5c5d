"""Arms of a study side by side: one row an arm, figures over its seeds, from tracked runs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from effv2.evidence.figures import Curve
from effv2.evidence.quantities import QUANTITIES, Quantity, percent
from effv2.evidence.run_artifacts import write_csv
from effv2.tracking.read import RunRecord
from effv2.tracking.tags import SEED

PARENT_METRICS = (
    "best/test_accuracy",
    "selected/test_accuracy",
    "final/test_accuracy",
    "selected/val_accuracy",
    "time/total_train_seconds",
)
COLUMNS = (
    "best/test_accuracy",
    "selected/test_accuracy",
    "final/test_accuracy",
    "selected/val_accuracy",
    "epochs/to_95_percent",
    "time/total_train_seconds",
    "rate/train",
    "rate/evaluate",
    "inference/single_image_milliseconds",
    "model/parameters",
    "model/gflops",
)
NONE = "none"  # in a cell: the runs lack the figure
Rows = list[tuple[str, ...]]


@dataclass(frozen=True)
class Told:
    """What is told of a study: a table with its titles first, figures by the word that names their file, notes."""

    table: Rows = field(default_factory=list)
    figures: Mapping[str, Figure] = field(default_factory=dict)
    notes: Sequence[str] = ()


def markdown_table(rows: Rows) -> str:
    """Write rows, the titles first, as Markdown."""
    titles, *others = rows
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, ("---",) * len(titles), *others))


@dataclass(frozen=True)
class Comparison:
    """The finished runs of a study by arm, in the study's order."""

    arms: dict[str, list[RunRecord]]

    @property
    def header(self) -> tuple[str, ...]:
        """Return the titles of the columns."""
        return ("variant", "runs", *(QUANTITIES[name].words for name in COLUMNS))

    def rows(self) -> Rows:
        """Return a row an arm: mean over runs, ± standard deviation where there are several that differ."""
        return [
            (arm, str(len(records)), *(self._cell(QUANTITIES[name], records) for name in COLUMNS))
            for arm, records in self.arms.items()
        ]

    @staticmethod
    def _cell(what: Quantity, records: list[RunRecord]) -> str:
        values = [value for record in records if (value := what.value(record)) is not None]
        if not values:
            return NONE
        mean = what.text(statistics.fmean(values))
        if len(set(values)) == 1:
            return mean
        return f"{mean} ± {what.text(statistics.stdev(values))}"

    @property
    def decisive(self) -> str:
        """Return the accuracy that decides: under the published rules, without a validation split, the best epoch's.

        Elsewhere it is the selected epoch's: the best one on validation, or the last. Where the test set was left
        alone, it is that on validation.
        """
        runs = [run for of_arm in self.arms.values() for run in of_arm]
        validated = all("selected/val_accuracy" in run.metrics for run in runs)
        if not self.values("selected/test_accuracy"):
            return "selected/val_accuracy"
        published = any(run.params.get("data.sampling") == "published" for run in runs)
        return "best/test_accuracy" if published and not validated else "selected/test_accuracy"

    def sentence(self) -> str:
        """Say which arm has the highest mean of the accuracy that decides, and that it is no verdict."""
        means = {arm: statistics.fmean(each) for arm, each in self.values(self.decisive).items()}
        best = max(means, key=lambda arm: means[arm], default="")
        if not best:
            return "No accuracies yet."
        count = len(self.arms[best])
        runs = "1 run" if count == 1 else f"mean of {count} runs"
        accuracy = f"{percent(means[best])} {QUANTITIES[self.decisive].words} ({runs})"
        return f"Highest: **{best}**, {accuracy}; the report says how sure that is."

    def values(self, name: str) -> dict[str, list[float]]:
        """Return a quantity of each arm's runs, as far as they have it."""
        what = QUANTITIES[name]
        found = {arm: [what.value(record) for record in records] for arm, records in self.arms.items()}
        return {arm: kept for arm, each in found.items() if (kept := [value for value in each if value is not None])}

    def curves(self, metric: str) -> dict[str, list[Curve]]:
        """Return a metric by epoch of each arm's runs, as far as they have it."""
        found: dict[str, list[Curve]] = {}
        for arm, records in self.arms.items():
            for record in records:
                if record.history.get(metric):
                    found.setdefault(arm, []).append(record.history[metric])
        return found

    def lines(self) -> Rows:
        """Return the table with a line a figure that any run has and a column an arm, the titles first."""
        return [line for line in zip(self.header, *self.rows(), strict=True) if set(line[1:]) != {NONE}]

    def markdown(self) -> str:
        """Return the lines as Markdown."""
        return markdown_table(self.lines())

    def metrics(self) -> dict[str, float]:
        """Return the mean over runs of each arm's main figures, for the parent run."""
        return {
            f"{arm}/{name}": statistics.fmean(values)
            for name in PARENT_METRICS
            for arm, values in self.values(name).items()
        }

    def write(self, folder: Path, title: str) -> None:
        """Write the table: Markdown, and CSV with plain numbers a run. Figures are the report's."""
        quantities = [QUANTITIES[name] for name in COLUMNS]
        write_csv(
            folder / "comparison.csv",
            ("variant", "seed", "run_id", *(what.words for what in quantities)),
            (
                (arm, record.tags[SEED], record.run_id, *(what.value(record) for what in quantities))
                for arm, records in self.arms.items()
                for record in records
            ),
        )
        (folder / "comparison.md").write_text(f"# {title}\n\n{self.markdown()}\n", encoding="utf-8")
