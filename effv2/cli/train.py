"""The command `train`."""

from __future__ import annotations

import click

from effv2.cli.options import (
    ONE_RUN,
    SHARED,
    config_options,
    experiment_option,
    log_model_option,
    parse_log_model,
    reports_errors,
    study_option,
)


@click.command()
@study_option
@config_options(ONE_RUN | SHARED)
@log_model_option
@experiment_option
@reports_errors
def train(study: str, log_model: str, experiment: str, **options: str | None) -> None:
    """Train one EfficientNetV2 and track it in MLflow.

    Without options: the default variant on scikit-learn's digits, a minute on two cores.
    """
    from pathlib import Path

    from effv2.studies.files import read_study
    from effv2.studies.settings import build_config, option_layer

    layer = option_layer(options, ONE_RUN | SHARED)
    which = parse_log_model(log_model)
    file = read_study(Path(study)) if study else None
    config = file.config(layer) if file else build_config([layer])

    from effv2.cli.display import ConsoleDisplay
    from effv2.experiment import Labels, run_experiment
    from effv2.studies.ablation import prepare
    from effv2.studies.files import Arm
    from effv2.tracking.run import run_address
    from effv2.tracking.store import open_store

    name = file.name if file else f"{config.model.variant}, seed {config.random.seed}"
    with ConsoleDisplay() as display:
        (run,) = prepare([Arm(name, config)], display.decoding)
        labels = Labels(name, open_store(experiment), file.name if file else "")
        outcome = run_experiment(run.arm.config, run.dataset, labels, display, which != "none")
    last = outcome.summary
    click.echo(
        f"test accuracy {last['selected/test_accuracy']:.2%} at the selected epoch "
        f"{last['selected/epoch']:.0f}, best {last['best/test_accuracy']:.2%}"
    )
    if outcome.model_address:
        click.echo(f"model {outcome.model_address}")
    click.echo(run_address(outcome.run.run_id, outcome.run.experiment_id))
