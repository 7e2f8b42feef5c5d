"""Simulated runs, studies and claims for the tests of evidence."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from effv2.config.schema import TrainConfig
from effv2.evidence.claims import Claims, read_claims
from effv2.evidence.judge import Judgement, Verdict, judge
from effv2.evidence.results import study_results
from effv2.evidence.study import StudyResults
from effv2.tracking.read import RunRecord
from effv2.tracking.studies import NO_STUDY, TrackedStudy

METRIC = "selected/test_accuracy"
numbers = itertools.count()


def nothing(run: RunRecord) -> Mapping[str, bool]:
    return {}


def run(
    accuracy: float, seed: object = 0, metric: str = METRIC, tags: Mapping[str, str] | None = None, **params: Any
) -> RunRecord:
    """Return a finished run as the tracking store does. `model__variant="a"` sets the parameter model.variant."""
    given_params = {name.replace("__", "."): str(value) for name, value in params.items()}
    return RunRecord(
        run_id=f"run {next(numbers)}",
        name="a run",
        status="FINISHED",
        params={"random.seed": str(seed)} | given_params,
        metrics={metric: accuracy},
        tags=dict(tags or {}),
    )


def study(arms: Mapping[str, Sequence[float]], **params: Any) -> list[RunRecord]:
    return [
        run(accuracy, seed, model__variant=arm, **params)
        for arm, values in arms.items()
        for seed, accuracy in enumerate(values)
    ]


def claims_of(tmp_path: Path, text: str) -> Claims:
    path = tmp_path / "claims.yaml"
    path.write_text(text)
    own = read_claims(path)
    return Claims(own.protocols, {id_: own.claims[id_] for id_ in own.claims if id_ not in read_claims().claims})


def two_arms(tmp_path: Path, check: str) -> Claims:
    arms = "{a: {model.variant: a}, b: {model.variant: b}}"
    text = f"claims: {{X1: {{words: so it is, protocol: {{arms: {arms}}}, checks: [{check}]}}}}"
    return claims_of(tmp_path, text)


ABOVE = f"{{kind: difference, metric: {METRIC}, arm: a, against: b}}"


def results(runs: Sequence[RunRecord], parent: RunRecord = NO_STUDY) -> StudyResults:
    return study_results(TrackedStudy(parent, runs), read_claims(), nothing)


def logged(config: TrainConfig, **changes: str) -> dict[str, str]:
    """Return the parameters that a run of a configuration logs."""
    return {name: str(value) for name, value in config.flat().items()} | changes


def judged(claims: Claims, runs: Sequence[RunRecord]) -> Judgement:
    (judgement,) = judge(claims, runs, nothing)
    return judgement


def verdict(claims: Claims, runs: Sequence[RunRecord]) -> Verdict:
    return judged(claims, runs).verdict


def evidence(claims: Claims, runs: Sequence[RunRecord]) -> str:
    return judged(claims, runs).findings[0].evidence
