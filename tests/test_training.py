"""The loop: repeatable bit for bit, resumable, and faithful to its schedules and its stopping rule."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Sequence
from itertools import cycle, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau

from effv2.architecture import build_model
from effv2.config.schema import (
    OPTIMISERS,
    SCHEDULES,
    OptimiserConfig,
    ScheduleConfig,
    StoppingConfig,
    TrainConfig,
)
from effv2.config.studies import open_study
from effv2.core.errors import InputError, RunError, Terminated
from effv2.core.randomness import stream_seed
from effv2.core.reporter import Reporter
from effv2.data.batches import NORMALISATIONS, epoch_order, normalised
from effv2.data.dataset import Dataset, Split, load_dataset, load_once
from effv2.evidence.claims import published_runs
from effv2.execution.device import make_execution
from effv2.run.run import prepare
from effv2.training.evaluation import EPOCH_METRICS, Evaluation, Metrics, evaluate
from effv2.training.loop import Training, TrainState
from effv2.training.muon import orthogonal
from effv2.training.optimisers import Schedule, make_optimiser
from effv2.training.progress import Progress
from effv2.training.stages import check_stages, stage_of, stages_of
from tests.conftest import tiny_config

EVERYTHING: dict[str, Any] = {
    "data": {"balance": True},
    "augment": {"crop": 1, "flip": True, "trivial_augment": True, "erasing": 0.5, "mixup": 0.4, "cutmix": 1.0},
    "optimiser": {"batch_size": 32, "label_smoothing": 0.1, "clip_norm": 1.0, "ema_decay": 0.9},
    "schedule": {"epochs": 3, "name": "plateau", "plateau_patience": 0, "warmup_epochs": 1},
    "evaluation": {"train_set": True, "batch_norm_images": 50},
    "progressive": {"stages": 2, "image_size": 12, "dropout": 0, "mixup": 0},
}


def evaluated(model: nn.Module, split: Split, config: TrainConfig) -> Evaluation:
    network = make_execution(config.execution).inference_factory(model, NORMALISATIONS[config.data.normalise])()
    return evaluate(network, split, config.evaluation.batch_size)


def start(config: TrainConfig) -> tuple[Dataset, TrainState, Training]:
    dataset = load_dataset(config.data)
    training = Training(config, dataset)
    return dataset, training.state, training


def numbers(results: Sequence[Metrics]) -> list[Metrics]:
    """Return the numbers that must repeat: all except times."""
    timed = ("time/", "throughput/")
    return [{k: v for k, v in metrics.items() if not k.startswith(timed)} for metrics in results]


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    return bool(first == second)


def saved_after(config: TrainConfig, step: int) -> dict[str, Any]:
    """Train up to `step`, save the state, read it again and return it."""
    file = io.BytesIO()
    _, state, training = start(config)

    def save(_step: int, _steps: int) -> None:
        if state.progress.step == step:
            torch.save(state.state_dict(), file)
            raise Terminated

    training.on_step = save
    with pytest.raises(Terminated):
        list(training)
    file.seek(0)
    saved: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return saved


def test_same_seed_gives_the_same_bits_whatever_else_draws() -> None:
    runs = []
    for disturbance in (0, 123):
        torch.manual_seed(disturbance)
        _, state, training = start(tiny_config(**EVERYTHING))
        results = []
        for result in training:
            torch.rand(disturbance)  # other code may draw random numbers between epochs
            results.append(result)
        runs.append((numbers(results), state.model.state_dict(), state.evaluated.state_dict()))
    assert runs[0][0] == runs[1][0]
    assert equal(runs[0][1:], runs[1][1:])
    _, state, training = start(tiny_config(**EVERYTHING, random={"seed": 1}))
    assert numbers(list(training)) != runs[0][0]


@pytest.mark.parametrize(("schedule", "optimiser"), [*zip(SCHEDULES.names(), cycle(OPTIMISERS.names()), strict=False)])
@pytest.mark.parametrize(
    "layers", [{}, {"frozen_epochs": 1, "head_lr_factor": 10, "layer_decay": 0.8}], ids=["", "frozen"]
)
def test_state_saved_after_any_step_is_resumed_exactly(schedule: str, optimiser: str, layers: dict[str, float]) -> None:
    everything = EVERYTHING | {
        "schedule": {**EVERYTHING["schedule"], "name": schedule},
        "optimiser": {**EVERYTHING["optimiser"], "name": optimiser, "lr": 0.01, **layers},
    }
    config = tiny_config(**everything)
    _, whole, training = start(config)
    expected = numbers(list(training))

    steps = whole.progress.step
    _, second, training = start(config)
    second.load_state_dict(saved_after(config, 1 + stream_seed(0, f"{schedule} {optimiser}") % steps))
    list(training)
    kept, again = whole.state_dict(), second.state_dict()
    for state in (kept, again):
        state["progress"] = numbers(state["progress"]["history"])
    assert again["progress"] == expected
    assert equal(kept, again)


def test_muon_steps_in_all_directions_alike_and_leaves_the_rest_to_adamw() -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, 24, 60) @ torch.diag(torch.logspace(0, -1.5, 60))
    for wide_or_tall in (matrices, matrices.mT):
        left, _, right = torch.linalg.svd(wide_or_tall, full_matrices=False)
        values = left.mT @ orthogonal(wide_or_tall) @ right.mT
        singular = values.diagonal(dim1=1, dim2=2)
        assert singular.min() > 0.6 and singular.max() < 1.3
        assert (values - singular.diag_embed()).abs().max() < 1e-3

    network = nn.Sequential(nn.Conv2d(8, 24, 3), nn.Conv2d(24, 24, 3, groups=24), nn.Flatten(), nn.Linear(24, 5))
    before = [parameter.detach().clone() for parameter in network.parameters()]
    ours = make_optimiser(OptimiserConfig(name="muon", lr=0.01, weight_decay=0, momentum=0.95), network)
    network(torch.randn(4, 8, 5, 5)).square().sum().backward()
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    ours.step()
    kernel, *others = zip(network.parameters(), before, gradients, strict=True)
    step = (kernel[0] - kernel[1]).detach()
    assert step.square().mean().sqrt() == pytest.approx(0.01 * 0.2, rel=0.2) and (step * kernel[2]).sum() < 0
    for after, first, gradient in others:
        assert torch.allclose(after, first - 0.01 * gradient.sign() * (gradient != 0), atol=1e-4)


def test_stages_rise_as_in_the_paper() -> None:
    wanted = {"stages": 4, "image_size": 128, "rand_augment": 5, "dropout": 0.1}
    groups = {"data": {"image_size": 300}, "augment": {"rand_augment": 15, "crop": 30}, "model": {"dropout": 0.3}}
    config = tiny_config(**groups, progressive=wanted, schedule={"epochs": 350})
    found = stages_of(config)
    assert [stage.image_size for stage in found] == [128, 184, 244, 300]  # the paper's table 6, on multiples of 4
    assert [stage.augment.rand_augment for stage in found] == pytest.approx([5, 25 / 3, 35 / 3, 15])
    assert [stage.dropout for stage in found] == pytest.approx([0.1, 1 / 6, 7 / 30, 0.3])
    assert [stage.augment.crop for stage in found] == [13, 18, 24, 30]  # the same share of the image
    numbers_of = [stage_of(config, epoch).number for epoch in range(1, 351)]
    assert numbers_of == sorted(numbers_of) and [numbers_of.count(n) for n in (1, 2, 3, 4)] == [88, 87, 88, 87]


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"stages": 3, "image_size": 16}, "there are only 2 epochs"),
        ({"stages": 2}, "nothing rises"),
        ({"image_size": 16}, "set progressive.stages to 2"),
        ({"dropout": 0}, "set progressive.stages to 2"),
        ({"stages": 2, "image_size": 4}, "less than 8 pixels"),
        ({"stages": 2, "mixup": -0.5}, "give -1"),
    ],
)
def test_stages_that_make_no_sense_are_refused(wanted: dict[str, Any], said: str) -> None:
    with pytest.raises((InputError, ValidationError), match=said):
        check_stages(tiny_config(progressive=wanted))


def test_each_stage_trains_at_its_size_and_is_evaluated_at_the_last() -> None:
    wanted = {"stages": 3, "image_size": 16, "last_image_size": 24, "dropout": 0}
    config = tiny_config(data={"image_size": 32}, model={"dropout": 0.5}, progressive=wanted, schedule={"epochs": 3})
    _, state, training = start(config)
    seen: list[tuple[bool, int, float]] = []

    def look(network: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        rate = next(layer.p for layer in network.modules() if isinstance(layer, nn.Dropout))
        seen.append((network.training, inputs[0].shape[-1], rate))

    state.model.register_forward_pre_hook(look)
    results = list(training)
    trained = list(dict.fromkeys(each for each in seen if each[0]))
    assert trained == [(True, 16, 0.0), (True, 20, 0.25), (True, 24, 0.5)]
    assert [each["progressive/image_size"] for each in results] == [16, 20, 24]
    assert [each["progressive/stage"] for each in results] == [1, 2, 3]
    assert {size for learning, size, _ in seen if not learning} <= {32}


def test_a_training_that_is_over_is_freed_at_once() -> None:
    gc.collect()
    gc.disable()
    try:
        _, state, training = start(tiny_config())
        list(training)
        network = weakref.ref(state.model)
        del state, training
        assert network() is None
    finally:
        gc.enable()


def test_a_few_epochs_learn_digits() -> None:
    config = tiny_config(data={"image_size": 8, "per_class": 0}, schedule={"epochs": 2}, optimiser={"lr": 0.02})
    _, _, training = start(config)
    results = list(training)
    assert results[-1]["test/accuracy"] > 0.85
    assert results[-1]["train/loss"] < results[0]["train/loss"]


def test_evaluation_is_the_plain_one_and_restores_the_mode() -> None:
    config = tiny_config(model={"outputs": 13})
    dataset, state, training = start(config)
    list(training)
    state.model.train()
    found = evaluated(state.model, dataset.test, config)
    assert state.model.training
    plain = build_model(config.model.build_table(), 13)
    plain.load_state_dict(state.model.state_dict())
    plain.eval()
    images = dataset.test.images(torch.arange(len(dataset.test)))
    with torch.no_grad():
        logits = plain(normalised(images, NORMALISATIONS["none"], channels_last=False))
    assert found.logits.shape == (len(dataset.test), 13)
    assert torch.allclose(found.logits, logits, atol=1e-4)
    assert found.accuracy == (logits.argmax(1) == dataset.test.labels).double().mean().item()
    assert found.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, dataset.test.labels).item(), rel=1e-4)


@pytest.mark.parametrize("images", [0, 64])
def test_selected_weights_are_those_of_the_best_validation_epoch(images: int) -> None:
    evaluation = {"batch_norm_images": images}
    config = tiny_config(schedule={"epochs": 5}, optimiser={"lr": 0.02}, evaluation=evaluation)
    dataset, state, training = start(config)
    list(training)
    accuracies = [metrics["val/accuracy"] for metrics in state.progress.history]
    assert state.progress.best_epoch == 1 + accuracies.index(max(accuracies))
    assert state.selected is not None
    state.model.load_state_dict(state.selected)
    found = evaluated(state.model, dataset.test, config)
    assert found.accuracy == state.progress.history[state.progress.best_epoch - 1]["test/accuracy"]


def test_batch_norm_is_estimated_from_the_same_images_and_changes_no_step() -> None:
    found = {}
    for images in (0, 64):
        dataset, state, training = start(tiny_config(evaluation={"batch_norm_images": images}))
        found[images] = numbers(list(training)), dict(state.model.named_parameters()), torch.rand(1)
    (plain, *first), (estimated, *second) = found.values()
    assert equal(first[0], second[0]) and [each["train/loss"] for each in plain] == [
        each["train/loss"] for each in estimated
    ]
    assert plain[-1]["val/loss"] != estimated[-1]["val/loss"]
    # The first norm sees the outputs of the first convolution on those images, with any batch size.
    order = epoch_order(len(dataset.train), 0, 0)[:64]
    inputs = normalised(dataset.train.images(order), NORMALISATIONS["none"], channels_last=True)
    convolution, norm = state.model.features[0][0], state.model.features[0][1]
    seen = convolution(inputs).transpose(0, 1).flatten(1)
    assert torch.allclose(norm.running_mean, seen.mean(1), atol=1e-5) and norm.momentum == 0.1
    assert torch.allclose(norm.running_var, seen.var(1), rtol=1e-4)
    assert state.model.training


def test_diverging_loss_ends_with_an_explanation() -> None:
    _, _, training = start(tiny_config(optimiser={"name": "sgd", "lr": 100, "momentum": 0.99}, schedule={"epochs": 30}))
    with pytest.raises(RunError, match=r"no longer a finite number at epoch .* lower optimiser\.lr"):
        list(training)


def stops_at(accuracies: Sequence[float], stopping: StoppingConfig, epochs: int) -> int:
    """Return the epoch after which a training with these test accuracies ends."""
    progress = Progress()
    for progress.epoch, accuracy in enumerate(accuracies[:epochs], 1):
        progress.history.append({"test/accuracy": accuracy})
        if progress.should_stop(stopping):
            break
    return progress.epoch


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.integers(0, 20), st.integers(1, 10), st.booleans())
def test_stopping_follows_its_rule(accuracies: list[float], minimum: int, patience: int, late: bool) -> None:
    """Training stops at the first epoch from minimum + patience on without progress in the last `patience` epochs."""
    stopping = StoppingConfig(min_epochs=minimum, patience=patience, best_since="min_epochs" if late else "start")
    first = max(minimum, 1) - 1 if late else 0
    expected = next(
        (
            epoch
            for epoch in range(max(minimum, 1) + patience if late else minimum + patience, len(accuracies) + 1)
            if max(accuracies[first : epoch - patience], default=-1) >= max(accuracies[epoch - patience : epoch])
        ),
        len(accuracies),
    )
    assert stops_at(accuracies, stopping, len(accuracies)) == expected


def test_stopping_looks_only_at_evaluated_epochs() -> None:
    stopping, progress = StoppingConfig(patience=2), Progress()
    for progress.epoch, accuracy in enumerate([None, 0.1, None, 0.2, None, None, None, 0.3, None, None, 0.3, 0.4], 1):
        progress.history.append({} if accuracy is None else {"test/accuracy": accuracy})
        if progress.should_stop(stopping):
            break
    assert progress.epoch == 11


@pytest.mark.parametrize("validation", [0, 0.2])
def test_epochs_between_evaluations_change_no_other_number(validation: float) -> None:
    """This holds for resumed trainings too. Rate and weights follow only from evaluated epochs."""
    groups: dict[str, Any] = {
        "data": {"validation_fraction": validation},
        "schedule": {"epochs": 5, "name": "plateau", "plateau_patience": 0},
    }
    _, every, plain = start(tiny_config(**{**groups, "schedule": {"epochs": 5}}))
    wanted = numbers(list(plain))
    config = tiny_config(**{**groups, "schedule": {"epochs": 5}}, evaluation={"every": 2})
    _, seldom, training = start(config)
    found, saved = [], []
    for metrics in training:
        found.append(metrics)
        saved.append(copy.deepcopy(seldom.state_dict()))
    assert [epoch for epoch, each in enumerate(found, 1) if "test/accuracy" in each] == [2, 4, 5]
    assert all(each.items() <= there.items() for each, there in zip(numbers(found), wanted, strict=True))
    assert equal(every.model.state_dict(), seldom.model.state_dict())
    best = max((2, 4, 5), key=lambda epoch: wanted[epoch - 1]["val/accuracy" if validation else "test/accuracy"])
    assert seldom.progress.best_epoch == best
    for state in saved[:2]:
        _, again, rest = start(config)
        again.load_state_dict(copy.deepcopy(state))
        list(rest)
        assert equal(again.model.state_dict(), seldom.model.state_dict()) and equal(again.selected, seldom.selected)
    _, _, training = start(tiny_config(**groups, evaluation={"every": 2}))
    rates = [each["learning_rate"] for each in training]
    assert rates[0] == rates[1] == rates[2]  # the first evaluated epoch can't be worse than an earlier one


def test_the_train_set_is_evaluated_in_every_epoch_or_in_none() -> None:
    with pytest.raises(ValidationError, match="give 1, or train_set false"):
        tiny_config(evaluation={"train_set": True, "every": 2})


def changes(rates: Sequence[float]) -> list[int]:
    return [epoch for epoch, (before, now) in enumerate(pairwise(rates), 1) if now != before]


@pytest.mark.parametrize(
    ("study", "reductions", "length"),
    [("train-birds-128", [44, 57, 68, 79], 201), ("train-birds-32", [13, 24, 35, 46], 350)],
)
def test_published_birds_logs_are_replayed(study: str, reductions: list[int], length: int) -> None:
    """With the post's test accuracies, the rate falls and training ends at the epochs of its logs."""
    published = published_runs()[study]["default"].history["test/accuracy"]
    accuracies = [published[epoch] for epoch in sorted(published)]
    config = open_study(study).config({})
    followed = [*accuracies, *[0.0] * (config.schedule.epochs - len(accuracies))]
    found = rates(config.schedule, 1, followed, config.optimiser.lr)[: len(accuracies)]
    assert changes(found) == reductions
    assert found[0] == 1e-4 and found[-1] == pytest.approx(1e-8)
    assert stops_at([*accuracies, *[0.0] * 350], config.stopping, config.schedule.epochs) == length == len(accuracies)


@pytest.mark.parametrize("best_since", ["start", "min_epochs"])
def test_no_stopping_rule_of_the_post_gives_the_length_of_its_log_of_birds_at_32(best_since: Any) -> None:
    published = published_runs()["train-birds-32"]["default"].history["test/accuracy"]
    accuracies = [published[epoch] for epoch in sorted(published)]
    stopping = StoppingConfig(min_epochs=151, patience=50, best_since=best_since)
    assert stops_at(accuracies, stopping, 350) < 350


def test_hyper_parameter_check_counts_the_best_epoch_from_the_minimum_on() -> None:
    """In the published figure, curves end 50 epochs after their first maximum from epoch 151 on."""
    stopping = open_study("hparam-imagenette-128").arm("default", {}).stopping
    accuracies = [0.34 if epoch == 9 else 0.29 if epoch == 154 else 0.26 for epoch in range(1, 351)]
    assert stops_at(accuracies, stopping, 350) == 204


def rates(
    config: ScheduleConfig, steps_per_epoch: int, accuracies: Sequence[float] = (), lr: float = 0.5
) -> list[float]:
    optimiser = torch.optim.SGD([torch.zeros(1)], lr=lr)
    schedule, found = Schedule(config, optimiser, steps_per_epoch), []
    for epoch in range(config.epochs):
        for step in range(steps_per_epoch):
            schedule.before_step(epoch * steps_per_epoch + step)
            found.append(schedule.rate)
        schedule.after_epoch(epoch + 1, accuracies[epoch] if accuracies else 0.0)
    return found


@given(st.integers(2, 12), st.integers(2, 20))
def test_onecycle_is_torchs(epochs: int, steps: int) -> None:
    optimiser = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    theirs = OneCycleLR(optimiser, 0.5, total_steps=epochs * steps, cycle_momentum=False)
    expected = [theirs.get_last_lr()[0]]
    for _ in range(epochs * steps - 1):
        optimiser.step()
        theirs.step()
        expected.append(theirs.get_last_lr()[0])
    assert rates(ScheduleConfig(name="onecycle", epochs=epochs), steps) == pytest.approx(expected)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=30), st.integers(0, 4))
def test_plateau_is_torchs(accuracies: list[float], patience: int) -> None:
    optimiser = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    theirs, expected = ReduceLROnPlateau(optimiser, mode="max", factor=0.1, patience=patience), []
    for accuracy in accuracies:
        expected.append(optimiser.param_groups[0]["lr"])
        theirs.step(accuracy)
    config = ScheduleConfig(name="plateau", epochs=len(accuracies), plateau_patience=patience)
    assert rates(config, 1, accuracies) == expected


@given(st.integers(1, 10), st.integers(1, 20), st.integers(0, 3))
def test_cosine_warms_up_then_falls_to_nothing(epochs: int, steps: int, warmup: int) -> None:
    config = ScheduleConfig(name="cosine", epochs=warmup + epochs, warmup_epochs=warmup)
    factors = [SCHEDULES["cosine"](config, step, steps) for step in range((warmup + epochs) * steps + 1)]
    rising, falling = factors[: warmup * steps], factors[warmup * steps :]
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True)
    assert max(factors) == falling[0] == 1 and falling[-1] == pytest.approx(0)


def test_averaged_weights_trail_and_are_the_ones_evaluated() -> None:
    config = tiny_config(optimiser={"ema_decay": 0.99})
    dataset, state, training = start(config)
    list(training)
    assert state.evaluated is not state.model
    assert not equal(dict(state.evaluated.named_parameters()), dict(state.model.named_parameters()))
    found = evaluated(state.evaluated, dataset.test, config)
    assert found.accuracy == state.progress.history[-1]["test/accuracy"]


def test_last_batch_of_one_image_is_left_out() -> None:
    config = tiny_config(optimiser={"batch_size": 119})  # of 120 images, one remains
    dataset, state, training = start(config)
    assert len(dataset.train) == 120
    list(training)
    assert state.progress.step == 2


def test_train_set_evaluation_replaces_the_average_over_steps() -> None:
    dataset, state, training = start(tiny_config(evaluation={"train_set": True}))
    results = list(training)
    found = evaluated(state.model, dataset.train, training.config)
    assert results[-1]["train/accuracy"] == found.accuracy


def test_a_metric_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    def top3(found: Evaluation) -> float:
        return (found.logits.topk(3).indices == found.labels[:, None]).any(1).double().mean().item()

    monkeypatch.setitem(EPOCH_METRICS, "top3_accuracy", top3)
    for metrics in start(tiny_config())[2]:
        for split in ("test", "val"):
            assert metrics[f"{split}/accuracy"] <= metrics[f"{split}/top3_accuracy"] <= 1


@pytest.mark.parametrize("name", ["recall@5", "a//b", "/a", "../a", "", "5%"])
def test_a_metric_that_mlflow_would_refuse_is_refused_first(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(EPOCH_METRICS, name, lambda found: 0.5)
    with pytest.raises(InputError, match="MLflow logs no metric of this name"):
        prepare([tiny_config()], load_once(Reporter()), lambda text: None)


def test_bf16_trains_too() -> None:
    config = tiny_config(execution={"precision": "bf16"})
    dataset, state, training = start(config)
    assert all(parameter.dtype == torch.float32 for parameter in state.model.parameters())
    assert list(training)[-1]["train/loss"] > 0
    plain = config.model_copy(update={"execution": config.execution.model_copy(update={"precision": "fp32"})})
    halves, wholes = (evaluated(state.model, dataset.test, each).logits.softmax(1) for each in (config, plain))
    assert not torch.equal(halves, wholes) and torch.allclose(halves, wholes, atol=0.05)


def test_a_metric_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EPOCH_METRICS, "odd", lambda found: None)
    with pytest.raises(RunError, match=r"The metric 'odd' of EPOCH_METRICS failed \(TypeError"):
        list(start(tiny_config())[2])
