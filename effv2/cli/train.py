"""The command `train`."""

from __future__ import annotations

import click

from effv2.cli.options import (
    ONE_RUN,
    SHARED,
    config_options,
    experiment_option,
    fresh_option,
    log_model_option,
    parse_fresh,
    parse_log_model,
    reports_errors,
    saving_options,
    study_option,
    take_saving,
)


@click.command()
@study_option
@config_options(ONE_RUN | SHARED)
@saving_options
@fresh_option
@log_model_option("all")
@experiment_option
@reports_errors
def train(study: str, fresh: str, log_model: str, experiment: str, **options: str | None) -> None:
    """Train one EfficientNetV2 and track it in MLflow.

    Without options: the default variant on scikit-learn's digits, a minute on two cores.
    """
    from effv2.config.layers import build_config, option_layer
    from effv2.studies.files import open_study

    saving = take_saving(options)
    layer = option_layer(options, ONE_RUN | SHARED)
    which, over = parse_log_model(log_model, "all"), parse_fresh(fresh)
    file = open_study(study) if study else None
    config = file.config(layer) if file else build_config([layer])

    from effv2.cli.console import ConsoleReporter
    from effv2.core.errors import RunError
    from effv2.data.dataset import load_dataset
    from effv2.execution.resolve import place, resolve
    from effv2.run.labels import Labels
    from effv2.run.resume import Task, attempt
    from effv2.run.run import check
    from effv2.tracking.recovery import open_experiment
    from effv2.tracking.run import run_address
    from effv2.tracking.store import TrackingError, reason

    name = file.name if file else f"{config.model.variant}, seed {config.random.seed}"
    with ConsoleReporter() as reporter:
        config = place(config)
        dataset = load_dataset(config.data, reporter.decoding)
        check(config, dataset)
        config = resolve(config, reporter.hint)
        try:
            labels = Labels(name, open_experiment(experiment, reporter.message), file.name if file else "")
            ended = attempt(config, dataset, Task(labels, reporter, which != "none", saving, over))
        except TrackingError as error:
            raise RunError(f"The tracking store failed ({reason(error)}); mend it.", resumes=True) from error
    if ended.was_finished:
        without = ", but without a model" if which != "none" and not ended.model_address else ""
        click.echo(f"Finished before, with the same configuration, data and code{without}; --fresh repeats it.")
    if "best/test_accuracy" in ended.metrics:
        click.echo(
            f"test accuracy {ended.metrics['selected/test_accuracy']:.2%} at the selected epoch "
            f"{ended.metrics['selected/epoch']:.0f}, best {ended.metrics['best/test_accuracy']:.2%}"
        )
    if ended.model_address:
        click.echo(f"model {ended.model_address}")
    click.echo(run_address(ended.run.run_id, ended.run.experiment_id))
