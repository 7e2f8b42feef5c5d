"""What evidence decides: statistics, and verdicts on simulated studies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from effv2.evidence.claims import Claims, read_claims
from effv2.evidence.judge import Verdict, judge
from effv2.evidence.quantities import TEST, TRAIN, quantity
from effv2.evidence.statistics import FEWEST, LEVEL, Estimate, Looks, over_images
from effv2.tracking.read import Images, RunRecord
from tests.simulated import ABOVE, METRIC, claims_of, evidence, judged, nothing, run, study, two_arms, verdict

slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("seeds", "studies"), [(3, 150), (10, 150), *(pytest.param(n, 1000, marks=slow) for n in (3, 5, 10))]
)
def test_studies_without_an_effect_get_few_false_verdicts(tmp_path: Path, seeds: int, studies: int) -> None:
    order = f"{{kind: ordering, metric: {METRIC}, order: [a, [b, c, d]]}}"
    arms = "{a: {model.variant: a}, b: {model.variant: b}, c: {model.variant: c}, d: {model.variant: d}}"
    text = (
        f"protocols: {{p: {{arms: {arms}}}}}\n"
        f"claims:\n  X1: {{words: a is best, protocol: p, checks: [{order}]}}\n"
        f"  Y1: {{words: a beats b, protocol: p, checks: [{ABOVE}]}}"
    )
    claims, random = claims_of(tmp_path, text), np.random.default_rng(seeds)
    false = {"X1": 0, "Y1": 0}
    for _ in range(studies):
        luck = random.normal(0, 0.02, seeds)  # of a seed: all arms share it
        values = {arm: 0.5 + luck + random.normal(0, 0.01, seeds) for arm in "abcd"}
        for each in judge(claims, study({arm: list(map(float, v)) for arm, v in values.items()}), nothing):
            false[each.id] += each.verdict != Verdict.UNDECIDED
    assert max(false.values()) <= 0.05 * studies + 2 * np.sqrt(0.05 * 0.95 * studies), false


samples = st.lists(st.floats(-1, 1), min_size=3, max_size=12).filter(lambda values: np.std(values) > 1e-3)


@given(samples, st.floats(-1, 1))
@settings(max_examples=50)
def test_intervals_and_p_values_are_those_of_students_test(values: list[float], edge: float) -> None:
    sample, (low, high) = (
        Estimate(values, looks=Looks(12, once=True)),
        stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values)),
    )
    assert sample.interval() == pytest.approx((low, high))
    assert sample.p(edge) == pytest.approx(stats.ttest_1samp(values, edge).pvalue, abs=1e-9)
    assert (sample.p(edge) < LEVEL) == (not low <= edge <= high) or sample.p(edge) == pytest.approx(LEVEL)
    equal = Estimate([0.5] * len(values), looks=Looks(12, once=True))
    assert (equal.interval() == (0.5, 0.5)) == (equal.p(0.4) < LEVEL) == (2 * 0.5 ** len(values) < LEVEL)
    both = Estimate(values, tuple(edge + value / 2 for value in values), looks=Looks(12, once=True))
    welch = stats.ttest_ind(values, [edge + value / 2 for value in values], equal_var=False)
    assert both.p(0) == pytest.approx(welch.pvalue, abs=1e-9)


@pytest.mark.parametrize(
    ("check", "values", "expected"),
    [
        ("{kind: level, metric: M, arm: a, about: 0.5, within: 0.05}", [0.50, 0.51, 0.50], Verdict.SUPPORTED),
        ("{kind: level, metric: M, arm: a, about: 0.6, within: 0.05}", [0.50, 0.51, 0.50], Verdict.CONTRADICTED),
        ("{kind: level, metric: M, arm: a, above: 0.4}", [0.50, 0.51], Verdict.UNDECIDED),
        ("{kind: level, metric: M, arm: a, below: 0.4}", [0.50, 0.51, 0.50], Verdict.CONTRADICTED),
        ("{kind: difference, metric: M, PAIR, about: 0.1, within: 0.05}", [0.50, 0.51, 0.50], Verdict.SUPPORTED),
        ("{kind: difference, metric: M, PAIR, about: 0, within: 0.02}", [0.50, 0.51, 0.50], Verdict.CONTRADICTED),
        ("{kind: difference, metric: M, arm: a, against: b}", [0.50, 0.30, 0.45], Verdict.UNDECIDED),
        ("{kind: convergence, metric: M, arm: a, against: b}", [0.3, 0.31, 0.3], Verdict.SUPPORTED),
        ("{kind: speed, metric: M, arm: a, against: b, above: 1.1}", [0.50, 0.51, 0.50], Verdict.SUPPORTED),
        ("{kind: speed, metric: M, arm: a, against: b, below: 1}", [0.50, 0.51, 0.50], Verdict.CONTRADICTED),
        ("{kind: speed, metric: M, PAIR, about: 1.25, within: 0.1}", [0.50, 0.51, 0.50], Verdict.SUPPORTED),
        ("{kind: ordering, metric: M, order: [b, a]}", [0.50, 0.51, 0.50], Verdict.CONTRADICTED),
    ],
)  # fmt: skip
def test_every_kind_of_claim(tmp_path: Path, check: str, values: list[float], expected: Verdict) -> None:
    claims = two_arms(tmp_path, check.replace("M,", f"{METRIC},").replace("PAIR", "arm: a, against: b"))
    assert verdict(claims, study({"a": values, "b": [0.400, 0.410, 0.401][: len(values)]})) == expected


def test_fewer_than_three_runs_decide_nothing_and_one_network_is_judged_on_its_images(tmp_path: Path) -> None:
    claims = two_arms(tmp_path, ABOVE)
    for seeds in range(1, FEWEST):
        assert verdict(claims, study({"a": [0.9] * seeds, "b": [0.1] * seeds})) == Verdict.UNDECIDED
    published = read_claims()
    p1 = Claims(published.protocols, {"P1": published.claims["P1"]})
    networks = {"efficientnet_v2_s": 90, "resnet50": 70, "efficientnet_b0": 69}
    settings: dict[str, Any] = {
        "data__dataset": "imagenette",
        "data__per_class": 0,
        "data__limit": 0,
        "weights__verified": True,
    }
    arms = {arm: p1.protocols["pretrained-imagenette"].own(arm) for arm in networks}
    runs = [
        run(
            0.5,
            metric="eval/top1_accuracy",
            model__name=name,
            weights__name=arms[name]["weights.name"],
            **settings,
        )
        for name in networks
    ]

    def right(record: RunRecord) -> dict[str, bool]:
        return {str(image): image < networks[record.params["model.name"]] for image in range(100)}

    (judgement,) = judge(p1, runs, right)
    first, second = judgement.findings
    assert first.verdict == Verdict.SUPPORTED and first.p == pytest.approx(2 * 0.5**20)
    assert second.verdict == Verdict.UNDECIDED and judgement.verdict == Verdict.UNDECIDED


def test_only_runs_that_differ_in_nothing_else_are_compared(tmp_path: Path) -> None:
    claims = two_arms(tmp_path, ABOVE)
    high, low = [0.90, 0.91, 0.92], [0.50, 0.51, 0.49]
    fitting = study({"a": high, "b": low}, optimiser__lr=0.1)
    assert verdict(claims, fitting) == Verdict.SUPPORTED
    assert verdict(claims, [*study({"a": low}, optimiser__lr=0.2), *fitting]) == Verdict.SUPPORTED
    fewer = study({"a": low[:2], "b": high[:2]}, optimiser__lr=0.3)
    assert "4 runs not used, which differ from these in optimiser.lr" in evidence(claims, [*fitting, *fewer])
    unlike = study({"a": high}, optimiser__lr=0.1) + study({"b": low}, optimiser__lr=0.2)
    judgement = judged(claims, unlike)
    assert judgement.verdict == Verdict.NOT_TESTED and "in optimiser.lr" in judgement.findings[0].lacking
    # A missing or non-finite value is no evidence.
    broken = [run(float("nan"), 7, model__variant=arm, optimiser__lr=0.1) for arm in "ab"]
    judgement = judged(claims, [*fitting, *broken])
    assert (
        "3 and 3 runs; 1 run of a without" in judgement.findings[0].evidence and judgement.verdict == Verdict.SUPPORTED
    )
    assert "the runs of a are without" in judge(claims, broken, nothing)[0].findings[0].lacking
    pruned = [
        run(0.1, seed, model__variant="a", optimiser__lr=0.1, tags={"effv2.outcome": "pruned"}) for seed in range(3)
    ]
    assert verdict(claims, [*fitting, *pruned]) == Verdict.SUPPORTED
    # The last repetition of a run counts. Runs that don't pair are compared too.
    assert "3 and 3 runs; 3 runs of a repeated since" in evidence(
        claims, [*study({"a": low}, optimiser__lr=0.1), *fitting]
    )
    failed = [replace(each, status="FAILED", metrics={}) for each in fitting[:2]]
    assert "2 runs of a failed" in evidence(claims, [*fitting, *failed])
    percentages = [run(80.0, 7, model__variant=arm, optimiser__lr=0.1) for arm in "ab"]
    assert "1 run of a left out: above 1, but accuracies are fractions" in evidence(claims, [*fitting, *percentages])
    # Parameters without a dot count in runs of other programs. In our runs, `mlflow run` logs its options so.
    other = study({"a": high}, lr=0.1) + study({"b": low}, lr=0.2)
    assert "differ in lr; name it under `ignore`" in judged(claims, other).findings[0].lacking
    ours = [replace(each, tags={"effv2.config_hash": "0"}) for each in other]
    assert verdict(claims, ours) == Verdict.SUPPORTED
    named = replace_protocol(claims, ignore=["lr"])
    assert verdict(named, other) == Verdict.SUPPORTED


def replace_protocol(claims: Claims, **changes: Any) -> Claims:
    return replace(claims, protocols={k: each.model_copy(update=changes) for k, each in claims.protocols.items()})


def test_a_plan_counts_only_if_it_was_made_before_the_runs(tmp_path: Path) -> None:
    claims, values = (
        two_arms(tmp_path, ABOVE),
        {"a": [0.52, 0.53, 0.525, 0.52, 0.6], "b": [0.50, 0.51, 0.505, 0.5, 0.5]},
    )
    plan = replace(run(0), run_id="p", params={"study.max_seeds": "4", "study.looks": "once"}, metrics={}, started=5)
    runs = [replace(each, tags={"mlflow.parentRunId": "p"}, started=5) for each in study(values)]
    found = evidence(claims, [plan, *runs])
    assert "4 and 4 runs, one look, at 4 seeds" in found and "2 runs beyond 4 seeds of an arm left out" in found
    early = judged(claims, [plan, *(each for each in runs if each.params["random.seed"] in "012")])
    assert early.verdict == Verdict.UNDECIDED and "3 of 4 planned runs" in early.findings[0].lacking
    assert "one look" not in evidence(claims, [replace(plan, started=6), *runs])  # made after the runs


def test_a_claim_needs_all_its_checks_and_is_corrected_within_its_family(tmp_path: Path) -> None:
    arms = "{a: {model.variant: a}, b: {model.variant: b}}"
    text = f"protocols: {{p: {{arms: {arms}}}}}\nclaims:\n" + "".join(
        f"  X{n}: {{words: x, protocol: p, {family} checks: [{', '.join([ABOVE] * checks)}]}}\n"
        for n, checks, family in ((1, 1, ""), (2, 5, ""), (3, 1, "family: f,"), (4, 1, "family: f,"))
    )
    found = judge(claims_of(tmp_path, text), study({"a": [0.52, 0.53, 0.525], "b": [0.50, 0.51, 0.505]}), nothing)
    alone, many, first, second = (each.findings[0] for each in found)
    assert alone.corrected == pytest.approx(many.corrected) == pytest.approx(alone.p)
    assert first.corrected == second.corrected == pytest.approx(2 * (alone.p or 0))
    assert over_images([np.eye(3), np.zeros((3, 3))])[0] == pytest.approx(1 / 3)


def test_only_comparable_times_and_images_are_compared(tmp_path: Path) -> None:
    speed = two_arms(tmp_path, "{kind: speed, metric: time/total_train_seconds, arm: a, against: b}")

    def timed(arm: str, seconds: float, processor: str) -> list[RunRecord]:
        tags = {"effv2.machine.processor": processor}
        metric = "time/total_train_seconds"
        return [run(seconds + seed, seed, metric, tags, model__variant=arm) for seed in range(3)]

    assert verdict(speed, [*timed("a", 90, "old"), *timed("b", 60, "old")]) == Verdict.SUPPORTED
    judgement = judged(speed, [*timed("a", 90, "old"), *timed("b", 60, "new")])
    assert judgement.verdict == Verdict.NOT_TESTED and "processor" in judgement.findings[0].lacking
    claims = two_arms(tmp_path, ABOVE)
    cats, dogs = ({"test": Images("folder", "", 9, names)} for names in (("cat", "lynx"), ("dog", "wolf")))
    runs = study({"a": [0.90, 0.91, 0.92], "b": [0.51, 0.50, 0.52]})
    assert verdict(claims, [replace(each, images=cats) for each in runs]) == Verdict.SUPPORTED
    mixed = [replace(each, images=cats if each.params["model.variant"] == "a" else dogs) for each in runs]
    assert verdict(claims, mixed) == Verdict.NOT_TESTED
    other = [replace(each, tags={"effv2.data_digest": each.params["model.variant"]}) for each in runs]
    assert verdict(claims, other) == Verdict.NOT_TESTED


def test_repeated_splits_count_once_each_and_widen_the_interval(tmp_path: Path) -> None:
    claims, values = two_arms(tmp_path, ABOVE), [0.04, 0.01, 0.03, 0.02, 0.025]
    one = study({"a": values, "b": [0.0] * 5}, data__split_seed=42)
    several = [
        run(value if arm == "a" else 0.0, seed, model__variant=arm, data__split_seed=split)
        for split, value in enumerate(values)
        for arm in "ab"
        for seed in range(2)
    ]
    (on_one,), (on_several,) = judge(claims, one, nothing), judge(claims, several, nothing)
    # Nobody planned the second seeds, so they don't count: more seeds aren't more splits.
    words = on_several.findings[0].evidence
    assert "5 and 5 runs on 5 splits" in words and "10 runs beyond one seed per split left out" in words
    # A run on a second split doesn't change the result of five on the first.
    more = [run(0.5, 9, model__variant=arm, data__split_seed=1) for arm in "ab"]
    assert evidence(claims, [*one, *more]).startswith(f"{on_one.findings[0].evidence}; only on one split, 2 runs")
    same = {"test": Images("mnist", "digest", 10_000)}  # with a test part of its own, the splits share only that
    apart_from_it = judged(claims, [replace(each, images=same) for each in several]).findings[0]
    assert apart_from_it.p == pytest.approx(Estimate(values).p(0))
    apart = study({"a": values}, data__split_seed=1) + study({"b": [0.0, 0.001] * 2}, data__split_seed=2)
    judgement = judged(claims, apart)
    assert judgement.verdict == Verdict.NOT_TESTED and "no split" in judgement.findings[0].lacking
    corrected = Estimate(values, overlap=0.25)  # of Nadeau and Bengio: 1/n plus the ratio of test to training images
    assert corrected.error == pytest.approx(np.std(values, ddof=1) * np.sqrt(1 / 5 + 0.25))
    assert on_several.findings[0].p == pytest.approx(corrected.p(0))


def test_seeds_to_decide_and_the_interval_of_the_next_seed() -> None:
    about, few, many = Estimate((0.02, 0.01, -0.005, 0.015)).seeds_to_decide()
    assert few and about and few < about < (many or 99)
    # On overlapping splits, more seeds can't reduce the error of a mean below a limit. Smaller effects stay undecided.
    assert Estimate((0.031, -0.019, 0.011, -0.009, 0.016), overlap=0.25).seeds_to_decide()[0] is None
    random = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        drawn = random.normal(0, 1, 6).tolist()
        low, high = Estimate(drawn[:5]).prediction()
        inside += low <= drawn[5] <= high
    assert inside / 1000 == pytest.approx(0.95, abs=0.02)


def test_quantities_of_curves() -> None:
    curve = {epoch: min(0.5, 0.05 * epoch) for epoch in range(1, 41)}
    record = RunRecord("", "", "FINISHED", {}, {}, {}, {TRAIN: curve, TEST: curve})
    expected = {
        "best/train_accuracy": 0.5, "epochs/to_95_percent": 10, "level/test_accuracy": 0.5,
        "gain/test_after_epoch_10": 0.5 - (0.45 + 0.5 + 0.5) / 3, "epochs/to_test_level": 9,
    }  # fmt: skip
    assert {name: quantity(name).value(record) for name in expected} == pytest.approx(expected)
    short = RunRecord("", "", "FINISHED", {}, {}, {}, {TEST: {1: 0.1}})
    assert quantity("gain/test_after_epoch_10").value(short) is None
    assert quantity("best/train_accuracy").value(short) is None


def test_the_nearest_runs_are_those_that_know_the_setting(tmp_path: Path) -> None:
    protocol = "{runs: {data.dataset: birds, data.classes: 25}, arms: {a: {model.variant: a}}}"
    check = f"{{kind: level, metric: {METRIC}, arm: a, above: 0.5}}"
    claims = claims_of(tmp_path, f"claims: {{X1: {{words: so, protocol: {protocol}, checks: [{check}]}}}}")
    some = run(0.6, model__variant="a", data__dataset="birds")
    ten = replace(some, images={"test": Images("birds", "1", 200, tuple("abcdefghij"))})
    judgement = judged(claims, [ten, some])
    assert judgement.findings[0].lacking == "no run is like a: in the nearest ones data.classes is 10, not 25"


def test_a_misspelt_metric_is_distinguished_from_a_missing_one(tmp_path: Path) -> None:
    runs = [run(0.6, metric="my/score", model__variant="a")]
    for metric, said in {
        "my/scroe": "no run has my/scroe; did you mean 'my/score'?",
        "level/tset_accuracy": "no run has level/tset_accuracy; did you mean 'level/test_accuracy'?",
        "level/test_accuracy": "the runs of a are without a usable test accuracy, mean of the last ten epochs",
    }.items():
        claims = two_arms(tmp_path, f"{{kind: level, metric: {metric}, arm: a, above: 0.5}}")
        assert judge(claims, runs, nothing)[0].findings[0].lacking == said
