"""The command `search`."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from effv2.cli.options import ONE_RUN, SHARED, config_options, reports_errors, study_option, study_options
from effv2.config.options import SHORT_EPOCHS

FIELDS = ONE_RUN | SHARED


@click.command()
@click.option(
    "--trials", default="", metavar="INTEGER", help="Trials of the study in all.  [default: 12, or the study's]"
)
@study_option
@config_options(FIELDS, defaults={"epochs": SHORT_EPOCHS})
@study_options(log_model="best")
@reports_errors
def search(trials: str, study: str, **options: Any) -> None:
    """Search for the best hyper-parameters on the validation split, with Optuna; test the best once.

    Without a study file: dropout, stochastic depth and depth multiplier on scikit-learn's digits. The same command
    again resumes where the last one ended; with more trials, the search grows.
    """
    from effv2.cli.options import parse_count, take_study_options
    from effv2.config.layers import option_layer
    from effv2.studies.files import built_in_search, open_study

    how = take_study_options(options, "best")
    layer = option_layer(options, FIELDS)
    chosen = open_study(study) if study else built_in_search()
    number = parse_count("trials", trials) if trials else 0

    from effv2.cli.run import run_and_show
    from effv2.studies.search import make_search

    run_and_show(partial(make_search, chosen, layer, number), how)
