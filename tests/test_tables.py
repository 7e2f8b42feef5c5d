"""Tables, answers and figures of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from effv2.architecture import VARIANTS
from effv2.core.figures import bars, forest
from effv2.evidence.claims import read_claims
from effv2.evidence.quantities import quantity
from effv2.evidence.results import results_of
from effv2.evidence.statistics import Interval
from effv2.evidence.study import StudyResults
from effv2.run.records import _confusion_figure
from effv2.tracking.read import Images, RunRecord
from effv2.tracking.tags import COMMAND, LONGEST_TAG, LOOKS, PLANNED, as_tags, names_in
from tests.simulated import METRIC, evidence, nothing, results, run, study, two_arms


def tabulated(arms: int, values: Sequence[float], **params: Any) -> tuple[StudyResults, dict[str, str]]:
    """Return the results of a study, and its tables' cells on the second arm. Each arm is a point above the last."""
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
    assert len(found.answers) == arms and found.answers[-1].startswith("The test stays valid if you add seeds")
    assert "arm1 against arm0: undecided, +1.00 points" in found.answers[0]


def test_more_seeds_are_no_way_out_once_all_that_count_are_there() -> None:
    runs = [run(0.5 + seed / 100, seed, tags={"effv2.arm": arm}) for arm in "ab" for seed in range(3)]
    parent = replace(run(0), params={"study.kind": "ablate", "study.baseline": "a", "study.max_seeds": "3"}, metrics={})
    assert ["it remains undecided" in each for each in results(runs, parent).answers] == [True]


def test_arms_on_other_images_are_compared() -> None:
    values = {"small": [0.5, 0.51, 0.49], "large": [0.7, 0.71, 0.69]}
    runs = [
        run(value, seed, data__split_seed=0, tags={"effv2.arm": arm, "effv2.data_digest": arm})
        for arm, of_arm in values.items()
        for seed, value in enumerate(of_arm)
    ]
    parent = replace(run(0), params={"study.kind": "ablate", "study.baseline": "small"}, metrics={})
    found = results(runs, parent)
    assert found.answers[0].startswith("large beats small by 20.00 points")
    assert any("share one split" in each for each in found.warnings)


def test_no_other_arm_replaces_a_baseline_without_runs() -> None:
    runs = [run(0.5 + (arm == "b") / 5 + seed / 99, seed, tags={"effv2.arm": arm}) for arm in "ab" for seed in range(3)]
    parent = replace(run(0), params={"study.kind": "ablate", "study.baseline": "failed"}, metrics={})
    assert results(runs, parent).answers == ["a and b against failed: nothing to compare, because a figure is missing."]


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
        "not finished: trial 1 / trial 2. The command below resumes it."
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


def of_arms(arms: Mapping[str, dict[str, Any]], **about: Any) -> tuple[list[RunRecord], RunRecord]:
    """Return a run of each arm, which has the given settings, and the run of their study."""
    parent = replace(run(0), name="ours", params={"study.kind": "ablate", "study.baseline": "default"}, metrics={})
    of_it = {"effv2.arm": "", "mlflow.parentRunId": parent.run_id}
    made = (run(0.5, tags=of_it | {"effv2.arm": arm}, **params) for arm, params in arms.items())
    return [replace(each, **about) for each in made], parent


def test_a_study_says_what_its_arms_are() -> None:
    shared = {"model__table": "", "model__variant": "default", "model__dropout": 0.2, "data__test_fraction": 0.2}
    stages = VARIANTS["default"].stages[:5]
    own = str(replace(VARIANTS["default"], stages=(replace(stages[0], in_channels=16), *stages[1:])))
    arms = {
        "default": shared,
        "drop_one": shared | {"model__variant": "drop_one", "study__name": "a", "seeds": "0"},
        "mbconv_only": shared | {"model__variant": "mbconv_only"},
        "dropout_0.6": shared | {"model__dropout": 0.6, "model__variant": "half_layers"},
        "mine": shared | {"model__table": own, "model__variant": "mine"},
        "elsewhere": shared | {"model__variant": "theirs"},
    }
    assert results(*of_arms(arms)).description == (
        "Unlike default, drop_one has no stages 2 and 5, and in the others channels 48 64 128 256 instead of 24 64 "
        "128 256; mbconv_only has blocks (F: Fused-MBConv, M: MBConv) M M M M M M instead of F F F M M M; dropout_0.6 "
        "has layers 1 2 2 3 4 7 instead of 2 4 4 6 9 15, model.dropout 0.6 instead of 0.2; mine has no stage 6, "
        "stem channels 16 instead of 24; elsewhere has model.variant theirs instead of default."
    )


BATCH_NORM = {"evaluation.batch_norm_images": "0"}


def test_what_makes_a_verdict_void_stands_before_it() -> None:
    tested = {"test": Images("some", "", 1000, tuple("ab"))}
    found = results(*of_arms({"default": {}, "other": {}}, images=tested))
    assert found.answers[0].startswith("All networks are near chance level, 50.00 % for 2 classes")
    assert found.short.startswith("All networks are near chance level") and "other against default" in found.short
    assert not any("chance" in each for each in found.warnings)
    (one, other), parent = of_arms({"default": {}, "other": {}}, images=tested)
    trained = {"train/accuracy": 0.9}
    lag = [replace(each, metrics=each.metrics | trained, params=each.params | BATCH_NORM) for each in (one, other)]
    assert (
        "In training they reach 90.00 %. If batch norm lags behind, set evaluation." in results(lag, parent).answers[0]
    )
    better = replace(other, metrics={**other.metrics, "selected/test_accuracy": 0.9})
    assert results([one, better], parent).answers[0].startswith("Near chance level, 50.00 % for 2 classes: default.")
    validation = {"validation": Images("some", "", 100, tuple("ab"))}
    trial = replace(one, metrics={"selected/val_accuracy": 0.5}, images=validation)
    searched = results([trial], replace(parent, params={"study.kind": "search"})).answers
    assert searched[0].startswith("All networks are near chance level") and "No trial was chosen" in searched[1]


def test_runs_from_before_a_study_widen_its_intervals_which_is_said() -> None:
    runs, parent = of_arms({"default": {}, "other": {}}, started=60_000)
    parent = replace(parent, params=parent.params | {"study.max_seeds": "3", "study.looks": "once"}, started=50_000)
    assert not any("had begun before" in each for each in results(runs, parent).warnings)
    assert (
        "2 runs had begun before this study named its largest number of seeds, so its intervals are wider: those of "
        "every look up to 30 seeds. `fresh` repeats these runs."
    ) in results(runs, replace(parent, started=70_000)).warnings


def test_titles_say_when_studies_of_one_name_began() -> None:
    runs: list[RunRecord] = []
    for began in (0, 60_000):
        of_it, parent = of_arms({"default": {}, "other": {}})
        runs += [replace(parent, started=began), *of_it]
    titles = ["ours (begun 1970-01-01 00:00 UTC)", "ours (begun 1970-01-01 00:01 UTC)"]
    assert [each.title for each in results_of(runs, read_claims(), nothing)] == titles


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
    gap = Interval(-0.08, -0.04)  # a metric with accuracy in its name that is no accuracy
    assert gap.within(quantity("accuracy_gap").possible) == gap


@pytest.mark.parametrize("accuracy", [0.51, 51.0])  # rounding makes the mean of six times 0.51 a little smaller
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
