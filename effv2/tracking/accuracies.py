"""Which accuracy of tracked runs counts: to choose the best of some, and to compare them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from effv2.tracking.read import RunRecord

# On the test set: of its best epoch, of the selected one (the best on validation, or the last), of the last.
BEST_TEST, SELECTED_TEST, LAST_TEST = "best/test_accuracy", "selected/test_accuracy", "final/test_accuracy"
SELECTED_VALIDATION = "selected/val_accuracy"


def reached_accuracy(metrics: Mapping[str, float]) -> float:
    """Return the accuracy that a finished run was trained by, at its best: on validation where it has that."""
    return metrics[SELECTED_VALIDATION if SELECTED_VALIDATION in metrics else BEST_TEST]


def decisive_accuracy(runs: Sequence[RunRecord]) -> str:
    """Return the accuracy by which runs are compared: under the published rules, without validation, the best epoch's.

    Elsewhere it is the selected epoch's. Where the test set was left alone, it is that on validation.
    """
    if not any(SELECTED_TEST in run.metrics for run in runs):
        return SELECTED_VALIDATION
    published = any(run.params.get("data.sampling") == "published" for run in runs)
    validated = all(SELECTED_VALIDATION in run.metrics for run in runs)
    return BEST_TEST if published and not validated else SELECTED_TEST
