"""The command `ablate`."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from effv2.cli.options import SHARED, config_options, reports_errors, seeds_option, study_option, study_options


@click.command()
@click.option(
    "--variant",
    default="all",
    metavar="NAME",
    help="The arm to train beside its baseline, or all: mbconv_only, fused_only, half_layers, drop_one, "
    "another variant that has a name, or what the study file names.  [default: all]",
)
@study_option
@seeds_option
@config_options(SHARED)
@study_options(log_model="all")
@reports_errors
def ablate(variant: str, study: str, seeds: str, **options: Any) -> None:
    """Train architecture variants beside their baseline and compare them in MLflow.

    Without a study file: the five published variants of EfficientNetV2-S under one short protocol on
    scikit-learn's digits. The same command again resumes where the last one ended.
    """
    from effv2.cli.options import parse_seeds, take_study_options
    from effv2.config.layers import option_layer
    from effv2.studies.files import built_in_ablation, open_study

    how = take_study_options(options, "all")
    layer, wanted = option_layer(options, SHARED), parse_seeds(seeds)
    chosen = open_study(study) if study else built_in_ablation(variant or "all")
    names = chosen.select(variant or "all")

    from effv2.cli.run import run_and_show
    from effv2.studies.grid import make_grid

    run_and_show(partial(make_grid, "ablate", chosen, names, layer, seeds=wanted), how)
