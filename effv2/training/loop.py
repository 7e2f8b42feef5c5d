"""The training loop, a generator over a state that can be saved after any step; evaluation on a split."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effv2.config.schema import TrainConfig
from effv2.core.errors import Diverged
from effv2.core.randomness import private_randomness, seed_generators, stream_seed
from effv2.core.signals import uninterrupted
from effv2.data.batches import (
    NORMALISATIONS,
    augment,
    batch_count,
    epoch_order,
    mix_samples,
    normalised,
    one_hot,
    training_batches,
)
from effv2.data.dataset import Dataset, Split, to_device
from effv2.execution.device import Execution, Forward, make_execution
from effv2.training.state import EpochSums, TrainState, watched_accuracy

# On an accelerator the loss is looked at this seldom, since each look waits for the device.
STEPS_BETWEEN_LOSS_CHECKS = 50
TIMED_SECONDS, TIMED_PASSES = 1.0, 11

Metrics = dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy, fraction right, float32 logits (N, outputs) and labels (N) in the split's order."""

    loss: float
    accuracy: float
    logits: Tensor
    labels: Tensor


# What is measured of each evaluated split after each epoch, and logged as `<split>/<name>`. A new metric is one entry.
EPOCH_METRICS: dict[str, Callable[[Evaluation], float]] = {
    "loss": lambda found: found.loss,
    "accuracy": lambda found: found.accuracy,
}


def evaluate(network: Forward, split: Split, batch_size: int) -> Evaluation:
    """Run a network for inference (of Execution) over `split`; the argmax is over all outputs."""
    batches = map(split.images, torch.arange(len(split)).split(batch_size))
    logits = torch.cat(list(map(network, batches))).cpu()
    loss = F.cross_entropy(logits, split.labels).item()
    accuracy = (logits.argmax(1) == split.labels).double().mean().item()
    return Evaluation(loss, accuracy, logits, split.labels)


def latency(network: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """Return the median seconds of a pass, logits on the host: of as many as fit a second, 1 to 11, after a first."""
    network(images).cpu()
    seconds: list[float] = []
    while len(seconds) < TIMED_PASSES and sum(seconds) < TIMED_SECONDS:
        started = time.perf_counter()
        network(images).cpu()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


class Training:
    """A training from its beginning, or from what is loaded into `state`: iterate over it to train.

    `on_step` is called with (step of the epoch, steps an epoch), after which the state may be saved. Seconds of
    training exclude evaluation, `on_step` and whatever the caller does between two epochs.
    """

    def __init__(self, config: TrainConfig, dataset: Dataset, execution: Execution | None = None) -> None:
        execution = execution or make_execution(config.execution)
        state = TrainState(config, dataset, execution)
        self.config, self.state, self.execution = config, state, execution
        # On an accelerator for good where it has room, so that no step waits for its images.
        self.dataset = dataset.on(execution.device) if dataset.bytes <= execution.room_for_data() else dataset
        self.on_step: Callable[[int, int], None] = lambda step, steps: None
        usual = min(config.optimiser.batch_size, len(dataset.train))  # a size that is worth compiling

        def differentiate(inputs: Tensor, targets: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            """Set the gradients of a batch; return its mean loss and how many were right, on the device.

            A function that held `self` would keep the network in memory.
            """
            state.optimiser.zero_grad(set_to_none=True)
            with execution.autocast(), execution.eager(len(inputs) != usual):
                logits = state.model(inputs)
            logits = logits.float()
            loss = F.cross_entropy(logits, targets)
            loss.backward()
            return loss.detach(), (logits.detach().argmax(1) == labels).sum()

        self._differentiate = execution.graphed(differentiate, state.model.parameters())
        self._statistics = NORMALISATIONS[config.data.normalise]
        self.network_for_inference = execution.inference_factory(state.evaluated, self._statistics)

    def __iter__(self) -> Iterator[Metrics]:
        """Train until the last epoch or early stopping, yielding each epoch's metrics; Diverged."""
        progress = self.state.progress
        while progress.epoch < self.config.schedule.epochs and not progress.should_stop(self.config.stopping):
            with private_randomness():
                metrics = self._train_epoch() | self._evaluate_epoch()
            with uninterrupted():
                metrics["time/epoch_seconds"] = metrics["time/train_seconds"] + metrics["time/evaluate_seconds"]
                progress.epoch += 1
                progress.train_seconds += metrics["time/train_seconds"]
                self.state.sums = EpochSums()
                progress.history.append(metrics)
                watched = watched_accuracy(metrics)
                self.state.schedule.after_epoch(progress.epoch, watched)
                if watched > progress.best_accuracy:
                    progress.best_accuracy, progress.best_epoch = watched, progress.epoch
                    if self.dataset.validation is not None:
                        weights = self.state.evaluated.state_dict()
                        self.state.selected = {name: value.detach().clone() for name, value in weights.items()}
            yield metrics

    def _train_epoch(self) -> Metrics:
        """Make the steps of the epoch that were not made yet."""
        order = epoch_order(len(self.dataset.train), self.config.random.seed, self.state.progress.epoch + 1)
        batch_size, sums = self.config.optimiser.batch_size, self.state.sums
        steps = batch_count(len(order), batch_size)
        check_every = 1 if self.execution.device.type == "cpu" else STEPS_BETWEEN_LOSS_CHECKS
        made = self.state.progress.step - self.state.progress.epoch * steps
        batches = training_batches(self.dataset.train, order[made * batch_size :], batch_size)
        self.state.model.train()
        started = time.perf_counter()
        for step, (images, labels) in enumerate(batches, made + 1):
            with uninterrupted():
                self._train_step(images, labels)
            if step % check_every == 0 or step == steps:
                self._must_be_finite(sums.loss.item(), "training")
            sums.seconds += time.perf_counter() - started
            self.on_step(step, steps)
            started = time.perf_counter()
        return {
            "train/loss": sums.loss.item() / sums.images,
            "train/accuracy": sums.right.item() / sums.images,
            "learning_rate": self.state.schedule.rate,
            "time/train_seconds": sums.seconds,
            "throughput/train_images_per_second": sums.images / sums.seconds,
        }

    def _train_step(self, images: Tensor, labels: Tensor) -> None:
        """Make one step and add it to the sums of the epoch, without waiting for the device."""
        config, state, step, device = self.config, self.state, self.state.progress.step, self.execution.device
        seed_generators(stream_seed(config.random.seed, "augmentation", step), device)
        images = to_device(augment(images, config.augment), device)
        inputs = normalised(images, self._statistics, self.execution.channels_last)
        labels = to_device(labels, device)
        outputs = config.model.outputs or len(self.dataset.classes)
        targets = one_hot(labels, outputs, config.optimiser.label_smoothing)
        inputs, targets = mix_samples(inputs, targets, config.augment)

        seed_generators(stream_seed(config.random.seed, "dropout", step), device)
        loss, right = self._differentiate(inputs, targets, labels)
        state.sums.add(loss, right, len(labels))
        state.schedule.before_step(step)
        if config.optimiser.clip_norm:
            nn.utils.clip_grad_norm_(state.model.parameters(), config.optimiser.clip_norm)
        state.optimiser.step()
        state.average(config.optimiser.ema_decay)
        state.progress.step += 1

    def _evaluate_epoch(self) -> Metrics:
        """Measure test, validation and, the post's way, the whole train set, in eval mode."""
        chosen = {
            "test": self.dataset.test if self.config.evaluation.test_set else None,
            "val": self.dataset.validation,
            "train": self.dataset.train if self.config.evaluation.train_set else None,
        }
        splits = {name: split for name, split in chosen.items() if split is not None}
        metrics: Metrics = {}
        started = time.perf_counter()
        network = self.network_for_inference()
        for name, split in splits.items():
            result = evaluate(network, split, self.config.evaluation.batch_size)
            self._must_be_finite(result.loss, name)
            metrics |= {f"{name}/{metric}": measure(result) for metric, measure in EPOCH_METRICS.items()}
        seconds = time.perf_counter() - started
        rate = sum(map(len, splits.values())) / seconds
        return metrics | {"time/evaluate_seconds": seconds, "throughput/evaluate_images_per_second": rate}

    def _must_be_finite(self, loss: float, name: str) -> None:
        if not math.isfinite(loss):
            epoch, step, rate = self.state.progress.epoch + 1, self.state.progress.step, self.state.schedule.rate
            clip = "optimiser.clip_norm" if self.config.optimiser.clip_norm else "set optimiser.clip_norm"
            problem = f"The {name} loss is no longer a finite number at epoch {epoch}, step {step}"
            raise Diverged(f"{problem}, with a learning rate of {rate:g}; lower optimiser.lr or {clip}.")
