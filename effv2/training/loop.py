"""The training loop, a generator over a state that can be saved after any step."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from effv2.architecture import build_model
from effv2.config.schema import TrainConfig
from effv2.core.errors import Diverged
from effv2.core.internals import copy_all, lerp_all
from effv2.core.processes import uninterrupted
from effv2.core.randomness import private_randomness, seed_generators, stream_seed
from effv2.data import batches
from effv2.data.dataset import Dataset, to_device
from effv2.execution.device import Execution, Function, make_execution
from effv2.training.evaluation import Metrics, epoch_metrics, evaluate
from effv2.training.optimisers import Schedule, make_optimiser
from effv2.training.progress import EpochSums, Progress, watched_accuracy
from effv2.training.stages import Stage, norms_are_frozen, set_dropout, set_modes, stage_metrics, stage_of

# Steps between checks of the loss on an accelerator, because each check waits for the device.
STEPS_BETWEEN_LOSS_CHECKS = 50
Initialise = Callable[[nn.Module], None]  # gets the initialised network and may change its weights


class TrainState:
    """The state of a training, which can be saved after any step.

    `selected` holds the weights of the best epoch if validation chooses it. Random numbers need no state: each step
    seeds its own, and the order of an epoch follows from its number.
    """

    def __init__(
        self, config: TrainConfig, dataset: Dataset, execution: Execution, initialise: Initialise = lambda network: None
    ) -> None:
        wanted, optimiser = config.model, config.optimiser
        settings = wanted.dropout, wanted.stochastic_depth, wanted.zero_init_residual
        with private_randomness():
            torch.manual_seed(stream_seed(config.random.seed, "initialisation"))
            network = build_model(wanted.build_table(), wanted.outputs or len(dataset.classes), *settings)
            initialise(network)
            self.model = execution.place(network)
        self.averaged = AveragedModel(self.model, use_buffers=True) if optimiser.ema_decay else None
        both = (self.averaged.module, self.model) if self.averaged else ()
        tensors = [[*module.parameters(), *module.buffers()] for module in both]  # which remain the same objects
        self._smooth = [[each for each in side if each.is_floating_point()] for side in tensors]
        self._counts = [[each for each in side if not each.is_floating_point()] for side in tensors]
        steps_per_epoch = batches.batch_count(len(dataset.train), optimiser.batch_size)
        self.optimiser = make_optimiser(optimiser, self.model)
        self.schedule = Schedule(config.schedule, self.optimiser, steps_per_epoch)
        self.progress, self.sums = Progress(), EpochSums()
        self.selected: dict[str, Tensor] | None = None

    @property
    def evaluated(self) -> nn.Module:
        """Return the network that is evaluated and kept: the averaged one if there is one."""
        return self.averaged.module if self.averaged else self.model

    @torch.no_grad()
    def average(self, decay: float) -> None:
        """Update the averaged weights. The decay rises from 0.1 as (1 + n) / (10 + n), to forget the first ones."""
        if self.averaged is None:
            return
        n = int(self.averaged.n_averaged)
        weight = 1 - min(decay, (1 + n) / (10 + n)) if n else 1.0
        lerp_all(self._smooth[0], self._smooth[1], weight)
        copy_all(self._counts[0], self._counts[1])
        self.averaged.n_averaged += 1  # AveragedModel's own update would wait for a GPU

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict() if self.averaged else None,
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "progress": asdict(self.progress),
            "sums": vars(self.sums).copy(),
            "selected": self.selected,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of state_dict."""
        for name in ("model", "averaged", "optimiser", "schedule"):
            if (part := getattr(self, name)) is not None:
                part.load_state_dict(state[name])
        self.progress, self.sums = Progress(**state["progress"]), EpochSums(**state["sums"])
        self.selected = state["selected"]

    def take_selected(self) -> None:
        """Restore the weights of the selected epoch. Without a validation split, that is the last one."""
        if self.selected is not None:
            self.evaluated.load_state_dict(self.selected)


class Training:
    """A training from its beginning, or from the state loaded into `state`. Iterate over it to train.

    `on_step` is called with (step of the epoch, steps per epoch). It may save the state. Seconds of training exclude
    evaluation, `on_step` and the caller's work between two epochs.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        execution: Execution | None = None,
        initialise: Initialise = lambda network: None,
    ) -> None:
        execution = execution or make_execution(config.execution)
        state = TrainState(config, dataset, execution, initialise)
        self.config, self.state, self.execution = config, state, execution
        # Kept on an accelerator that has room, so that no step waits for its images.
        self.dataset = dataset.on(execution.device) if dataset.bytes <= execution.room_for_data() else dataset
        self._stage = Stage(0, config.data.image_size, config.augment, config.model.dropout)  # before the first
        self._train_split = self.dataset.train
        self.on_step: Callable[[int, int], None] = lambda step, steps: None
        usual = min(config.optimiser.batch_size, len(dataset.train))  # a size worth compiling

        # Not a method: a reference to `self` would keep the network in memory.
        def differentiate(inputs: Tensor, targets: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            """Set the gradients of a batch. Return its mean loss and its number of correct answers, on the device."""
            state.optimiser.zero_grad(set_to_none=True)
            with execution.autocast(), execution.eager(len(inputs) != usual):
                logits = state.model(inputs)
            logits = logits.float()
            loss = F.cross_entropy(logits, targets)
            loss.backward()
            return loss.detach(), (logits.detach().argmax(1) == labels).sum()

        def recorded() -> Function:
            """Return `differentiate` as separate CUDA graphs, if they are used."""
            # A graph always sets the gradients of the same parameters.
            frozen = config.optimiser.frozen_epochs
            return differentiate if frozen else execution.graphed(differentiate, state.model.parameters())

        self._recorded, self._differentiate = recorded, recorded()
        self._statistics = batches.NORMALISATIONS[config.data.normalise]
        self.network_for_inference = execution.inference_factory(state.evaluated, self._statistics)

    def __iter__(self) -> Iterator[Metrics]:
        """Train until the last epoch or early stopping, and yield the metrics of each epoch; Diverged."""
        progress = self.state.progress
        while progress.epoch < self.config.schedule.epochs and not progress.should_stop(self.config.stopping):
            last = progress.epoch + 1 == self.config.schedule.epochs
            evaluates = last or (progress.epoch + 1) % self.config.evaluation.every == 0
            with private_randomness():
                metrics = self._train_epoch() | (self._evaluate_epoch() if evaluates else {})
            with uninterrupted():
                metrics["time/epoch_seconds"] = metrics["time/train_seconds"] + metrics.get("time/evaluate_seconds", 0)
                progress.epoch += 1
                progress.train_seconds += metrics["time/train_seconds"]
                self.state.sums = EpochSums()
                progress.history.append(metrics)
                if (watched := watched_accuracy(metrics)) is not None:
                    self.state.schedule.after_epoch(progress.epoch, watched)
                if watched is not None and watched > progress.best_accuracy:
                    progress.best_accuracy, progress.best_epoch = watched, progress.epoch
                    if self.dataset.validation is not None:
                        weights = self.state.evaluated.state_dict()
                        self.state.selected = {name: value.detach().clone() for name, value in weights.items()}
            yield metrics

    def _train_epoch(self) -> Metrics:
        """Make the remaining steps of the epoch."""
        order = self._order(self.state.progress.epoch + 1)
        batch_size, sums = self.config.optimiser.batch_size, self.state.sums
        steps = batches.batch_count(len(order), batch_size)
        check_every = 1 if self.execution.device.type == "cpu" else STEPS_BETWEEN_LOSS_CHECKS
        made = self.state.progress.step - self.state.progress.epoch * steps
        rest, device = order[made * batch_size :], self.execution.device
        self._enter(stage_of(self.config, self.state.progress.epoch + 1))
        left = batches.training_batches(self._train_split, rest, batch_size, device)
        set_modes(self.state.model, self.config.optimiser, self.state.progress.epoch + 1)
        started = time.perf_counter()
        for step, (images, labels) in enumerate(left, made + 1):
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
            **stage_metrics(self.config, self._stage),
        }

    def _enter(self, stage: Stage) -> None:
        """Enter a stage of progressive learning: set its dropout, its images, and CUDA graphs of their shape."""
        if stage == self._stage:
            return
        self._stage, self._differentiate = stage, self._recorded()
        set_dropout(self.state.model, stage.dropout)
        split = self.dataset.at_size(stage.image_size).train
        fits = split.pixels.nbytes <= self.execution.room_for_data()
        self._train_split = split.on(self.execution.device) if fits else split

    def _order(self, epoch: int) -> Tensor:
        """Return the training images of an epoch, in order. Epoch 0 precedes the training."""
        train, config = self.dataset.train, self.config
        balanced = train.labels if config.data.balance else None
        return batches.epoch_order(len(train), config.random.seed, epoch, balanced)

    def _train_step(self, images: Tensor, labels: Tensor) -> None:
        """Make one step and add its results to the sums of the epoch, without waiting for the device."""
        config, state, step, device = self.config, self.state, self.state.progress.step, self.execution.device
        seed_generators(stream_seed(config.random.seed, "augmentation", step), device)
        images = batches.augment(to_device(images, device), self._stage.augment)  # the same device, in any memory
        inputs = batches.normalised(images, self._statistics, self.execution.channels_last)
        labels = to_device(labels, device)
        outputs = config.model.outputs or len(self.dataset.classes)
        targets = batches.one_hot(labels, outputs, config.optimiser.label_smoothing)
        inputs, targets = batches.mix_samples(inputs, targets, self._stage.augment)

        seed_generators(stream_seed(config.random.seed, "dropout", step), device)
        loss, right = self._differentiate(inputs, targets, labels)
        state.schedule.before_step(step)
        if config.optimiser.clip_norm:
            nn.utils.clip_grad_norm_(state.model.parameters(), config.optimiser.clip_norm)
        state.optimiser.step()
        state.average(config.optimiser.ema_decay)
        sums = state.sums
        sums.loss, sums.right = sums.loss + loss * len(labels), sums.right + right
        sums.images += len(labels)
        state.progress.step += 1

    def _evaluate_epoch(self) -> Metrics:
        """Evaluate the test set, the validation set and, as in the post, the whole train set, in eval mode."""
        chosen = {
            "test": self.dataset.test if self.config.evaluation.test_set else None,
            "val": self.dataset.validation,
            "train": self.dataset.train if self.config.evaluation.train_set else None,
        }
        splits = {name: split for name, split in chosen.items() if split is not None}
        metrics: Metrics = {}
        started = time.perf_counter()
        frozen = norms_are_frozen(self.config.optimiser, self.state.progress.epoch + 1)
        if self.config.evaluation.batch_norm_images and not frozen:
            self._estimate_batch_norm(self.config.evaluation.batch_norm_images)
        network = self.network_for_inference()
        for name, split in splits.items():
            result = evaluate(network, split, self.config.evaluation.batch_size)
            self._must_be_finite(result.loss, name)
            metrics |= {f"{name}/{metric}": value for metric, value in epoch_metrics(result).items()}
        seconds = time.perf_counter() - started
        rate = sum(map(len, splits.values())) / seconds
        return metrics | {"time/evaluate_seconds": seconds, "throughput/evaluate_images_per_second": rate}

    @torch.no_grad()
    def _estimate_batch_norm(self, count: int) -> None:
        """Estimate the statistics of batch norm, which training never reads, from `count` training images, unaugmented.

        They are the same images each time. Everything else is in eval mode, so that nothing is drawn.
        """
        network, config = self.state.evaluated, self.config
        training, norms = network.training, [each for each in network.modules() if isinstance(each, nn.BatchNorm2d)]
        size = max(config.evaluation.batch_size, config.optimiser.batch_size)
        momenta = [norm.momentum for norm in norms]
        try:
            network.eval()
            for norm in norms:
                norm.reset_running_stats()
                norm.train().momentum = None  # every batch counts alike
            for images, _ in batches.training_batches(self.dataset.train, self._order(0)[: max(2, count)], size):
                there = to_device(images, self.execution.device)
                inputs = batches.normalised(there, self._statistics, self.execution.channels_last)
                with self.execution.autocast(), self.execution.eager(True):
                    network(inputs)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
            network.train(training)

    def _must_be_finite(self, loss: float, name: str) -> None:
        if not math.isfinite(loss):
            epoch, step, rate = self.state.progress.epoch + 1, self.state.progress.step, self.state.schedule.rate
            clip = "optimiser.clip_norm" if self.config.optimiser.clip_norm else "set optimiser.clip_norm"
            problem = f"The {name} loss is no longer a finite number at epoch {epoch}, step {step}"
            raise Diverged(f"{problem}, with a learning rate of {rate:g}; lower optimiser.lr or {clip}.")
