"""Arms of a study side by side: one row an arm, figures over its seeds, from tracked runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from effv2.evidence.figures import Curve, accuracy_curves, bars
from effv2.evidence.run_artifacts import write_csv
from effv2.tracking.read import RunRecord

TRAIN, TEST = "train/accuracy", "test/accuracy"
TRAIN_RATE, EVALUATE_RATE = "throughput/train_images_per_second", "throughput/evaluate_images_per_second"
HISTORIES = (TRAIN, TEST, TRAIN_RATE, EVALUATE_RATE)
PEAK_SHARE = 0.95
PARENT_METRICS = (
    "best/test_accuracy",
    "selected/test_accuracy",
    "final/test_accuracy",
    "time/total_train_seconds",
)


@dataclass(frozen=True)
class Column:
    """A figure of the table: its title, how to take it from a run, how to write it."""

    title: str
    value: Callable[[RunRecord], float]
    text: Callable[[float], str]


def epochs_to_peak_share(curve: Curve, share: float = PEAK_SHARE) -> int:
    """Return the first epoch whose train accuracy reaches `share` of the highest one."""
    goal = share * max(curve.values())
    return min(epoch for epoch, accuracy in curve.items() if accuracy >= goal)


def _metric(name: str) -> Callable[[RunRecord], float]:
    return lambda record: record.metrics[name]


def _median_over_epochs(name: str) -> Callable[[RunRecord], float]:
    return lambda record: statistics.median(record.history[name].values())


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def _whole(value: float) -> str:
    return f"{value:,.0f}"


COLUMNS = (
    Column("test accuracy, best epoch", _metric("best/test_accuracy"), _percent),
    Column("test accuracy, selected epoch", _metric("selected/test_accuracy"), _percent),
    Column("test accuracy, last epoch", _metric("final/test_accuracy"), _percent),
    Column("epochs to 95 % of peak train accuracy", lambda r: epochs_to_peak_share(r.history[TRAIN]), _whole),
    Column("training, s", _metric("time/total_train_seconds"), lambda v: f"{v:.1f}"),
    Column("training, images/s", _median_over_epochs(TRAIN_RATE), _whole),
    Column("inference, images/s", _median_over_epochs(EVALUATE_RATE), _whole),
    Column("one image, ms", lambda r: 1000 * r.metrics["inference/single_image_seconds"], lambda v: f"{v:.1f}"),
    Column("parameters", _metric("model/parameters"), _whole),
    Column("GFLOPs", _metric("model/gflops"), lambda v: f"{v:.3f}"),
)
Rows = list[tuple[str, ...]]


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
        return ("variant", "runs", *(column.title for column in COLUMNS))

    def rows(self) -> Rows:
        """Return a row an arm: mean over runs, ± standard deviation where there are several that differ."""
        return [
            (arm, str(len(records)), *(self._cell(column, records) for column in COLUMNS))
            for arm, records in self.arms.items()
        ]

    @staticmethod
    def _cell(column: Column, records: list[RunRecord]) -> str:
        values = [column.value(record) for record in records]
        mean = column.text(statistics.fmean(values))
        if len(set(values)) == 1:
            return mean
        return f"{mean} ± {column.text(statistics.stdev(values))}"

    def lines(self) -> Rows:
        """Return the table with a line a figure and a column an arm, the titles first."""
        return list(zip(self.header, *self.rows(), strict=True))

    def markdown(self) -> str:
        """Return the lines as Markdown."""
        return markdown_table(self.lines())

    def metrics(self) -> dict[str, float]:
        """Return the mean over runs of each arm's main figures, for the parent run."""
        return {
            f"{arm}/{name}": statistics.fmean(record.metrics[name] for record in records)
            for arm, records in self.arms.items()
            for name in PARENT_METRICS
        }

    def write(self, folder: Path, title: str) -> None:
        """Write the table (CSV with plain numbers a run, Markdown) and the figures of both curves."""
        write_csv(
            folder / "comparison.csv",
            ("variant", "seed", "run_id", *(column.title for column in COLUMNS)),
            (
                (arm, record.tags["effv2.seed"], record.run_id, *(column.value(record) for column in COLUMNS))
                for arm, records in self.arms.items()
                for record in records
            ),
        )
        (folder / "comparison.md").write_text(f"# {title}\n\n{self.markdown()}\n", encoding="utf-8")
        for name, metric in (("train", TRAIN), ("test", TEST)):
            curves = {arm: [r.history[metric] for r in records] for arm, records in self.arms.items()}
            figure = accuracy_curves(curves, f"{title}: {name} accuracy")
            figure.savefig(folder / f"{name}_accuracy.png", dpi=120)
        seconds = {arm: [r.metrics["time/total_train_seconds"] for r in runs] for arm, runs in self.arms.items()}
        bars(seconds, f"{title}: training", "seconds").savefig(folder / "training_seconds.png", dpi=120)
