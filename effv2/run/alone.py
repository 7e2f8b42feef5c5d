"""The run of the command `train`: found finished, gone on with where it ended early, or begun."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from effv2.config.options import CheckpointOptions
from effv2.config.schema import TrainConfig
from effv2.core.reporter import Reporter
from effv2.data.dataset import Dataset
from effv2.run.run import discard_checkpoints, train_run
from effv2.run.spec import RunSpec, identity
from effv2.tracking.models import model_address
from effv2.tracking.read import find_ended_early, find_finished, find_outdated
from effv2.tracking.run import point_adopted_run_to
from effv2.tracking.writer import TrackedRun


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
    labels: RunSpec,
    reporter: Reporter,
    log_model: bool,
    *,
    checkpoints: CheckpointOptions,
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
        discard_checkpoints(run.run_id, checkpoints)
        return TrainedOnce(run, done.metrics, model_address(run.run_id), was_finished=True)
    if left is not None:
        point_adopted_run_to(TrackedRun(left.run_id, labels.experiment_id))
        labels = replace(labels, resumes=left.run_id)
    elif not fresh and (outdated := find_outdated(wanted, labels.experiment_id)) is not None:
        reporter.message("The run {} that ended early can't be resumed: {}.".format(*outdated))
    outcome = train_run(config, dataset, labels, reporter, log_model=log_model, checkpoints=checkpoints)
    return TrainedOnce(outcome.run, outcome.summary, outcome.model_address)
