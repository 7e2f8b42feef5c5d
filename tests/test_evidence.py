"""What evidence decides: claims on published figures, on simulated studies, on runs that pair or don't."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from effv2.config.schema import TrainConfig
from effv2.config.studies import open_study
from effv2.core.errors import InputError
from effv2.core.figures import bars, forest
from effv2.evidence.claims import Claims, published_runs, read_claims
from effv2.evidence.judge import CONSISTENT, INCONSISTENT, NO_FIGURES, Judgement, Verdict, judge
from effv2.evidence.protocols import FREE, Protocol, is_like
from effv2.evidence.quantities import TEST, TRAIN, quantity
from effv2.evidence.results import study_results
from effv2.evidence.statistics import FEWEST, LEVEL, Estimate, Interval, Looks, over_images
from effv2.evidence.study import StudyResults
from effv2.run.records import _confusion_figure
from effv2.tracking.read import Images, RunRecord
from effv2.tracking.studies import NO_STUDY, TrackedStudy
from effv2.tracking.tags import COMMAND, LONGEST_TAG, LOOKS, PLANNED, as_tags, names_in

METRIC = "selected/test_accuracy"
numbers = itertools.count()


def nothing(run: RunRecord) -> Mapping[str, bool]:
    return {}


def run(
    accuracy: float, seed: object = 0, metric: str = METRIC, tags: Mapping[str, str] | None = None, **params: Any
) -> RunRecord:
    """Return a finished run as the tracking store would; `model__variant="a"` is the parameter model.variant."""
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


def judged(claims: Claims, runs: Sequence[RunRecord]) -> Judgement:
    (judgement,) = judge(claims, runs, nothing)
    return judgement


def verdict(claims: Claims, runs: Sequence[RunRecord]) -> Verdict:
    return judged(claims, runs).verdict


def evidence(claims: Claims, runs: Sequence[RunRecord]) -> str:
    return judged(claims, runs).findings[0].evidence


def results(runs: Sequence[RunRecord], parent: RunRecord = NO_STUDY) -> StudyResults:
    return study_results(TrackedStudy(parent, runs), read_claims(), nothing)


def test_the_posts_words_against_its_own_figures_and_single_runs() -> None:
    found = {each.id: each for each in judge(read_claims(), [], nothing)}
    assert set(found) == {
        "T1", "T2", "T3", "T4", "T5", "P1", "F1", "F2", "F3", "F4", "F5",
        "H1", "H2", "H3", "H4", "H5", "H6", "H7", "H8", "A1", "A2", "A3", "A4", "A5", "A6", "A7", "A8", "E1", "E2",
        "E3", "E4",
    }  # fmt: skip
    assert {id_: found[id_].words for id_ in ("A1", "A2", "A3", "P1")} == {
        "A1": INCONSISTENT, "A2": INCONSISTENT, "A3": INCONSISTENT, "P1": CONSISTENT,
    }  # fmt: skip
    # One run decides nothing either way; where there isn't even one, nothing was tested.
    for each in found.values():
        nothing_known = each.words == NO_FIGURES
        assert each.verdict == (Verdict.NOT_TESTED if nothing_known else Verdict.UNDECIDED), each.id
    assert all("not tested" in finding.verdict.value for each in found.values() for finding in each.findings)
    # Its best on MNIST is fused_only: 1,958 against 1,943 of 2,000 right is no evidence either.
    assert "1,943 and 1,958 of 2,000 images right; Fisher's exact p = 0.15" in next(
        f.published for f in found["A2"].findings if "fused_only" in f.published + f.says and "−" in f.says
    )


def test_published_curves_are_those_of_the_post() -> None:
    best = {
        (protocol, arm): quantity("best/test_accuracy").value(record)
        for protocol, arms in published_runs().items()
        for arm, record in arms.items()
    }
    assert best["ablate-imagenette", "drop_one"] == 0.5357 and best["ablate-imagenette", "default"] == 0.4997
    assert best["ablate-mnist", "fused_only"] == 0.979 and best["ablate-birds", "mbconv_only"] == 0.074
    assert best["train-birds-32", "default"] == 0.06 and best["train-birds-128", "default"] == 0.138
    lengths = {
        protocol: {len(each.history[TEST]) for each in arms.values()} for protocol, arms in published_runs().items()
    }
    assert lengths["ablate-imagenette"] == {100} and lengths["ablate-mnist"] == {5}
    assert lengths["ablate-birds"] == {50} and lengths["train-birds-32"] == {350}


def logged(config: TrainConfig, **changes: str) -> dict[str, str]:
    """Return the parameters that a run of a configuration logs."""
    return {name: str(value) for name, value in config.flat().items()} | changes


@pytest.mark.parametrize("name", ["ablate-mnist", "hparam-imagenette-32", "train-birds-128"])
def test_a_claim_on_a_study_is_about_runs_of_its_arms_and_of_nothing_that_differs(name: str) -> None:
    study, protocol = open_study(name), read_claims().protocols[name]
    images = {"train": Images("birds", "", 1995, tuple(map(str, range(25))))} if "birds" in name else {}
    for arm in protocol.arms:
        config = study.arm(arm, {}) if study.arms else study.config({})
        record = RunRecord("", "", "FINISHED", logged(config), {}, {}, images=images)
        assert [each for each in protocol.arms if is_like(record, protocol, each)] == [arm]
        for setting, value in record.params.items():
            if setting not in FREE:
                other = replace(record, params=record.params | {setting: f"{value}1"})
                assert not is_like(other, protocol, arm), setting
    assert study.command in protocol.command and protocol.command != study.command


def test_runs_older_than_a_setting_count_as_they_were() -> None:
    """The published runs logged no stopping.best_since; what they did is its default."""
    config = open_study("ablate-mnist").arm("default", {})
    params = {name: value for name, value in logged(config).items() if name != "stopping.best_since"}
    record = RunRecord("", "", "FINISHED", params, {}, {"effv2.config_hash": "0"})
    protocol = read_claims().protocols["ablate-mnist"]
    assert is_like(record, protocol, "default")
    assert not is_like(replace(record, params=params | {"stopping.best_since": "min_epochs"}), protocol, "default")
    # A run from elsewhere, or an evaluation, which never had these settings, is none of them.
    assert not is_like(replace(record, tags={}), protocol, "default")
    evaluation = {"data.dataset": "imagenette", "model.name": "resnet50"}
    anything = Protocol(arms={"default": {"model.variant": "default"}})
    assert not is_like(replace(record, params=evaluation), anything, "default")


def test_settings_that_a_claim_leaves_free_may_differ(tmp_path: Path) -> None:
    check = "{kind: difference, arm: drop_one, against: default, metric: best/test_accuracy}"
    text = f"claims: {{X1: {{words: x, study: ablate-mnist, ignore: [schedule.epochs], checks: [{check}]}}}}"
    claims = claims_of(tmp_path, text)
    (contrast,) = claims.contrasts("X1")
    config = open_study("ablate-mnist").arm("default", {})
    record = RunRecord("", "", "FINISHED", logged(config, **{"schedule.epochs": "7"}), {}, {})
    assert is_like(record, claims.protocols[contrast.protocol], "default")
    assert not is_like(record, claims.protocols["ablate-mnist"], "default")


def test_a_claim_may_name_a_study_file_beside_it(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "name: mine\nconfig: {schedule: {epochs: 2}}\n"
        "arms: {a: {}, b: {model: {dropout: 0.5}}, c: {execution: {precision: bf16}}}\n"
    )
    check = "{kind: difference, arm: b, against: a}"
    text = "protocols: {p: {arms: {a: mine.yaml/a, b: mine.yaml/b}}}\nclaims:\n"
    text += f"  X1: {{words: x, study: mine.yaml, checks: [{check}]}}\n"
    text += f"  Y1: {{words: y, protocol: p, checks: [{check}]}}"
    claims = claims_of(tmp_path, text)
    assert set(read_claims(tmp_path / "claims.yaml").files) == {"claims.yaml", "mine.yaml"}
    record = RunRecord("", "", "FINISHED", logged(open_study(str(tmp_path / "mine.yaml")).arm("b", {})), {}, {})
    for id_ in ("X1", "Y1"):
        (contrast,) = claims.contrasts(id_)
        protocol = claims.protocols[contrast.protocol]
        assert is_like(record, protocol, "b") and not is_like(record, protocol, "a")


def test_arms_of_a_protocol_may_be_those_of_other_studies() -> None:
    protocol = read_claims().protocols["resolution-imagenette"]
    for arm, size in (("small", 32), ("large", 128)):
        record = RunRecord("", "", "", logged(open_study(f"train-imagenette-{size}").config({})), {}, {})
        assert [each for each in protocol.arms if is_like(record, protocol, each)] == [arm]


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
        luck = random.normal(0, 0.02, seeds)  # of a seed, which all arms share
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


def test_runs_are_compared_only_where_they_differ_in_nothing_else(tmp_path: Path) -> None:
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
    # What is no finite number, or isn't there, is no evidence.
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
    # Of a run that was repeated the last one counts; runs that don't pair are compared all the same.
    assert "3 and 3 runs; 3 runs of a repeated since" in evidence(
        claims, [*study({"a": low}, optimiser__lr=0.1), *fitting]
    )
    failed = [replace(each, status="FAILED", metrics={}) for each in fitting[:2]]
    assert "2 runs of a failed" in evidence(claims, [*fitting, *failed])
    percentages = [run(80.0, 7, model__variant=arm, optimiser__lr=0.1) for arm in "ab"]
    assert "1 run of a left out: above 1, but accuracies are fractions" in evidence(claims, [*fitting, *percentages])
    # Parameters without a dot count in runs from elsewhere; in ours `mlflow run` logs its options so.
    other = study({"a": high}, lr=0.1) + study({"b": low}, lr=0.2)
    assert "differ in lr; name it under `ignore`" in judged(claims, other).findings[0].lacking
    ours = [replace(each, tags={"effv2.config_hash": "0"}) for each in other]
    assert verdict(claims, ours) == Verdict.SUPPORTED
    named = replace_protocol(claims, ignore=["lr"])
    assert verdict(named, other) == Verdict.SUPPORTED


def replace_protocol(claims: Claims, **changes: Any) -> Claims:
    return replace(claims, protocols={k: each.model_copy(update=changes) for k, each in claims.protocols.items()})


def test_a_plan_counts_where_it_was_made_before_the_runs(tmp_path: Path) -> None:
    claims, values = (
        two_arms(tmp_path, ABOVE),
        {"a": [0.52, 0.53, 0.525, 0.52, 0.6], "b": [0.50, 0.51, 0.505, 0.5, 0.5]},
    )
    plan = replace(run(0), run_id="p", params={"study.max_seeds": "4", "study.looks": "once"}, metrics={}, started=5)
    runs = [replace(each, tags={"mlflow.parentRunId": "p"}, started=5) for each in study(values)]
    found = evidence(claims, [plan, *runs])
    assert "4 and 4 runs, one look, at 4 seeds" in found and "2 runs beyond 4 seeds of an arm left out" in found
    early = judged(claims, [plan, *(each for each in runs if each.params["random.seed"] in "012")])
    assert early.verdict == Verdict.UNDECIDED and "3 of 4 planned seeds" in early.findings[0].lacking
    assert "one look" not in evidence(claims, [replace(plan, started=6), *runs])  # made when runs were there


def test_a_claim_needs_all_of_its_checks_and_pays_for_its_family_alone(tmp_path: Path) -> None:
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


def test_times_and_images_are_compared_where_they_can_be(tmp_path: Path) -> None:
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
    # One run on a second split takes nothing from five on the first.
    more = [run(0.5, 9, model__variant=arm, data__split_seed=1) for arm in "ab"]
    assert evidence(claims, [*one, *more]).startswith(f"{on_one.findings[0].evidence}; only on one split, 2 runs")
    same = {"test": Images("mnist", "digest", 10_000)}  # a test part of its own: the splits share nothing but that
    apart_from_it = judged(claims, [replace(each, images=same) for each in several]).findings[0]
    assert apart_from_it.p == pytest.approx(Estimate(values).p(0))
    apart = study({"a": values}, data__split_seed=1) + study({"b": [0.0, 0.001] * 2}, data__split_seed=2)
    judgement = judged(claims, apart)
    assert judgement.verdict == Verdict.NOT_TESTED and "no split" in judgement.findings[0].lacking
    corrected = Estimate(values, overlap=0.25)  # Nadeau & Bengio's: 1/n and the ratio of test to training images
    assert corrected.error == pytest.approx(np.std(values, ddof=1) * np.sqrt(1 / 5 + 0.25))
    assert on_several.findings[0].p == pytest.approx(corrected.p(0))


def test_how_many_seeds_decide_and_where_one_more_is_expected() -> None:
    about, few, many = Estimate((0.02, 0.01, -0.005, 0.015)).seeds_to_decide()
    assert few and about and few < about < (many or 99)
    # On overlapping splits the error of a mean has an end, and below it nothing ever decides.
    assert Estimate((0.031, -0.019, 0.011, -0.009, 0.016), overlap=0.25).seeds_to_decide()[0] is None
    random = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        drawn = random.normal(0, 1, 6).tolist()
        low, high = Estimate(drawn[:5]).prediction()
        inside += low <= drawn[5] <= high
    assert inside / 1000 == pytest.approx(0.95, abs=0.02)


def test_what_is_told_of_curves() -> None:
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


def tabulated(arms: int, values: Sequence[float], **params: Any) -> tuple[StudyResults, dict[str, str]]:
    """Return the results of a study, each arm a point above the one before, and what its tables say of the second."""
    runs = []
    for number in range(arms):
        for seed, value in enumerate(values):
            epochs = {"best/test_accuracy": value + number / 100 + 0.1, "selected/test_accuracy": value + number / 100}
            one = run(0, seed, tags={"effv2.arm": f"arm{number}"}, **params)
            runs.append(replace(one, metrics=epochs, history={"time/epoch_seconds": {1: 30.0, 2: 60.0}}))
    parent = replace(run(0), params={"study.kind": "ablate", "study.baseline": "arm0"}, metrics={})
    found = results(runs, parent)
    assert ("epochs took", f"{1.5 * len(runs):.1f} minutes, finished runs: {len(runs)}") in found.environment
    short = dict(zip(found.table[0], found.table[2], strict=True))
    return found, {line[0]: line[2] for line in found.details} | short


@pytest.mark.parametrize("arms", [2, 9])
@pytest.mark.parametrize("rules", ["published", "standard"])
def test_tables_hold_intervals_and_differences_however_many_arms_there_are(arms: int, rules: str) -> None:
    values = [0.5, 0.52, 0.55]
    found, told = tabulated(arms, values, data__sampling=rules)
    assert len(found.table) == arms + 1
    reach = stats.t(2).ppf(0.975) * np.std(values, ddof=1) * np.sqrt(1 + 1 / 3)
    for words, more in (("best", 0.11), ("selected", 0.01)):
        low, high = (100 * (np.mean(values) + more + sign * reach) for sign in (-1, 1))
        assert told[f"range of a single re-run (95 %), test accuracy, {words} epoch"] == f"{low:.2f} % to {high:.2f} %"
    assert f"test accuracy, {'best' if rules == 'published' else 'selected'} epoch" in found.table[0]
    assert told["minus arm0 [interval]"].startswith("+1.00 [")
    assert len(found.answers) == arms and found.answers[-1].startswith("More seeds don't invalidate")
    assert "arm1 against arm0: undecided, +1.00 points" in found.answers[0]


def test_the_answer_goes_by_the_accuracy_that_decides() -> None:
    best, selected = {"a": 0.95, "b": 0.9}, {"a": 0.8, "b": 0.9}
    for rules, words in (("published", "is worse than a by 5.00 points"), ("standard", "beats a by 10.00 points")):
        runs = [
            replace(run(0, seed, data__sampling=rules, tags={"effv2.arm": arm}), metrics={**metrics})
            for arm in "ab"
            for seed in range(3)
            for noise in [seed / 1000]
            for metrics in [{"best/test_accuracy": best[arm] + noise, "selected/test_accuracy": selected[arm] + noise}]
        ]
        parent = replace(run(0), params={"study.kind": "ablate", "study.baseline": "a"}, metrics={})
        assert f"b {words} [" in results(runs, parent).answers[0]


def test_single_runs_have_a_line_each() -> None:
    alone = [replace(run(0.5, seed, model__variant="a"), run_id=f"{seed}{'0' * 31}") for seed in range(3)]
    found = results(alone)
    assert [line[:2] for line in found.table[1:]] == [(f"a run, run {seed}0000000", "1") for seed in range(3)]
    assert not found.answers and "test accuracy, selected epoch" in found.table[0]
    timed = [replace(each, metrics=each.metrics | {"time/total_train_seconds": 9.0}) for each in alone]
    many = [replace(timed[0], run_id=f"{number:08d}") for number in range(21)]
    assert results(timed).figures and not results(many).figures and len(results(many).table) == 22


def test_a_study_says_what_it_lacks_and_why() -> None:
    error = {"effv2.error": "Diverged: no number"}
    done, gone, open_, diverged = (
        replace(run(0.5, 0, "selected/val_accuracy", error), name=f"trial {number}", status=status)
        for number, status in enumerate(["FINISHED", "KILLED", "RUNNING", "FAILED"])
    )
    runs = [done, gone, open_, diverged]
    tags = as_tags(PLANNED, [each.name for each in runs]) | {COMMAND: "effv2 search", LOOKS: "x,y"}

    def told(kind: str, runs: Sequence[RunRecord]) -> StudyResults:
        return results(runs, replace(run(0), params={"study.kind": kind}, tags=tags))

    assert told("ablate", runs).missing == (
        "it is in progress, or its process died; 1 run failed: trial 3 (Diverged: no number); 2 runs planned but "
        "not finished: trial 1, trial 2. The command below resumes it."
    )
    finished = [replace(each, name=f"trial {number}") for number, each in enumerate([done, done, done])]
    assert told("ablate", [*finished, diverged]).missing == "1 run failed: trial 3 (Diverged: no number)."
    search = told("search", [*finished, diverged])
    assert not search.missing and "2, each the best one at its time" in search.notes[-1]
    full = replace(diverged, tags={"effv2.error": "RunError: The disk is full."})
    assert told("search", [*finished, full]).missing.endswith(
        "(RunError: The disk is full.). The command below resumes it."
    )
    assert told("search", [replace(diverged, metrics={})]).notes == ["Trials: 1 unknown."]


@given(st.lists(st.text(min_size=1, max_size=300), max_size=60))
def test_lists_of_any_length_are_kept_in_tags(names: list[str]) -> None:
    tags = as_tags(PLANNED, names)
    assert names_in({**as_tags(PLANNED, ["x" * 300] * 99), **tags}, PLANNED) == names
    assert all(len(text) <= LONGEST_TAG for text in tags.values())


def test_arms_are_held_against_the_baseline_under_their_own_schedule() -> None:
    means = {"default": 0.1, "dropout": 0.12, "default_plateau": 0.3, "dropout_plateau": 0.34}
    runs = [
        replace(
            run(0, seed, tags={"effv2.arm": arm}, schedule__name="plateau" if "plateau" in arm else "none"),
            metrics={"selected/test_accuracy": mean + seed / 1000},
        )
        for arm, mean in means.items()
        for seed in range(3)
    ]
    parent = replace(run(0), params={"study.kind": "hparam-check", "study.baseline": "default"}, metrics={})
    answers = results(runs, parent).answers
    assert [each.partition(" points")[0] for each in answers] == [
        "dropout beats default by 2.00",
        "default_plateau beats default by 20.00",
        "dropout_plateau beats default_plateau by 4.00",
    ]


def test_intervals_end_where_values_do_and_equal_values_have_none(tmp_path: Path) -> None:
    _, told = tabulated(2, [0.0, 0.3, 0.8])
    assert told["range of a single re-run (95 %), test accuracy, selected epoch"] == "0.00 % to 100.00 %"
    _, told = tabulated(2, [0.5, 0.5, 0.5])
    assert not any(name.startswith("a single re-run") for name in told)
    claims = two_arms(tmp_path, f"{{kind: level, metric: {METRIC}, arm: a, about: 0.2, within: 0.1}}")
    assert "[0.00 % to 100.00 %], 3 runs" in evidence(claims, study({"a": [0.0, 0.3, 0.8]}))
    gap = Interval(-0.08, -0.04)  # of a metric that is called an accuracy and is none
    assert gap.within(quantity("accuracy_gap").possible) == gap


@pytest.mark.parametrize("accuracy", [0.51, 51.0])  # the mean of six times 0.51 is a little less than that
def test_equal_accuracies_and_percentages_have_tables_and_figures(accuracy: float) -> None:
    metrics = dict.fromkeys(["best/test_accuracy", "selected/test_accuracy", "time/total_train_seconds"], accuracy)
    images = {"test": Images("folder", "", 200, ("cat", "dog"))}
    history = {"test/accuracy": {1: accuracy}, "time/train_seconds": {1: 1.0}}
    one = replace(run(0, tags={"effv2.arm": "a"}), metrics=metrics, images=images, history=history)
    runs = [replace(one, params={"random.seed": str(seed)}) for seed in range(6)]
    assert "accuracy against time" in results(runs, replace(run(0), metrics={})).figures


def test_published_networks_have_a_line_for_unseen_images_and_one_for_all() -> None:
    measured = {"unseen/top1_accuracy": 0.5, "unseen/images": 500.0, "seen/images": 3791.0}
    network = replace(run(0), metrics=measured | {"eval/top1_accuracy": 0.6, "eval/images": 3925.0})
    parent = replace(run(0), params={"study.kind": "evaluate-pretrained"}, metrics={})
    _, *rows = results([network], parent).table
    assert [(row[1][:7], row[3]) for row in rows] == [
        ("50.00 %", "500 images that it was not trained on"),
        ("60.00 %", "3,925 test images, 3,791 of which it was trained on"),
    ]


def test_the_nearest_runs_are_those_that_know_the_setting(tmp_path: Path) -> None:
    protocol = "{runs: {data.dataset: birds, data.classes: 25}, arms: {a: {model.variant: a}}}"
    check = f"{{kind: level, metric: {METRIC}, arm: a, above: 0.5}}"
    claims = claims_of(tmp_path, f"claims: {{X1: {{words: so, protocol: {protocol}, checks: [{check}]}}}}")
    some = run(0.6, model__variant="a", data__dataset="birds")
    ten = replace(some, images={"test": Images("birds", "1", 200, tuple("abcdefghij"))})
    judgement = judged(claims, [ten, some])
    assert judgement.findings[0].lacking == "no run is like a: in the nearest ones data.classes is 10, not 25"


def test_a_misspelt_metric_is_told_from_one_that_is_missing(tmp_path: Path) -> None:
    runs = [run(0.6, metric="my/score", model__variant="a")]
    for metric, said in {
        "my/scroe": "no run has my/scroe; did you mean 'my/score'?",
        "level/tset_accuracy": "no run has level/tset_accuracy; did you mean 'level/test_accuracy'?",
        "level/test_accuracy": "the runs of a are without a usable test accuracy, mean of the last ten epochs",
    }.items():
        claims = two_arms(tmp_path, f"{{kind: level, metric: {metric}, arm: a, above: 0.5}}")
        assert judge(claims, runs, nothing)[0].findings[0].lacking == said


WRONG = {
    "claims: {X1: {words: x, study: ablate-mnist, checks: [{kind: difference, arm: default, against: default}]}}":
        "compared with itself",
    "claims: {X1: {words: x, study: ablate-mnist, checks: [{kind: level, arm: default, above: 5}]}}": "a fraction",
    "claims: {X 1: {words: x, study: ablate-mnist, checks: [CHECK]}}": "should match pattern",
    "claims: {X1: {words: x, protocol: nowhere, checks: [CHECK]}}": "nowhere: no such protocol",
    "claims: {X1: {words: x, study: ablate-mnist, checks: [CHECK]}}": "has no arm a",
    "claims: {A1: {words: x, study: ablate-mnist, checks: [CHECK]}}": "there is one of that name",
    "claims:\n  X1: {words: x, study: ablate-mnist, checks: [{kind: sorcery}]}": "line 2",
    "claims:\n  X1:\n    wrods: x": "line 3",
    "claims: {X1: {words: x, study: ablate-mnist, checks: [{kind: level, arm: default}]}}": "a level needs a region",
    "claims: {X1: {words: x, study: ablate-mnist, checks: [{kind: level, arm: default, about: 1}]}}": "together",
    "claims: {X1: {words: x, study: ablate-mnist, checks: [{kind: speed, arm: default, against: drop_one, "
    "above: 0}]}}": "a ratio is above 0",
    "claims: {X1: {words: x, protocol: pretrained-imagenette, checks: [{kind: difference, arm: resnet50, "
    "metric: eval/top1_accuracy, against: efficientnet_b0, above: 0.1}]}}": "which network is better",
    "protocols: {p: {arms: {a: {}}, nearest: nowhere}}\nclaims: {X1: {words: x, protocol: p, checks: [CHECK]}}":
        "nowhere: no file and no study of that name",
    "claims: {X1: {words: x, protocol: p, ignore: [data.sizes], checks: [CHECK]}}": "ignore only applies to a study",
    "claims: {X1: {words: x, checks: [CHECK]}}": "give either a study or a protocol",
    "claims: {X1: {words: x, study: ../mine.yaml, checks: [CHECK]}}": "should match pattern",
    "claims: {X1: {words: x, study: ablate-mnits, checks: [CHECK]}}": "the nearest is 'ablate-mnist'",
    "claims: {X1: {words: x, study: ablate-mnist, ignore: [data.sizes], checks: [CHECK]}}": "ignore data.sizes: is not",
}  # fmt: skip


@pytest.mark.parametrize("text", WRONG)
def test_wrong_claims_name_their_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError) as caught:
        claims_of(tmp_path, text.replace("CHECK", ABOVE))
    assert "claims.yaml" in str(caught.value) and WRONG[text] in str(caught.value), caught.value


def test_a_setting_that_an_arm_leaves_out_has_its_default() -> None:
    protocol = Protocol.model_validate({"arms": {"default": {}, "deep": {"model.depth_multiplier": 2}}})
    params = {name: str(value) for name, value in TrainConfig().flat().items()}
    plain = RunRecord("", "", "FINISHED", params, {}, {})
    deep = RunRecord("", "", "FINISHED", params | {"model.depth_multiplier": "2.0"}, {}, {})
    assert [[is_like(each, protocol, arm) for arm in protocol.arms] for each in (plain, deep)] == [
        [True, False],
        [False, True],
    ]


@pytest.mark.parametrize("count", [2, 30])
def test_names_of_80_letters_leave_room_in_figures(count: int) -> None:
    names = [f"{'species of a bird ' * 5}"[:77] + f"{number:03d}" for number in range(count)]
    drawn = [
        bars({name: [1.0, 2.0] for name in names}, "title", "unit"),
        forest(dict.fromkeys(names, (0.1, 0.0, 0.2, True)), "title", "unit"),
        _confusion_figure(np.ones((count, count)), names),
    ]
    for figure in drawn:
        figure.draw_without_rendering()
        (axes,) = figure.axes
        assert axes.get_position().width > 0.35 and axes.get_position().height > 0.35
        shown = [label.get_text() for label in axes.get_yticklabels()]
        assert len({*shown}) == count and shown[1].startswith("species of") and shown[1].endswith("001")
