"""The run of the command `train`: found finished, gone on with where it ended early, or begun."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from effv2.config.options import CheckpointOptions
from effv2.config.schema import TrainConfig
from effv2.core.reporter import Reporter
from effv2.data.dataset import Dataset
from effv2.run.labels import Labels, identity
from effv2.run.run import discard_checkpoints, run_experiment
from effv2.tracking.read import find_ended_early, find_finished, find_outdated
from effv2.tracking.run import TrackedRun, point_adopted_run_to


@dataclass(frozen=True)
class TrainedOnce:
    """A finished run and its last metrics; `model_address` is empty where it has no model."""

    run: TrackedRun
    metrics: Mapping[str, float]
    model_address: str = ""
    was_finished: bool = False  # by an earlier command: nothing was trained


def train_once(
    config: TrainConfig,
    dataset: Dataset,
    labels: Labels,
    reporter: Reporter,
    log_model: bool,
    *,
    saving: CheckpointOptions,
    fresh: bool,
) -> TrainedOnce:
    """Return the finished run of this identity; where there is none, or with `fresh`, train it.

    One that ended early goes on, unless it had begun before another was finished; one that can't, since data or code
    have changed, is named.
    """
    wanted = identity(config, dataset)
    done = None if fresh else find_finished(wanted, labels.experiment_id)
    left = None if fresh else find_ended_early(wanted, labels.experiment_id, done)
    if done is not None and left is None:
        run = TrackedRun(done.run_id, labels.experiment_id)
        point_adopted_run_to(run)
        discard_checkpoints(run.run_id, saving)
        return TrainedOnce(run, done.metrics, run.model_address(), was_finished=True)
    if left is not None:
        point_adopted_run_to(TrackedRun(left.run_id, labels.experiment_id))
        labels = replace(labels, continues=left.run_id)
    elif not fresh and (outdated := find_outdated(wanted, labels.experiment_id)) is not None:
        reporter.message("The run {} that ended early can't be gone on with: {}.".format(*outdated))
    outcome = run_experiment(config, dataset, labels, reporter, log_model, saving=saving)
    return TrainedOnce(outcome.run, outcome.summary, outcome.model_address)
