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
    from pathlib import Path

    from effv2.studies.files import read_study
    from effv2.studies.settings import build_config, option_layer

    saving = take_saving(options)
    layer = option_layer(options, ONE_RUN | SHARED)
    which, over = parse_log_model(log_model, "all"), parse_fresh(fresh)
    file = read_study(Path(study)) if study else None
    config = file.config(layer) if file else build_config([layer])

    from effv2.cli.display import ConsoleDisplay
    from effv2.data.dataset import load_dataset
    from effv2.errors import RunError
    from effv2.execution.resolve import place, resolve
    from effv2.experiment import Labels, check, discard_checkpoints, identity, run_experiment
    from effv2.tracking.read import find_ended_early, find_finished, find_outdated
    from effv2.tracking.recovery import open_experiment
    from effv2.tracking.run import TrackedRun, point_adopted_run_to, run_address
    from effv2.tracking.store import TrackingError, reason

    name = file.name if file else f"{config.model.variant}, seed {config.random.seed}"
    with ConsoleDisplay() as display:
        config = place(config)
        dataset = load_dataset(config.data, display.decoding)
        check(config, dataset)
        config = resolve(config, display.hint)
        try:
            experiment_id = open_experiment(experiment, display.remark)
            wanted = identity(config, dataset)
            done = None if over else find_finished(wanted, experiment_id)
            if done is not None:
                run, last, model = TrackedRun(done.run_id, experiment_id), done.metrics, ""
                point_adopted_run_to(run)
                discard_checkpoints(run.run_id, saving)
                click.echo("Finished before, with the same configuration, data and code; --fresh repeats it.")
            else:
                left = None if over else find_ended_early(wanted, experiment_id)
                if left is not None:
                    point_adopted_run_to(TrackedRun(left.run_id, experiment_id))
                elif not over and (outdated := find_outdated(wanted, experiment_id)) is not None:
                    display.remark("The run {} that ended early can't be gone on with: {}.".format(*outdated))
                labels = Labels(name, experiment_id, file.name if file else "", continues=left.run_id if left else "")
                outcome = run_experiment(config, dataset, labels, display, which != "none", saving=saving)
                run, last, model = outcome.run, outcome.summary, outcome.model_address
        except TrackingError as error:
            raise RunError(f"The tracking store failed ({reason(error)}); mend it and try again.") from error
    if "best/test_accuracy" in last:
        click.echo(
            f"test accuracy {last['selected/test_accuracy']:.2%} at the selected epoch "
            f"{last['selected/epoch']:.0f}, best {last['best/test_accuracy']:.2%}"
        )
    if model:
        click.echo(f"model {model}")
    click.echo(run_address(run.run_id, run.experiment_id))
