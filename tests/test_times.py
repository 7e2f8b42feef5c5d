"""Time to an accuracy: in tables, figures and claims, also if some runs never reach it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from effv2.config.studies import open_study, read_study
from effv2.core.errors import InputError
from effv2.evidence.claims import Claims, read_claims
from effv2.evidence.judge import Verdict, judge
from effv2.evidence.quantities import quantity
from effv2.tracking.read import RunRecord
from effv2.tracking.tags import SHOWN, as_tags
from tests.simulated import logged, nothing, results, run, two_arms

TO_HALF = "seconds/to_test_accuracy_0.5"
FASTER = f"{{kind: speed, metric: {TO_HALF}, arm: b, against: a, above: 1.4}}"
TOGETHER = """{kind: difference, metric: selected/test_accuracy, arm: a, against: b, about: 0, within: 0.01},
    {kind: speed, metric: time/total_train_seconds, arm: b, against: a, above: 1.4}"""


def trained(arm: str, seed: int, seconds: float, accuracies: Sequence[float], machine: str = "one") -> RunRecord:
    """Return a run with these accuracies, one per epoch, whose epochs take `seconds` each."""
    epochs = range(1, len(accuracies) + 1)
    history = {
        "test/accuracy": dict(zip(epochs, accuracies, strict=True)),
        "time/train_seconds": dict.fromkeys(epochs, seconds),
    }
    metrics = {"selected/test_accuracy": accuracies[-1], "time/total_train_seconds": seconds * len(epochs)}
    tags = {"effv2.arm": arm, "effv2.machine.processor": machine}
    return replace(run(0, seed, tags=tags, model__variant=arm), metrics=metrics, history=history)


def arms(a: float = 1.0, b: float = 2.0, gain: float = 0.0, machines: str = "xx", reached: int = 5) -> list[RunRecord]:
    """Return five runs of each arm: seconds per epoch, the gain of a, and how many runs of b reach one half."""
    return [
        trained(arm, seed, seconds + seed / 50, [0.2, 0.4, low + seed / 2000], machine)
        for arm, seconds, machine, best in (("a", a, machines[0], 0.6 + gain), ("b", b, machines[1], 0.6))
        for seed in range(5)
        for low in [best if arm == "a" or seed < reached else 0.45]
    ]


def test_the_time_to_an_accuracy_is_summed_over_the_epochs_before() -> None:
    record = trained("a", 0, 2.5, [0.2, 0.5, 0.4, 0.6])
    found = {level: quantity(f"seconds/to_test_accuracy_{level}").value(record) for level in ("0.1", ".5", "0.55", "1")}
    assert found == {"0.1": 2.5, ".5": 5.0, "0.55": 10.0, "1": math.inf}
    assert quantity("seconds/to_val_accuracy_0.5").value(record) is None
    gap = replace(record, history=record.history | {"time/train_seconds": {1: 2.5, 2: 2.5, 4: 2.5}})
    assert quantity(TO_HALF).value(gap) is None


@pytest.mark.parametrize("name", ["seconds/to_test_accuracy_90", "seconds/to_accuracy_0.9", "seconds/to_test_accuracy"])
def test_a_level_is_a_fraction_of_a_split(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"write it as seconds/to_test_accuracy_0\.9"):
        two_arms(tmp_path, f"{{kind: speed, metric: {name}, arm: a, against: b}}")
    path = tmp_path / "study.yaml"
    path.write_text(f"name: mine\nshow: [{name}]\n")
    with pytest.raises(InputError, match=r"line 2: show.*write it as seconds/to_test_accuracy_0\.9"):
        read_study(path)


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        (arms(), Verdict.SUPPORTED),
        (arms(b=1.1), Verdict.CONTRADICTED),
        (arms(a=1, b=1.4), Verdict.UNDECIDED),
        (arms(machines="xy"), Verdict.NOT_TESTED),
        (arms(reached=4), Verdict.UNDECIDED),
        (arms(reached=0), Verdict.UNDECIDED),
    ],
)
def test_times_are_compared_where_all_runs_have_them(runs: list[RunRecord], expected: Verdict, tmp_path: Path) -> None:
    (judgement,) = judge(two_arms(tmp_path, FASTER), runs, nothing)
    assert judgement.verdict == expected
    missed = sum(quantity(TO_HALF).value(each) == math.inf for each in runs)
    (finding,) = judgement.findings
    assert not missed or finding.evidence == f"not reached by {missed} of 5 runs of b"
    assert ("processor" in finding.lacking) == (expected is Verdict.NOT_TESTED)


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        (arms(), Verdict.SUPPORTED),
        (arms(gain=-0.03), Verdict.CONTRADICTED),  # as fast, but worse
        (arms(b=1.1), Verdict.CONTRADICTED),  # as good, but not faster
        (arms(gain=0.0099), Verdict.UNDECIDED),
        (arms(machines="xy"), Verdict.UNDECIDED),  # as good, but times of two machines can't be compared
    ],
)
def test_as_accurate_and_faster_takes_both(runs: list[RunRecord], expected: Verdict, tmp_path: Path) -> None:
    (judgement,) = judge(two_arms(tmp_path, TOGETHER), runs, nothing)
    assert judgement.verdict == expected
    if expected is Verdict.SUPPORTED:  # the less certain check decides, without a correction for the other
        assert max(each.corrected or 0 for each in judgement.findings) == max(
            each.p or 0 for each in judgement.findings
        )


def test_claims_on_progressive_learning_are_judged_on_time_and_accuracy() -> None:
    published, study = read_claims(), open_study("progressive-imagenette-128")
    claims = Claims(published.protocols, {id_: published.claims[id_] for id_ in ("E3", "E4")})
    runs = [
        replace(each, params=logged(study.arm(arm, {}), **{"random.seed": str(seed)}))
        for arm, seconds, best in (
            ("full_size", 3.0, 0.6),
            ("progressive", 1.5, 0.602),
            ("constant_regularisation", 1.5, 0.58),
        )
        for seed in range(5)
        for each in [trained(arm, seed, seconds + seed / 50, [best + seed / 2000])]
    ]
    found: Mapping[str, Verdict] = {each.id: each.verdict for each in judge(claims, runs, nothing)}
    assert found == {"E3": Verdict.SUPPORTED, "E4": Verdict.SUPPORTED}


def test_tables_say_how_many_runs_reach_it_and_figures_have_intervals() -> None:
    asked = as_tags(SHOWN, [TO_HALF, "seconds/to_val_accuracy_0.5"])
    parent = replace(run(0), params={"study.kind": "ablate", "study.baseline": "b"}, metrics={}, tags=asked)
    runs = arms(reached=4)
    found = results(runs, parent)
    title, *rows = found.table
    cells = {row[0]: dict(zip(title, row, strict=True)) for row in rows}
    times = [3 * (1 + seed / 50) for seed in range(5)]
    words = "training to 50 % test accuracy, s"
    assert cells["a"][words] == f"{np.mean(times):.1f} ± {np.std(times, ddof=1):.1f}"
    assert cells["b"][words] == "not reached by 1 of 5"
    assert cells["a"]["training to 50 % validation accuracy, s"] == "none"
    assert (words, cells["a"][words], cells["b"][words]) in found.details
    header, *lines = found.files["comparison.csv"]  # type: ignore[misc]
    assert [line[header.index(words)] for line in lines].count(math.inf) == 1
    # Curves over time show the mean and its interval, as long as all runs train.
    (axes,) = found.figures["accuracy against time"].axes
    moments, means = (np.asarray(each) for each in axes.lines[0].get_data())
    edge = np.asarray(axes.collections[0].get_paths()[0].vertices)
    assert (moments[0], moments[-1]) == pytest.approx((1.08, 3.0))
    at_end = [np.interp(3, [1 + s / 50, 2 + s / 25, 3 + 3 * s / 50], [0.2, 0.4, 0.6 + s / 2000]) for s in range(5)]
    assert means[-1] == pytest.approx(np.mean(at_end))
    reach = stats.t(4).ppf(0.975) * stats.sem(at_end)
    assert edge[edge[:, 0] == moments[-1], 1].max() == pytest.approx(means[-1] + reach)
    # Times of several machines aren't drawn side by side.
    mixed = results(arms(machines="xy"), parent)
    assert "accuracy against time" not in mixed.figures
    assert any("from 2 machines" in each for each in mixed.warnings)
