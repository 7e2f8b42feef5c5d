"""The training loop: a generator of epoch results over a state that can be saved after any step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from effv2.config.schema import TrainConfig
from effv2.core.errors import Diverged
from effv2.core.randomness import private_randomness, seed_generators, stream_seed
from effv2.core.signals import uninterrupted
from effv2.data.batches import augment, batch_count, epoch_order, mix_samples, one_hot, to_input, training_batches
from effv2.data.dataset import Dataset, to_device
from effv2.execution.device import Execution
from effv2.training.evaluate import epoch_metrics, evaluate
from effv2.training.state import EpochSums, TrainState, watched_accuracy

# On an accelerator the loss is looked at this seldom, since each look waits for the device.
STEPS_BETWEEN_LOSS_CHECKS = 50

Metrics = dict[str, float]


@dataclass(frozen=True)
class EpochResult:
    """An epoch's number (from 1) and its metrics by the names they are logged under."""

    epoch: int
    metrics: Metrics


@dataclass
class Training:
    """A training that begins or resumes at `state`: iterate over it to train.

    `on_step` is called with (step of the epoch, steps an epoch), after which the state may be saved. Seconds of
    training exclude evaluation, `on_step` and whatever the caller does between two epochs.
    """

    config: TrainConfig
    dataset: Dataset
    state: TrainState
    execution: Execution
    on_step: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        """Let the images lie on an accelerator for good where it has room, so that no step waits for them."""
        if self.dataset.bytes <= self.execution.room_for_data():
            self.dataset = self.dataset.on(self.execution.device)
        # Not self: a function that held it would keep the network in memory.
        state, execution = self.state, self.execution
        usual = min(self.config.optimiser.batch_size, len(self.dataset.train))  # a size that is worth compiling

        def differentiate(inputs: Tensor, targets: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            """Set the gradients of a batch; return its mean loss and how many were right, on the device."""
            state.optimiser.zero_grad(set_to_none=True)
            with execution.autocast(), execution.eager(len(inputs) != usual):
                logits = state.model(inputs)
            logits = logits.float()
            loss = F.cross_entropy(logits, targets)
            loss.backward()
            return loss.detach(), (logits.detach().argmax(1) == labels).sum()

        self._differentiate = execution.graphed(differentiate, state.model.parameters())
        self._network_for_inference = execution.inference_factory(state.evaluated)

    def __iter__(self) -> Iterator[EpochResult]:
        """Train until the last epoch or early stopping, yielding after each epoch; Diverged, RunError."""
        progress = self.state.progress
        while progress.epoch < self.config.schedule.epochs and not progress.should_stop(self.config.stopping):
            with private_randomness():
                metrics = self._train_epoch() | self._evaluate_epoch()
            with uninterrupted():
                metrics["time/epoch_seconds"] = metrics["time/train_seconds"] + metrics["time/evaluate_seconds"]
                progress.epoch += 1
                progress.train_seconds += metrics["time/train_seconds"]
                self.state.sums = EpochSums.begin(self.execution.device)
                progress.history.append(metrics)
                watched = watched_accuracy(metrics)
                self.state.schedule.after_epoch(progress.epoch, watched)
                if watched > progress.best_accuracy:
                    progress.best_accuracy, progress.best_epoch = watched, progress.epoch
                    if self.dataset.validation is not None:
                        weights = self.state.evaluated.state_dict()
                        self.state.selected = {name: value.detach().clone() for name, value in weights.items()}
            yield EpochResult(progress.epoch, metrics)

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
                sums.add(*self._train_step(images, labels), len(labels))
            if step % check_every == 0 or step == steps:
                self._must_be_finite(sums.loss.item(), "training")
            sums.seconds += time.perf_counter() - started
            if self.on_step:
                self.on_step(step, steps)
            started = time.perf_counter()
        return {
            "train/loss": sums.loss.item() / sums.images,
            "train/accuracy": sums.right.item() / sums.images,
            "learning_rate": self.state.schedule.rate,
            "time/train_seconds": sums.seconds,
            "throughput/train_images_per_second": sums.images / sums.seconds,
        }

    def _train_step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Make one step; return its mean loss and how many were right, on the device."""
        config, state, step, device = self.config, self.state, self.state.progress.step, self.execution.device
        seed_generators(stream_seed(config.random.seed, "augmentation", step), device)
        images = to_device(augment(images, config.augment), device)
        inputs = to_input(images, config.data, self.execution.channels_last)
        labels = to_device(labels, device)
        outputs = config.model.outputs or len(self.dataset.classes)
        targets = one_hot(labels, outputs, config.optimiser.label_smoothing)
        inputs, targets = mix_samples(inputs, targets, config.augment)

        seed_generators(stream_seed(config.random.seed, "dropout", step), device)
        loss, right = self._differentiate(inputs, targets, labels)
        state.schedule.before_step(step)
        if config.optimiser.clip_norm:
            nn.utils.clip_grad_norm_(state.model.parameters(), config.optimiser.clip_norm)
        state.optimiser.step()
        state.average(config.optimiser.ema_decay)
        state.progress.step += 1
        return loss, right

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
        network = self._network_for_inference()
        for name, split in splits.items():
            result = evaluate(network, split, self.config, self.execution)
            self._must_be_finite(result.loss, name)
            metrics |= {f"{name}/{metric}": value for metric, value in epoch_metrics(result).items()}
        seconds = time.perf_counter() - started
        rate = sum(map(len, splits.values())) / seconds
        return metrics | {"time/evaluate_seconds": seconds, "throughput/evaluate_images_per_second": rate}

    def _must_be_finite(self, loss: float, name: str) -> None:
        if not math.isfinite(loss):
            epoch, step, rate = self.state.progress.epoch + 1, self.state.progress.step, self.state.schedule.rate
            clip = "optimiser.clip_norm" if self.config.optimiser.clip_norm else "set optimiser.clip_norm"
            problem = f"The {name} loss is no longer a finite number at epoch {epoch}, step {step}"
            raise Diverged(f"{problem}, with a learning rate of {rate:g}; lower optimiser.lr or {clip}.")
