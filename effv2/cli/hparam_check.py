"""The command `hparam-check`."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from effv2.cli.options import SHARED, config_options, reports_errors, seeds_option, study_option, study_options
from effv2.config.options import SHORT_EPOCHS

FIELDS = {name: field for name, field in SHARED.items() if name != "scheduler"}
SCHEDULERS = ("both", "plateau", "none")


@click.command("hparam-check")
@click.option(
    "--check",
    default="all",
    metavar="NAME",
    help="The change to train beside the default, or all: depth (depth multiplier 0.1), half_layers, dropout (0.6), "
    "stochastic_depth (0.5), or what the study file names.  [default: all]",
)
@click.option(
    "--scheduler",
    default="both",
    metavar="[both|plateau|none]",
    help="With ReduceLROnPlateau, without, or both.  [default: both]",
)
@study_option
@seeds_option
@config_options(FIELDS, defaults={"epochs": SHORT_EPOCHS})
@study_options(log_model="best")
@reports_errors
def hparam_check(check: str, scheduler: str, study: str, seeds: str, **options: Any) -> None:
    """Change one hyper-parameter at a time, with and without ReduceLROnPlateau, and compare in MLflow.

    Without a study: hparam-digits, the published check shortened to three epochs a run on scikit-learn's digits; the
    full protocols are the studies hparam-*. The same command again resumes where the last one ended.
    """
    from effv2.cli.options import parse_seeds, take_study_options
    from effv2.config.layers import option_layer
    from effv2.core.errors import InputError
    from effv2.studies.files import open_study

    schedule = scheduler or "both"
    if schedule not in SCHEDULERS:
        raise InputError(f"--scheduler {scheduler}: no such choice; use both, plateau or none.")
    how = take_study_options(options, "best")
    layer, wanted = option_layer(options, FIELDS), parse_seeds(seeds)
    chosen = open_study(study or "hparam-digits").with_plateau()
    names = chosen.select_checks(check or "all", schedule)

    from effv2.cli.run import run_and_show
    from effv2.studies.grid import make_grid

    run_and_show(partial(make_grid, "hparam-check", chosen, names, layer, seeds=wanted), how)
