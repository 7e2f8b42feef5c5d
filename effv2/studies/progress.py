"""How far a study is, for whoever watches."""

from __future__ import annotations

from collections.abc import Mapping

from optuna.trial import FrozenTrial, TrialState

from effv2.core.reporter import StudyProgress
from effv2.studies.plan import Plan, best_of
from effv2.studies.queue import ERROR


def progress_of(plan: Plan, trials: Mapping[str, FrozenTrial]) -> StudyProgress:
    """Sum up the wanted trials."""
    wanted = {slot: trial for slot, trial in trials.items() if slot in plan.slots}
    count = {state: sum(trial.state == state for trial in wanted.values()) for state in TrialState}
    running = [trial for trial in wanted.values() if trial.state == TrialState.RUNNING]
    finished = {slot: trial for slot, trial in wanted.items() if trial.state.is_finished()}
    shares = sum(max(trial.intermediate_values, default=0) / plan.epochs for trial in running)
    best = best_of(wanted)
    order = sorted(finished, key=lambda slot: str(finished[slot].datetime_complete))
    return StudyProgress(
        total=len(plan.slots),
        pruned=count[TrialState.PRUNED],
        failed=count[TrialState.FAIL],
        running=len(running),
        done=len(finished) + min(shares, len(running)),
        best=(next(slot for slot in wanted if wanted[slot] is best), best.value or 0.0) if best else None,
        ended={slot: _words(finished[slot]) for slot in order},
    )


def _words(trial: FrozenTrial) -> str:
    if trial.state == TrialState.FAIL:
        return f"failed: {trial.user_attrs.get(ERROR, 'no reason known')}"
    word = "pruned at" if trial.state == TrialState.PRUNED else "reached"
    return f"{word} {trial.value or 0.0:.2%}"
