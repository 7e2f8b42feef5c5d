"""Networks evaluated on the same images side by side: which is better than which, and how sure that is."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np

from effv2.evidence.comparison import Rows, markdown_table
from effv2.evidence.figures import CostPoint, accuracy_against_cost
from effv2.evidence.run_artifacts import write_csv
from effv2.evidence.statistics import LEVEL, Paired, holm, mcnemar, p_text, wilson
from effv2.pretrained.evaluation import FULL_BATCH, ONE_IMAGE
from effv2.pretrained.images import TEST, Origin
from effv2.tracking.read import RunRecord
from effv2.tracking.run import TrackedRun

PAIRS_WITH_P = 6  # with more pairs the p-values stand in pairs.csv alone
FEW_IMAGES = 100
FIGURES = ("top1_accuracy", "top1_present", "top5_accuracy", "loss", "ece")
IMAGES = {
    Origin.UNSEEN: "images of ImageNet's validation set, to which published weights were not fitted",
    Origin.SEEN: "images of ImageNet's training set",
    Origin.UNKNOWN: "images of which the names don't tell whether they are ImageNet's",
}
CAUTION = {
    Origin.UNSEEN: "",
    Origin.SEEN: " Published weights were fitted to these images: this says how well, and little of how they predict "
    "others.",
    Origin.UNKNOWN: " Whether the weights were fitted to these images is not known.",
}


@dataclass(frozen=True)
class Evaluated:
    """A network's run, and which images of the basis (N) it got right, over all 1000 classes."""

    record: RunRecord
    right: np.ndarray


def right_answers(record: RunRecord) -> np.ndarray:
    """Return which images of the basis a run predicted right, in the order of their names."""
    basis = record.params["evaluation.ranked_on"]
    with tempfile.TemporaryDirectory() as folder:
        name = "predictions.csv" if basis == TEST else f"{basis}/predictions.csv"
        path = TrackedRun(record.run_id, "").fetch(name, Path(folder))
        assert path is not None  # noqa: S101
        with path.open(newline="", encoding="utf-8") as file:
            rows = sorted(csv.DictReader(file), key=lambda row: row["id"])
    return np.array([row["true"] == row["predicted"] for row in rows])


@dataclass(frozen=True)
class Pair:
    """Two networks, the one with more right answers first, and Holm's correction of their test."""

    better: str
    worse: str
    test: Paired
    p: float

    @property
    def told_apart(self) -> bool:
        """Say whether the difference is real at the 5 % level."""
        return self.p < LEVEL


@dataclass(frozen=True)
class Ranking:
    """Evaluated networks by label, and what they are ranked on: a set of images and where those come from."""

    networks: Mapping[str, Evaluated]
    basis: str
    origin: Origin

    @property
    def order(self) -> list[str]:
        """Return the networks, the most accurate one on the basis first."""
        return sorted(self.networks, key=lambda label: -int(self.networks[label].right.sum()))

    @cached_property
    def pairs(self) -> list[Pair]:
        """Test every pair on the images of the basis, corrected for their number."""
        named = list(combinations(self.order, 2))
        tests = [mcnemar(self.networks[a].right, self.networks[b].right) for a, b in named]
        corrected = holm([test.p for test in tests])
        return [Pair(a, b, test, p) for (a, b), test, p in zip(named, tests, corrected, strict=True)]

    def sentence(self) -> str:
        """Say which network is better than which, and of which pairs it can't be told."""
        count = self._count(self.basis)
        head = f"Top-1 over 1000 classes on {count:,} {IMAGES[self.origin]}"
        if not self.pairs:
            said = "one network alone, nothing to compare"
        else:
            head += f" (exact McNemar tests, Holm-corrected for {len(self.pairs)}, {LEVEL:.0%} level)"
            said = "; ".join(filter(None, (self._told_apart(), self._not_told_apart())))
        few = f" So few images rarely decide; evaluate more than {FEW_IMAGES}." if count < FEW_IMAGES else ""
        return f"{head}: {said}.{few}{CAUTION[self.origin]}"

    def _told_apart(self) -> str:
        found = self._grouped([pair for pair in self.pairs if pair.told_apart])
        return "; ".join(f"{better} is better than {_joined(worse)}" for better, worse in found.items())

    def _not_told_apart(self) -> str:
        found = self._grouped([pair for pair in self.pairs if not pair.told_apart])
        words = "; ".join(f"{one} or {_joined(others, 'or')}" for one, others in found.items())
        return f"it can't be told which is better: {words}" if words else ""

    def _grouped(self, pairs: list[Pair]) -> dict[str, list[str]]:
        """Return the second networks of pairs by their first."""
        found: dict[str, list[str]] = {}
        for pair in pairs:
            p = f" ({p_text(pair.p)})" if len(self.pairs) <= PAIRS_WITH_P else ""
            found.setdefault(pair.better, []).append(f"{pair.worse}{p}")
        return found

    def summary(self) -> Rows:
        """Return a short table, a row a network, the most accurate first."""
        basis = f"{self._count(self.basis):,} {self._words(self.basis)}"
        rows = [
            (
                label,
                _proportion(self.basis, "top1_accuracy")(record := self.networks[label].record),
                _percent(f"{TEST}/top1_accuracy")(record),
                _percent(f"{TEST}/top1_present")(record),
                _number("throughput/evaluate_images_per_second", ",.1f")(record),
            )
            for label in self.order
        ]
        return [("network", f"top-1 [95 % Wilson], {basis}", "top-1, test", "of classes present", "images/s"), *rows]

    def lines(self) -> Rows:
        """Return the whole table: a line a figure, a column a network, the most accurate first, titles before all."""
        records = [self.networks[label].record for label in self.order]
        return [("", *self.order), *((name, *map(cell, records)) for name, cell in self._figures())]

    def _figures(self) -> list[tuple[str, Callable[[RunRecord], str]]]:
        found: list[tuple[str, Callable[[RunRecord], str]]] = []
        for name in self._sets():
            images = f"{self._count(name):,} {self._words(name)}"
            found += [
                (f"top-1 of 1000 [95 % Wilson], {images}", _proportion(name, "top1_accuracy")),
                (f"top-1 among the classes present [95 % Wilson], {images}", _proportion(name, "top1_present")),
            ]
        on = self._words(self.basis)
        return [
            *found,
            (f"top-5 of 1000, {on}", _percent(f"{self.basis}/top5_accuracy")),
            (f"loss, {on}", _number(f"{self.basis}/loss", ".4f")),
            (f"calibration error, {on}", _percent(f"{self.basis}/ece")),
            ("top-1 that torchvision publishes", _percent("published/top1_accuracy")),
            *self._changes_by_bf16(),
            ("images/s", _number("throughput/evaluate_images_per_second", ",.1f")),
            ("one image, ms", _number(ONE_IMAGE, ",.1f", 1000)),
            ("128 images, ms", _number(FULL_BATCH, ",.0f", 1000)),
            ("parameters", _number("model/parameters", ",.0f")),
            ("GFLOPs (multiply-accumulates)", _number("model/gflops", ".3f")),
            ("weights", lambda record: f"{record.params['weights.name']}, {record.params['weights.sha256'][:10]}"),
            ("published file, verified", lambda record: record.params["weights.verified"].lower()),
        ]

    def _changes_by_bf16(self) -> list[tuple[str, Callable[[RunRecord], str]]]:
        """Return what bf16 changes, where it was used."""
        if not any("bf16/top1_difference" in each.record.metrics for each in self.networks.values()):
            return []
        return [
            ("bf16 less float32, top-1", _percent("bf16/top1_difference")),
            ("bf16, predictions changed", _percent("bf16/predictions_changed")),
        ]

    def _sets(self) -> list[str]:
        """Return the sets of images, that of the ranking first."""
        (first, *_) = self.networks.values()
        found = [name.removesuffix("/images") for name in first.record.metrics if name.endswith("/images")]
        return sorted(found, key=lambda name: (name != self.basis, name != TEST, name))

    def _words(self, name: str) -> str:
        """Name the images of a set."""
        words = {"unseen": "unseen images", "seen": "images of ImageNet's training set", "unknown": "other images"}
        if name == TEST and self.basis == TEST:
            return {Origin.UNSEEN: "unseen images", Origin.SEEN: words["seen"]}.get(self.origin, "test images")
        return words.get(name, "test images")

    def _count(self, name: str) -> int:
        (first, *_) = self.networks.values()
        return int(first.record.metrics[f"{name}/images"])

    def markdown(self) -> str:
        """Return the sentence, the table and the runs, which may be children of other comparisons."""
        runs = "\n".join(f"- {label}: run `{self.networks[label].record.run_id}`" for label in self.order)
        return f"{self.sentence()}\n\n{markdown_table(self.lines())}\n\n{runs}"

    def metrics(self) -> dict[str, float]:
        """Return each network's main figures, for the parent run."""
        wanted = {f"{name}/{figure}" for name in (TEST, self.basis) for figure in FIGURES}
        return {
            f"{label}/{name}": value
            for label, each in self.networks.items()
            for name, value in each.record.metrics.items()
            if name in wanted
        }

    def write(self, folder: Path) -> None:
        """Write the table (Markdown, and CSV with plain numbers), the tests of all pairs and the figure."""
        (folder / "ranking.md").write_text(f"# Published weights\n\n{self.markdown()}\n", encoding="utf-8")
        names = sorted({name for each in self.networks.values() for name in each.record.metrics})
        write_csv(
            folder / "ranking.csv",
            ("network", "run_id", "right", "images", "low", "high", *names),
            (
                (label, each.record.run_id, *self._basis(each), *(each.record.metrics.get(name, "") for name in names))
                for label, each in self.networks.items()
            ),
        )
        write_csv(
            folder / "pairs.csv",
            ("better", "worse", "only_better_right", "only_worse_right", "p", "p_holm", "told_apart"),
            (
                (one.better, one.worse, one.test.only_first, one.test.only_second, one.test.p, one.p, one.told_apart)
                for one in self.pairs
            ),
        )
        points = {label: self._point(each) for label, each in self.networks.items()}
        title = f"top-1 of 1000, {self._count(self.basis):,} {self._words(self.basis)}"
        accuracy_against_cost(points, title).savefig(folder / "accuracy_against_cost.png", dpi=120)

    def _basis(self, each: Evaluated) -> tuple[int, int, float, float]:
        right, count = int(each.right.sum()), len(each.right)
        interval = wilson(right, count)
        return right, count, interval.low, interval.high

    def _point(self, each: Evaluated) -> CostPoint:
        right, count, low, high = self._basis(each)
        metrics = each.record.metrics
        milliseconds = 1000 / metrics["throughput/evaluate_images_per_second"]
        return CostPoint(right / count, low, high, metrics["model/gflops"], milliseconds)


def _proportion(name: str, figure: str) -> Callable[[RunRecord], str]:
    def cell(record: RunRecord) -> str:
        value, count = record.metrics[f"{name}/{figure}"], int(record.metrics[f"{name}/images"])
        interval = wilson(round(value * count), count)
        return f"{value:.2%} [{interval.low:.2%} to {interval.high:.2%}]"

    return cell


def _percent(name: str) -> Callable[[RunRecord], str]:
    return lambda record: f"{record.metrics[name]:.2%}" if name in record.metrics else "none"


def _number(name: str, form: str, factor: float = 1) -> Callable[[RunRecord], str]:
    return lambda record: f"{factor * record.metrics[name]:{form}}" if name in record.metrics else "none"


def _joined(words: list[str], last: str = "and") -> str:
    return f" {last} ".join(filter(None, (", ".join(words[:-1]), words[-1])))
