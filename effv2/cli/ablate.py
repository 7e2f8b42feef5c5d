"""The command `ablate`."""

from __future__ import annotations

import click

from effv2.cli.options import (
    SHARED,
    config_options,
    experiment_option,
    log_model_option,
    parse_log_model,
    parse_seeds,
    reports_errors,
    study_option,
)


@click.command()
@click.option(
    "--variant",
    default="all",
    metavar="NAME",
    help="The arm to train beside its baseline, or all: mbconv_only, fused_only, half_layers, drop_one, "
    "or what the study file names.  [default: all]",
)
@study_option
@click.option("--seeds", default="", metavar="LIST", help="Seeds of every arm, as 0,1,2.  [default: 0, or the study's]")
@config_options(SHARED)
@log_model_option
@experiment_option
@reports_errors
def ablate(variant: str, study: str, seeds: str, log_model: str, experiment: str, **options: str | None) -> None:
    """Train architecture variants beside their baseline and compare them in MLflow.

    Without a study file: the five published variants of EfficientNetV2-S under one short protocol on
    scikit-learn's digits.
    """
    from pathlib import Path

    from effv2.studies.files import built_in_ablation, read_study
    from effv2.studies.settings import option_layer

    which = parse_log_model(log_model)
    chosen = read_study(Path(study)) if study else built_in_ablation()
    arms = chosen.select(variant or "all", option_layer(options, SHARED), parse_seeds(seeds))

    from effv2.cli.display import ConsoleDisplay, print_comparison
    from effv2.studies.ablation import prepare, run_ablation
    from effv2.tracking.run import run_address
    from effv2.tracking.store import open_store

    with ConsoleDisplay() as display:
        prepared = prepare(arms, display.decoding)
        experiment_id = open_store(experiment)
        parent, comparison = run_ablation(chosen, prepared, experiment_id, which, display)
    print_comparison(comparison)
    click.echo(run_address(parent.run_id, parent.experiment_id))
