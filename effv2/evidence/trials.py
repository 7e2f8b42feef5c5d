"""The trials of a search: the best of them, how all of them ended, and the test accuracy of the one that was chosen."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from effv2.evidence.quantities import VALIDATION, duration, percent
from effv2.evidence.study import NONE, Rows, StudyResults, TrackedStudy
from effv2.tracking.accuracies import SELECTED_TEST, SELECTED_VALIDATION
from effv2.tracking.read import RunRecord
from effv2.tracking.tags import BEST_RUN, LOOKS, OUTCOME

BEST_TRIALS = 5
CHOSEN = (SELECTED_VALIDATION, SELECTED_TEST)  # metrics of the best trial, for the study's run


def trials_results(study: TrackedStudy) -> StudyResults:
    """Return what came out of a search."""
    runs = study.in_order()
    ranked = sorted(runs, key=lambda run: -run.metrics.get(SELECTED_VALIDATION, -math.inf))
    ranked = [run for run in ranked if SELECTED_VALIDATION in run.metrics]
    names = _searched(ranked)
    rows = [
        (
            run.name,
            run.tags.get(OUTCOME, run.status.lower()),
            run.metrics.get(SELECTED_VALIDATION),
            max(run.history.get(VALIDATION, ()), default=0),
            *map(run.params.get, names),
            run.run_id,
        )
        for run in runs
    ]
    chosen = study.parent.tags.get(BEST_RUN) if study.parent else None
    best = [run for run in ranked if run.run_id == chosen]
    return StudyResults(
        sentence=_sentence(best[0]) if best else "No trial was chosen yet.",
        table=_table(ranked, names),
        notes=_notes(study, bool(ranked)),
        metrics={name: run.metrics[name] for run in best for name in CHOSEN if name in run.metrics},
        files={"trials.csv": [("trial", "state", "validation accuracy", "epochs", *names, "run_id"), *rows]},
    )


def _sentence(best: RunRecord) -> str:
    """Say how good the trial is that was chosen."""
    on_test = f", {percent(best.metrics[SELECTED_TEST])} on the test set" if SELECTED_TEST in best.metrics else ""
    return f"Best: **{best.name}**, {percent(best.metrics[SELECTED_VALIDATION])} on validation{on_test}."


def _table(ranked: Sequence[RunRecord], names: Sequence[str]) -> Rows:
    """Return the best trials, a column each."""
    if not ranked:
        return []
    shown = ranked[:BEST_TRIALS]
    tested = [run.metrics.get(SELECTED_TEST) for run in shown]
    return [
        (f"best {len(shown)} of {len(ranked)}", *(run.name for run in shown)),
        ("validation accuracy", *(percent(run.metrics[SELECTED_VALIDATION]) for run in shown)),
        ("test accuracy", *(NONE if accuracy is None else percent(accuracy) for accuracy in tested)),
        *((name, *(_number(run.params.get(name, "")) for run in shown)) for name in names),
    ]


def _notes(study: TrackedStudy, any_ranked: bool) -> list[str]:
    """Say how the trials ended, and how often the test set was looked at."""
    parent = study.parent
    outcomes = Counter(run.tags.get(OUTCOME, "unknown") for run in study.runs if run.status in ("FINISHED", "FAILED"))
    ended = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    if not any_ranked:
        return [f"Trials: {ended}."] if ended else []
    if parent is not None and parent.status == "FINISHED" and parent.ended > parent.started:
        ended += f"; {duration((parent.ended - parent.started) / 1000)} from its first start to its end"
    looks = len(parent.tags.get(LOOKS, "").split(",")) if parent is not None else 1
    seen = "the best one alone" if looks == 1 else f"{looks}, each the best one when the search had come that far"
    return [
        f"Trials: {ended}.",
        f"Trials are chosen on validation; the test set is looked at by {seen}, after it was chosen.",
    ]


def _searched(ranked: Sequence[RunRecord]) -> list[str]:
    """Return the settings in which trials differ."""
    return [
        name
        for name in (ranked[0].params if ranked else ())
        if "." in name and len({run.params.get(name) for run in ranked}) > 1 and name != "random.seed"
    ]


def _number(text: str) -> str:
    try:
        return f"{float(text):.4g}"
    except ValueError:
        return text
