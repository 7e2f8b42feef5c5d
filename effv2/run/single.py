"""A run of its own, from its settings to its end: what `train` does."""

from __future__ import annotations

from effv2.config.options import StudyOptions
from effv2.config.schema import TrainConfig
from effv2.core.reporter import Reporter
from effv2.data.dataset import load_dataset
from effv2.execution.resolve import resolve, with_device
from effv2.run.resume import Attempt, attempt
from effv2.run.run import check
from effv2.run.spec import RunSpec
from effv2.tracking.run import open_experiment
from effv2.tracking.store import tracking_faults


def train_single(config: TrainConfig, name: str, study: str, options: StudyOptions, reporter: Reporter) -> Attempt:
    """Find the run of `config` finished, resume it, or train it. InputError before any run is created."""
    config = with_device(config)
    dataset = load_dataset(config.data, reporter.decoding)
    check(config, dataset)
    config = resolve(config, reporter.hint)
    with tracking_faults():
        spec = RunSpec(
            name,
            open_experiment(options.experiment),
            study,
            log_model=options.log_model != "none",
            checkpoints=options,
            fresh=options.fresh,
            reporter=reporter,
        )
        return attempt(config, dataset, spec)
