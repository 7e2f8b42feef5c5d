"""Published networks evaluated on the same images: how good each is, which is better, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from effv2.evidence.figures import CostPoint, accuracy_against_cost
from effv2.evidence.quantities import EVALUATE_RATE, LARGEST, SHOWN, percent, whole
from effv2.evidence.selection import RightAnswers, complete
from effv2.evidence.statistics import LEVEL, McNemar, holm, mcnemar, p_text, wilson
from effv2.evidence.study import NONE, Rows, StudyResults, TrackedStudy, line_of, markdown_table
from effv2.tracking.read import RunRecord

PAIRS_WITH_P = 6  # with more pairs the p-values stand in pairs.csv alone
FEW_IMAGES = 100
OF_ALL_SETS = ("top1_accuracy", "top1_present", "top5_accuracy", "loss", "ece")
# What a ranking rests on, by the origin of the images, and what to make of it.
IMAGES = {
    "unseen": "images of ImageNet's validation set, to which published weights were not fitted",
    "seen": "images of ImageNet's training set",
    "unknown": "images of which the names don't tell whether they are ImageNet's",
}
CAUTION = {
    "seen": " Published weights were fitted to these images: this says how well, little of how they predict others.",
    "unknown": " Whether the weights were fitted to these images is not known.",
}
Runs = Mapping[str, RunRecord]  # of networks, by label


class ComparedNetworks(NamedTuple):
    """Two networks, the one with more right answers first, and Holm's correction of their test."""

    better: str
    worse: str
    test: McNemar
    p: float


class Ranking(NamedTuple):
    """Which images of a set networks got right (bool (N) by label, the best first), and where the images come from."""

    right: Mapping[str, np.ndarray]
    images: str  # eval, all test images, or those of one origin
    origin: str

    @property
    def size(self) -> int:
        """Return the number of images."""
        return len(next(iter(self.right.values()), ()))

    def pairs(self) -> list[ComparedNetworks]:
        """Test every pair on the images, corrected for their number."""
        names = list(combinations(self.right, 2))
        tests = [mcnemar(self.right[one], self.right[other]) for one, other in names]
        corrected = holm([test.p for test in tests])
        return [ComparedNetworks(*pair, test, p) for pair, test, p in zip(names, tests, corrected, strict=True)]


def networks_results(study: TrackedStudy, right: RightAnswers) -> StudyResults:
    """Return what came out of an evaluation of networks; `right` reads which images a run got right."""
    runs = {run.name: run for run in complete(study.in_order())}
    ranking = _rank(runs, right)
    order = [*ranking.right, *(label for label in runs if label not in ranking.right)]
    sentence, table = _sentence(runs, ranking), _table([runs[label] for label in order])
    details = _details({label: runs[label] for label in order}, ranking)
    metrics = sorted({name for run in runs.values() for name in run.metrics})
    ranked = {label: int(each.sum()) for label, each in ranking.right.items()}
    texts = ["# Published weights", sentence, *(markdown_table(rows) for rows in (table, details) if rows)]
    files: dict[str, Any] = {
        "ranking.md": "\n\n".join(texts) + "\n",
        "ranking.csv": [
            ("network", "run_id", "right", "images", "low", "high", *metrics),
            *(
                (
                    label,
                    run.run_id,
                    right_,
                    ranking.size,
                    *wilson(right_, ranking.size),
                    *map(run.metrics.get, metrics),
                )
                for label, run in runs.items()
                if (right_ := ranked.get(label)) is not None
            ),
        ],
        "pairs.csv": [
            ("better", "worse", "only_better_right", "only_worse_right", "p", "p_holm", "told_apart"),
            *((pair.better, pair.worse, *pair.test, pair.p, pair.p < LEVEL) for pair in ranking.pairs()),
        ],
        "accuracy_against_cost.png": _figure(runs, ranking),
    }
    return StudyResults(
        sentence=sentence,
        table=table,
        details=details,
        order=order,
        metrics={
            f"{label}/{name}": run.metrics[name]
            for label, run in runs.items()
            for name in dict.fromkeys(f"{images}/{each}" for images in ("eval", ranking.images) for each in OF_ALL_SETS)
            if name in run.metrics
        },
        files=files if ranking.right else {},
    )


def _rank(runs: Runs, right: RightAnswers) -> Ranking:
    """Rank networks by the images that their runs have predictions of, all of the same ones.

    Runs that don't say which set of images it is are older; then the number of images tells.
    """
    answers = {label: found for label, run in runs.items() if (found := right(run))}
    if not answers:
        return Ranking({}, "eval", "unknown")
    shared = sorted(set.intersection(*map(set, answers.values())))
    correct = {label: np.array([each[image] for image in shared], bool) for label, each in answers.items()}
    run = runs[next(iter(answers))]
    fitting = [name for name in ("unseen", "unknown") if run.metrics.get(f"{name}/images") == len(shared)]
    images = run.params.get("evaluation.ranked_on", (*fitting, "eval")[0])
    origin = run.params.get("evaluation.ranked_origin", images if images in IMAGES else "unknown")
    return Ranking(dict(sorted(correct.items(), key=lambda item: -int(item[1].sum()))), images, origin)


def _sentence(runs: Runs, ranking: Ranking) -> str:
    """Say which network is better than which, and of which pairs it can't be told."""
    lost = [label for label in runs if label not in ranking.right]
    missing = f" Not ranked, since predictions are missing: {_joined(lost)}." if lost else ""
    if not ranking.right:
        return f"No network was ranked.{missing}"
    pairs = ranking.pairs()
    head = f"Top-1 over 1000 classes on {ranking.size:,} {IMAGES[ranking.origin]}"
    words = ["one network alone, nothing to compare"]
    if pairs:
        head += f" (exact McNemar tests, Holm-corrected for {len(pairs)}, {LEVEL:.0%} level)"
        told, open_ = (_grouped(pairs, apart) for apart in (True, False))
        words = [f"{better} is better than {_joined(worse)}" for better, worse in told.items()]
        alternatives = "; ".join(f"{one} or {_joined(others, 'or')}" for one, others in open_.items())
        words += [f"it can't be told which is better: {alternatives}"] if open_ else []
    few = f" So few images rarely decide; evaluate more than {FEW_IMAGES}." if ranking.size < FEW_IMAGES else ""
    return f"{head}: {'; '.join(words)}.{few}{CAUTION.get(ranking.origin, '')}{missing}"


def _grouped(pairs: Sequence[ComparedNetworks], told_apart: bool) -> dict[str, list[str]]:
    """Return the second networks of pairs by their first: of those told apart, or of the others."""
    found: dict[str, list[str]] = {}
    for pair in pairs:
        if (pair.p < LEVEL) == told_apart:
            p = f" ({p_text(pair.p)})" if len(pairs) <= PAIRS_WITH_P else ""
            found.setdefault(pair.better, []).append(f"{pair.worse}{p}")
    return found


def _joined(words: Sequence[str], last: str = "and") -> str:
    return f" {last} ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _table(runs: Sequence[RunRecord]) -> Rows:
    """Return a line a network and set of images: those that it wasn't fitted to, where they are known, and all."""
    rows: Rows = [("network", "top-1 of 1000 [95 % Wilson]", "among the classes present", "on", "images/s")]
    for run in runs:
        seen = run.metrics.get("seen/images", 0)
        every = "test images" + (f", {seen:,.0f} of which it was trained on" if seen else "")
        sets = {"unseen": "images that it was not trained on", "unknown": "test images not known to be of its training"}
        for images, which in (sets | {"eval": every}).items():
            value, number = run.metrics.get(f"{images}/top1_accuracy"), run.metrics.get(f"{images}/images", 0.0)
            if value is None:
                continue
            count = int(number) if 0 < number < LARGEST else 0
            interval = wilson(round(value * count), count) if count and 0 <= value <= 1 else None
            shown = percent(value) + (f" [{percent(interval.low)} to {percent(interval.high)}]" if interval else "")
            present, rate = run.metrics.get(f"{images}/top1_present"), run.metrics.get(EVALUATE_RATE)
            on = f"{count:,} {which}" if count else which
            cells = (NONE if present is None else percent(present), on, NONE if rate is None else whole(rate))
            rows.append((run.name, shown, *cells))
    return rows if len(rows) > 1 else []


def _details(runs: Runs, ranking: Ranking) -> Rows:
    """Return the other figures of networks: a line a figure, a column a network."""
    groups = {label: [run] for label, run in runs.items()}
    names = (*(f"{ranking.images}/{each}" for each in OF_ALL_SETS[2:]), *SHOWN)
    weights = [
        (title, *(run.params.get(name, NONE)[:longest] for run in runs.values()))
        for title, name, longest in (
            ("weights", "weights.name", None),
            ("their SHA-256", "weights.sha256", 10),
            ("published file, verified", "weights.verified", None),
        )
    ]
    titles, ids = ("network", *runs), ("run", *(run.run_id for run in runs.values()))
    return [titles, *(line for name in names for line in line_of(groups, name)), *weights, ids] if runs else []


def _figure(runs: Runs, ranking: Ranking) -> Figure:
    points = {}
    for label, each in ranking.right.items():
        rate, gflops = (runs[label].metrics.get(name) for name in (EVALUATE_RATE, "model/gflops"))
        if rate and gflops:
            interval = wilson(int(each.sum()), len(each))
            points[label] = CostPoint(float(each.mean()), interval, gflops, 1000 / rate)
    return accuracy_against_cost(points, f"top-1 of 1000, {ranking.size:,} {ranking.origin} images")
