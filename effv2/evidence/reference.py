"""The post's own figures: the epochs of its training runs, as far as it published them, and what it printed."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from functools import cache

from effv2.evidence.claims import PUBLISHED, Claims, Contrast
from effv2.evidence.quantities import TEST, TRAIN, quantity
from effv2.tracking.read import RunRecord

CURVES = PUBLISHED / "curves.csv"


@cache
def published_runs() -> Mapping[str, Mapping[str, RunRecord]]:
    """Return the post's training runs, as far as it published their curves, by study and arm; one run an arm."""
    histories: dict[str, dict[str, dict[str, dict[int, float]]]] = {}
    with CURVES.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            of_arm = histories.setdefault(row["study"], {}).setdefault(row["arm"], {TRAIN: {}, TEST: {}})
            for name, column in ((TRAIN, "train_accuracy_percent"), (TEST, "test_accuracy_percent")):
                of_arm[name][int(row["epoch"])] = round(float(row[column]) / 100, 6)
    return {
        protocol: {arm: _as_run(arm, history) for arm, history in arms.items()} for protocol, arms in histories.items()
    }


def _as_run(arm: str, history: dict[str, dict[int, float]]) -> RunRecord:
    test = history[TEST]
    metrics = {"best/test_accuracy": max(test.values()), "final/test_accuracy": test[max(test)]}
    return RunRecord("", arm, "FINISHED", {}, metrics, {}, history)


def published_value(claims: Claims, contrast: Contrast, arm: str) -> float | None:
    """Return the published figure of an arm: as it was printed, else from the published curve; None without one."""
    protocol = claims.protocols[contrast.protocol]
    printed = protocol.published.figures.get(contrast.metric, {})
    if arm in printed:
        return printed[arm]
    run = published_runs().get(protocol.study, {}).get(arm)
    return None if run is None else quantity(contrast.metric).value(run)
