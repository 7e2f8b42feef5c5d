"""Rankings of published networks: their statistics, their scores, and the images that they use."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from effv2.core.calibration import calibration_error
from effv2.evidence.results import networks_results
from effv2.evidence.statistics import holm, mcnemar
from effv2.pretrained.config import ImagesConfig
from effv2.pretrained.evaluation import scores
from effv2.pretrained.images import (
    SEEN,
    TEST,
    UNKNOWN,
    UNSEEN,
    EvaluationImages,
    choose_images,
    origin,
)
from effv2.tracking.read import RunRecord, reached_accuracy
from effv2.tracking.studies import NO_STUDY, TrackedStudy


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_mcnemar_is_the_exact_binomial_test(pairs: list[tuple[bool, bool]]) -> None:
    first, second = (np.array(side) for side in zip(*pairs, strict=True))
    only_first, only_second, p = mcnemar(first, second)
    b, c = sum(x and not y for x, y in pairs), sum(y and not x for x, y in pairs)
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c)
    assert (only_first, only_second) == (b, c)
    assert p == pytest.approx(min(1, 2 * tail))
    assert mcnemar(second, first)[2] == pytest.approx(p)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_the_same_as_its_steps(p_values: list[float]) -> None:
    corrected = [p for p, _ in holm(p_values)]
    for level in (0.01, 0.05, 0.2):
        rejected: set[int] = set()
        for step, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
            if p_values[index] * (len(p_values) - step) >= level:
                break
            rejected.add(index)
        assert {i for i, p in enumerate(corrected) if p < level} == rejected


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60))
def test_calibration_error_is_the_weighted_gap_of_each_bin(rows: list[tuple[float, bool]]) -> None:
    gap = 0.0
    for index in range(15):
        low, high = np.linspace(0, 1, 16)[index : index + 2]
        members = [(p, hit) for p, hit in rows if low < p <= high or (index == 0 and p == 0)]
        gap += abs(sum(p for p, _ in members) - sum(hit for _, hit in members)) / len(rows)
    confidence, right = (np.array(side, dtype=float) for side in zip(*rows, strict=True))
    assert calibration_error(confidence, right) == pytest.approx(gap, abs=1e-12)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1e-9, 1.0]))
def test_right_over_all_classes_implies_right_among_few_and_in_the_top_five(seed: int, spread: float) -> None:
    """This holds for an untrained network too, whose logits are so close that probabilities tie."""
    generator = np.random.default_rng(seed)
    logits = torch.from_numpy(generator.normal(0, spread, (40, 12)).astype(np.float32))
    present = np.sort(generator.choice(12, 7, replace=False))
    found = scores(logits, generator.choice(present, 40), present)
    assert found["top1_accuracy"] <= min(found["top1_present"], found["top5_accuracy"])


def test_scores_are_those_of_a_plain_loop() -> None:
    generator = np.random.default_rng(0)
    logits, present = torch.from_numpy(generator.normal(0, 2, (60, 12)).astype(np.float32)), np.array([1, 4, 5, 9])
    logits[0] = 0  # all outputs tie: the first one is predicted
    true = np.array([5, *generator.choice(present, 59)])
    counts = {"top1_accuracy": 0, "top1_present": 0, "top5_accuracy": 0}
    losses, confidences, hits = [], [], []
    for row, target in zip(logits.double().tolist(), true.tolist(), strict=True):
        order = sorted(range(12), key=lambda output: -row[output])
        hits.append(order[0] == target)
        counts["top1_accuracy"] += order[0] == target
        counts["top5_accuracy"] += target in order[:5]
        counts["top1_present"] += next(output for output in order if output in present) == target
        probabilities = [math.exp(value) / sum(map(math.exp, row)) for value in row]
        losses.append(-math.log(probabilities[target]))
        confidences.append(probabilities[order[0]])
    found = scores(logits, true, present)
    assert found.pop("images") == 60
    assert found.pop("loss") == pytest.approx(sum(losses) / 60, rel=1e-5)
    assert found.pop("ece") == pytest.approx(calibration_error(np.array(confidences), np.array(hits)), abs=1e-6)
    assert found == pytest.approx({name: count / 60 for name, count in counts.items()})


def ranking(rights: dict[str, list[bool]], where: str = UNSEEN) -> str:
    """Return the sentences on networks that classified these images correctly."""
    params = {"evaluation.ranked_on": "eval", "evaluation.ranked_origin": where}
    runs = [RunRecord(name, name, "FINISHED", params, {}, {}) for name in rights]
    found = networks_results(
        TrackedStudy(NO_STUDY, runs), lambda run: dict(zip(map(str, range(99)), rights[run.name], strict=False))
    )
    assert sorted(found.details[0][1:]) == sorted(rights)
    return found.short


def test_a_difference_is_claimed_only_where_it_is_real() -> None:
    best, good = [True] * 30 + [False] * 2, [True] * 29 + [False] * 3
    poor = [True] * 10 + [False] * 22
    text = ranking({"poor": poor, "best": best, "good": good})
    assert "best is better than poor (p < 0.001); good is better than poor (p < 0.001)" in text
    assert "undecided which is better: best or good (p = 1.00)" in text
    assert "Holm-corrected for 3" in text and "32 images of ImageNet's validation set" in text
    assert "this says little about other images" in ranking({"a": best, "b": good}, SEEN)
    assert "not known" in ranking({"a": best, "b": good}, UNKNOWN)
    assert "nothing to compare" in ranking({"a": best})


def test_many_networks_are_all_named() -> None:
    rights = {str(count): [True] * count + [False] * (99 - count) for count in (99, 70, 40, 39, 5)}
    text = ranking(rights)
    assert "99 is better than 70, 40, 39 and 5; 70 is better than 40, 39 and 5; 40 is better than 5; 39" in text
    assert "undecided which is better: 40 or 39." in text


def test_the_published_comparison_on_138_images_decides_nothing() -> None:
    """116, 112 and 109 images are right, and the networks differ in as few images as possible."""
    rights = {name: [True] * right + [False] * (138 - right) for name, right in (("s", 116), ("r", 112), ("b", 109))}
    assert "which is better: s or r" in ranking(rights)


def test_origins_follow_from_names() -> None:
    assert origin("val/n01440764/ILSVRC2012_val_00000293.JPEG") == UNSEEN
    assert origin("n01440764/n01440764_10026.JPEG") == SEEN
    assert origin("n01440764/holiday.jpg") == origin("x/my_ILSVRC2012_val_00000293.JPEG") == UNKNOWN


def images_of(tmp_path: Path, files: dict[str, list[str]]) -> EvaluationImages:
    for folder, names in files.items():
        for name in names:
            path = tmp_path / "set" / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 9)).save(path, "JPEG")
    return choose_images(ImagesConfig(dataset="folder", dir=str(tmp_path / "set")))


@pytest.mark.parametrize(
    ("tench", "church", "ranked", "others"),
    [  # first: one image of the validation set among the user's own
        ("own own", "own val", (TEST, UNKNOWN), {UNSEEN: 1}),
        ("val train", "val own", (UNSEEN, UNSEEN), {UNSEEN: 2, SEEN: 1, UNKNOWN: 3}),
        ("own train", "own", (UNKNOWN, UNKNOWN), {SEEN: 1, UNKNOWN: 2}),
        ("train", "train", (TEST, SEEN), {}),
    ],
)
def test_rankings_use_images_that_are_not_known_to_be_seen(
    tmp_path: Path, tench: str, church: str, ranked: tuple[str, str], others: dict[str, int]
) -> None:
    names = {"own": "{}.jpg", "val": "ILSVRC2012_val_0000000{}.JPEG", "train": "n01440764_{}.JPEG"}
    kinds = {"tench": tench.split(), "church": church.split()}
    files = {folder: [names[kind].format(i) for i, kind in enumerate(each)] for folder, each in kinds.items()}
    found = images_of(tmp_path, files)
    counts = {name: len(each) for name, each in found.sets.items()}
    assert found.ranked == ranked and counts == {TEST: sum(map(len, files.values()))} | others


def test_a_limit_draws_as_many_unseen_images(tmp_path: Path) -> None:
    names = [f"n01440764_{i}.JPEG" for i in range(9)], [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(9)]
    trees = {f"{part}/{folder}": [*names[0], *names[1]] for part in ("train", "val") for folder in ("tench", "church")}
    whole = images_of(tmp_path, trees)
    assert (whole.tests, len(whole.sets["unseen"]), len(whole.sets["seen"])) == (36, 36, 18)
    for seed in (0, 1):
        config = ImagesConfig(dataset="folder", dir=str(tmp_path / "set"), limit=5, seed=seed)
        few = choose_images(config)
        assert few.tests == 5 and 5 <= len(few.sets["unseen"]) <= 10 and few.ranked[0] == UNSEEN
        other = choose_images(config.model_copy(update={"seed": 9}))
        assert few.part.ids == choose_images(config).part.ids != other.part.ids
        each = choose_images(ImagesConfig(dataset="folder", dir=str(tmp_path / "set"), per_class=2, seed=seed))
        assert np.bincount(each.part.labels[: each.tests]).tolist() == [2, 2]
        assert np.bincount(each.part.labels[each.tests :]).tolist() == [2, 2]


def test_the_best_of_published_networks_is_chosen_on_the_images_that_rank_them() -> None:
    metrics = {"eval/top1_accuracy": 0.9, "unseen/top1_accuracy": 0.6}
    run = RunRecord("1", "one", "FINISHED", {"evaluation.ranked_on": "unseen"}, metrics, {})
    assert reached_accuracy(run) == 0.6
