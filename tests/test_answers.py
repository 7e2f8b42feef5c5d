"""Rules of verdicts that a claim or a command may choose, and the remarks on a verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from effv2.config.options import StudyOptions
from effv2.config.schema import TrainConfig
from effv2.config.studies import open_study
from effv2.core.errors import InputError
from effv2.core.reporter import Reporter
from effv2.data.dataset import load_once
from effv2.evidence.claims import read_claims
from effv2.evidence.judge import Finding, Verdict, judge
from effv2.evidence.protocols import overlap_of
from effv2.evidence.statistics import power
from effv2.studies.grid import make_grid
from effv2.tracking.read import BEST_TEST, LAST_TEST, SELECTED_TEST, SELECTED_VALIDATION, Images, RunRecord
from effv2.tracking.studies import arm_in
from tests.simulated import ABOVE, claims_of, nothing, results, run, study, two_arms

ARMS = "{a: {model.variant: a}, b: {model.variant: b}}"
CLOSE = {"a": [0.52, 0.53, 0.525], "b": [0.50, 0.51, 0.505]}


def findings(tmp_path: Path, claims: str, runs: Sequence[RunRecord]) -> dict[str, Finding]:
    """Return the first finding of each of a file's claims."""
    text = f"protocols: {{p: {{arms: {ARMS}}}}}\nclaims:\n{claims}"
    return {each.id: each.findings[0] for each in judge(claims_of(tmp_path, text), runs, nothing)}


def test_seeds_pair_runs_only_where_a_claim_says_so(tmp_path: Path) -> None:
    luck = [0.0, 0.3, -0.2, 0.1, -0.1]  # of a seed: both arms share it
    runs = study({"a": [0.5 + x + 0.02 + x / 100 for x in luck], "b": [0.5 + x for x in luck]})
    claims = two_arms(tmp_path, ABOVE)
    paired = {name: each.model_copy(update={"paired": True}) for name, each in claims.protocols.items()}
    (alone,), (pairs,) = judge(claims, runs, nothing), judge(replace(claims, protocols=paired), runs, nothing)
    assert (alone.verdict, pairs.verdict) == (Verdict.UNDECIDED, Verdict.SUPPORTED)
    assert "5 pairs" in pairs.findings[0].evidence


def test_runs_older_than_a_setting_count_with_newer_ones(tmp_path: Path) -> None:
    params = {name: str(value) for name, value in TrainConfig().flat().items() if name != "random.seed"}
    older = {name: value for name, value in params.items() if name != "optimiser.layer_decay"}
    runs = [
        run(value, seed, tags={"effv2.config_hash": "0"}, **(older if seed < 2 else params) | {"model.variant": arm})
        for arm, of_arm in CLOSE.items()
        for seed, value in enumerate(of_arm)
    ]
    found = findings(tmp_path, f"  X1: {{words: x, protocol: p, checks: [{ABOVE}]}}\n", runs)["X1"]
    assert "3 and 3 runs" in found.evidence and "not used" not in found.evidence


def test_splits_that_are_judged_on_validation_share_images_of_validation() -> None:
    params = {"data.test_fraction": "0.2", "data.validation_fraction": "0.5"}
    images = ({"test": Images("", "same"), "validation": Images("", digest)} for digest in "abc")
    runs = [RunRecord("", "", "FINISHED", params, {}, {}, {}, each) for each in images]
    assert (overlap_of([runs], SELECTED_VALIDATION), overlap_of([runs], SELECTED_TEST)) == (1.0, 0.0)


def test_a_heavier_claim_of_a_family_is_corrected_less(tmp_path: Path) -> None:
    lines = (f"  X{n}: {{words: x, protocol: p, family: f, weight: {n}, checks: [{ABOVE}]}}\n" for n in (1, 4))
    found = findings(tmp_path, "".join(lines), study(CLOSE))
    alone = found["X4"].p
    assert alone and found["X4"].corrected == pytest.approx(alone * 5 / 4)
    assert found["X1"].corrected == pytest.approx(alone * (5 if alone * 5 / 4 >= 0.05 else 1))


def test_a_family_of_a_published_name_is_ones_own(tmp_path: Path) -> None:
    published = next(each.family for each in read_claims().claims.values() if each.family)
    line = f"  X1: {{words: x, protocol: p, family: {published}, checks: [{ABOVE}]}}\n"
    found = findings(tmp_path, line, study(CLOSE))["X1"]
    assert found.tests == 1 and found.corrected == found.p


def test_the_last_epoch_is_shown_next_to_the_best_one(tmp_path: Path) -> None:
    check = f"{{kind: difference, metric: {BEST_TEST}, arm: a, against: b}}"
    runs = study({"a": [0.90, 0.91, 0.92], "b": [0.51, 0.50, 0.52]})
    runs = [replace(each, metrics={BEST_TEST: (x := each.metrics[SELECTED_TEST]), LAST_TEST: x - 0.1}) for each in runs]
    found = findings(tmp_path, f"  X1: {{words: x, protocol: p, checks: [{check}]}}", runs)["X1"]
    assert "test accuracy, last epoch: +40.00 points" in found.evidence


@pytest.mark.parametrize(("runs", "warned"), [(9, True), (10, False)])
def test_a_verdict_on_a_level_warns_below_ten_runs(tmp_path: Path, runs: int, warned: bool) -> None:
    check = f"{{kind: level, metric: {SELECTED_TEST}, arm: a, above: 0.1}}"
    values = [0.5 + seed / 1000 for seed in range(runs)]
    found = findings(tmp_path, f"  X1: {{words: x, protocol: p, checks: [{check}]}}", study({"a": values}))["X1"]
    assert found.verdict == Verdict.SUPPORTED and ("fewer than 10 runs" in found.evidence) == warned


def test_few_test_images_are_counted_too(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    images = {"test": Images("folder", "", 40, ("cat", "dog"))}
    runs = [replace(each, images=images) for each in study({"a": [0.6, 0.61, 0.62], "b": [0.5, 0.51, 0.52]})]
    answers = {
        each.run_id: dict(zip(map(str, range(40)), random.random(40) < each.metrics[SELECTED_TEST], strict=True))
        for each in runs
    }

    def right(run: RunRecord) -> Mapping[str, bool]:
        return answers[run.run_id]

    (judgement,) = judge(two_arms(tmp_path, ABOVE), runs, right)
    assert "if the 40 test images also count as a sample" in judgement.findings[0].evidence


@pytest.mark.parametrize(
    ("check", "refused"),
    [
        ("kind: difference, against: b, above: 1", True),
        ("kind: difference, against: b, below: -1", True),
        ("kind: level, above: 1", True),
        ("kind: level, below: 1", False),
        ("kind: difference, against: b, above: 0.01", False),
    ],
)
def test_a_point_is_a_hundredth(tmp_path: Path, check: str, refused: bool) -> None:
    text = f"{{{check}, arm: a, metric: {SELECTED_TEST}}}"
    if not refused:
        two_arms(tmp_path, text)
        return
    with pytest.raises(InputError, match=r"is a fraction: a point is 0\.01"):
        two_arms(tmp_path, text)


@pytest.mark.parametrize(("effect", "n"), [(0.0, 5), (1.5, 4), (1.0, 12)])
def test_power_is_the_share_of_studies_that_find_an_effect(effect: float, n: int) -> None:
    random = np.random.default_rng(n)
    first, second = random.normal(effect, 1, (20_000, n)), random.normal(0, 1, (20_000, n))
    found = np.mean(stats.ttest_ind(first, second, axis=1).pvalue < 0.05)
    assert power(effect, 2**0.5, n, samples=2) == pytest.approx(found, abs=0.012)


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["default"], {"seeds": "auto"}, "needs two arms or more"),
        (["default", "drop_one"], {"seeds": (0, 1, 2), "budget_hours": 1.0}, "only applies to auto seeds"),
        (["default", "drop_one"], {"seeds": (0, 1, 2, 3), "max_seeds": 3}, "4 seeds are given"),
    ],
)
def test_options_that_do_not_go_together_are_refused(names: list[str], options: dict[str, Any], message: str) -> None:
    load, given = load_once(Reporter()), StudyOptions.model_validate(options)
    with pytest.raises(InputError, match=message):
        make_grid("ablate", open_study("ablate"), names, {}, given, load=load, reporter=Reporter())


def test_one_look_waits_for_all_seeds_on_all_splits() -> None:
    stamps = {"study.kind": "ablate", "study.looks": "once", "study.max_seeds": "4", "study.splits": "3"}
    parent = RunRecord("p", "splits", "FINISHED", stamps, {}, {}, started=0)
    runs = [
        replace(each, tags={"effv2.arm": each.params["model.variant"]}, started=1)
        for split in range(3)
        for each in study(
            {"a": [0.5, 0.51, 0.52, 0.5], "b": [0.7, 0.71 + split / 100, 0.72, 0.7]}, data__split_seed=split
        )
    ]
    answer = results(runs, parent).answers[0]
    assert answer.startswith("b beats a by 20.") and answer.endswith("3 splits.")
    assert "11 of 12 planned runs" in results(runs[:-1], parent).answers[0]
    alike = [replace(each, metrics=dict.fromkeys(each.metrics, 0.5 + at % 5 / 100)) for at, each in enumerate(runs)]
    (undecided,) = results(alike, parent).answers
    assert undecided.endswith("the maximum of 3 splits is reached, so it remains undecided.")


def test_a_race_is_held_against_the_best_arm() -> None:
    parent = RunRecord("p", "race", "FINISHED", {"study.kind": "ablate", "study.looks": "race"}, {}, {}, started=0)
    runs = study({"a": [0.5, 0.51, 0.505], "b": [0.7, 0.71, 0.705], "c": [0.6, 0.61, 0.605]})
    runs = [replace(each, tags={"effv2.arm": each.params["model.variant"]}, started=1) for each in runs]
    found = results(runs, parent)
    assert found.answers[0] == "b is the best of 3." and found.answers[1].startswith(
        "a is worse than b by 20.00 points"
    )
    assert found.table[0][3] == "minus b [interval]"


@pytest.mark.parametrize(
    ("name", "arm"),
    [("base, seed 1", "base"), ("base, split 1, seed 12", "base"), ("a, seed 1, seed 2", "a, seed 1"), ("trial 3", "")],
)
def test_a_run_of_a_split_belongs_to_its_arm(name: str, arm: str) -> None:
    assert arm_in(name) == arm


@pytest.mark.parametrize("seeds", [3, 10, 30])
def test_power_rises_with_the_difference_and_is_always_a_number(seeds: int) -> None:
    found = [power(difference / 500, 0.0483, seeds, 0.0045, samples=2) for difference in range(500)]
    assert found == sorted(found) and found[0] == pytest.approx(0.0045) and found[-1] == pytest.approx(1, abs=1e-6)
