"""Claims: the published ones, the runs that they are about, and wrong files of claims."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from effv2.config.schema import TrainConfig
from effv2.config.studies import open_study
from effv2.core.errors import InputError
from effv2.evidence.claims import published_runs, read_claims
from effv2.evidence.judge import CONSISTENT, INCONSISTENT, NO_FIGURES, Verdict, judge
from effv2.evidence.protocols import FREE, Protocol, has, is_like
from effv2.evidence.quantities import TEST, quantity
from effv2.tracking.read import Images, RunRecord
from tests.simulated import ABOVE, claims_of, logged, nothing


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
    # A single run decides nothing. Without any run, nothing was tested.
    for each in found.values():
        nothing_known = each.words == NO_FIGURES
        assert each.verdict == (Verdict.NOT_TESTED if nothing_known else Verdict.UNDECIDED), each.id
    assert all("not tested" in finding.verdict.value for each in found.values() for finding in each.findings)
    # The post's best arm on MNIST is fused_only: 1,958 against 1,943 of 2,000 is no evidence.
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


@pytest.mark.parametrize("name", ["ablate-mnist", "hparam-imagenette-32", "train-birds-128"])
def test_a_claim_on_a_study_matches_only_runs_of_its_arms(name: str) -> None:
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
    """The published runs logged no stopping.best_since. They did what its default says."""
    config = open_study("ablate-mnist").arm("default", {})
    params = {name: value for name, value in logged(config).items() if name != "stopping.best_since"}
    record = RunRecord("", "", "FINISHED", params, {}, {"effv2.config_hash": "0"})
    protocol = read_claims().protocols["ablate-mnist"]
    assert is_like(record, protocol, "default")
    assert not is_like(replace(record, params=params | {"stopping.best_since": "min_epochs"}), protocol, "default")
    # Runs of other programs and evaluations never had these settings, so they don't match.
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


def test_a_claim_may_name_a_study_file_in_its_folder(tmp_path: Path) -> None:
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


WRONG = {
    "claims: {X1: {words: x, study: ablate-mnist, checks: [{kind: difference, arm: default, against: default}]}}":
        "compared with itself",
    "claims: {X1: {words: x, study: ablate-mnist, checks: [{kind: level, arm: default, above: 5}]}}": "a fraction",
    "claims: {X 1: {words: x, study: ablate-mnist, checks: [CHECK]}}": "must match the pattern",
    "claims: {X1: {words: x, protocol: nowhere, checks: [CHECK]}}": "nowhere: no such protocol",
    "claims: {X1: {words: x, study: ablate-mnist, checks: [CHECK]}}": "has no arm a",
    "claims: {A1: {words: x, study: ablate-mnist, checks: [CHECK]}}": "there is one of that name",
    "protocols: {D1: {arms: {a: {}}}}\nclaims: {D1: {words: x, protocol: {arms: {a: {}}}, checks: [CHECK]}}":
        "claims.D1.protocol: there is one of that name",
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
    "claims: {X1: {words: x, study: ../mine.yaml, checks: [CHECK]}}": "must match the pattern",
    "claims: {X1: {words: x, study: ablate-mnits, checks: [CHECK]}}": "the nearest is 'ablate-mnist'",
    "claims: {X1: {words: x, study: ablate-mnist, ignore: [data.sizes], checks: [CHECK]}}": "ignore data.sizes: is not",
}  # fmt: skip


@pytest.mark.parametrize("text", WRONG)
def test_wrong_claims_name_their_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError) as caught:
        claims_of(tmp_path, text.replace("CHECK", ABOVE))
    assert "claims.yaml" in str(caught.value) and WRONG[text] in str(caught.value), caught.value


def test_a_parameter_of_another_program_that_an_arm_leaves_out_is_absent() -> None:
    protocol = Protocol.model_validate({"arms": {"plain": {}, "mine": {"my.method": "mine"}}})
    plain, mine = (RunRecord("", "", "FINISHED", params, {}, {}) for params in ({"lr": "1"}, {"my.method": "mine"}))
    assert [is_like(plain, protocol, arm) for arm in protocol.arms] == [True, False]
    assert [is_like(mine, protocol, arm) for arm in protocol.arms] == [False, True]


def test_a_number_that_yaml_reads_as_text_is_a_number() -> None:
    config = TrainConfig.model_validate({"optimiser": {"lr": 1e-3}})
    record = RunRecord("", "", "FINISHED", logged(config), {}, {})
    assert [has(record, "optimiser.lr", value) for value in ("1e-3", 0.001, "1e-4")] == [True, True, False]


def test_a_setting_that_an_arm_leaves_out_has_its_default() -> None:
    protocol = Protocol.model_validate({"arms": {"default": {}, "deep": {"model.depth_multiplier": 2}}})
    params = {name: str(value) for name, value in TrainConfig().flat().items()}
    plain = RunRecord("", "", "FINISHED", params, {}, {})
    deep = RunRecord("", "", "FINISHED", params | {"model.depth_multiplier": "2.0"}, {}, {})
    assert [[is_like(each, protocol, arm) for arm in protocol.arms] for each in (plain, deep)] == [
        [True, False],
        [False, True],
    ]
