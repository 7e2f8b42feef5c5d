"""Run a study and show its end, the same for every command that runs one."""

from __future__ import annotations

from collections.abc import Callable

import click

from effv2.cli.console import ConsoleReporter, print_table
from effv2.config.options import StudyOptions
from effv2.core.errors import RunError
from effv2.studies.engine import run_study
from effv2.studies.plan import Plan, load_once
from effv2.tracking.recovery import open_experiment
from effv2.tracking.run import run_address

SHOWN_FAILURES = 5


def run_and_show(make: Callable[..., Plan], options: StudyOptions) -> None:
    """Make the plan (`make` is given `load` and `reporter`), run it, print its results and where to look."""
    with ConsoleReporter() as reporter:
        load = load_once(reporter.decoding)
        plan = make(load=load, reporter=reporter)
        end = run_study(plan, open_experiment(options.experiment, reporter.message), options, load, reporter)
    if end.results.table:
        print_table(end.results.table)
    if end.results.sentence:
        click.echo(end.results.sentence)
    for name, address in end.models.items():
        click.echo(f"model of {name}: {address}")
    click.echo(run_address(end.parent.run_id, end.parent.experiment_id))
    if end.failed:
        said = [f"{name}: {error}" for name, error in end.failed.items()]
        more = [f"And {len(said) - SHOWN_FAILURES} more."] if len(said) > SHOWN_FAILURES else []
        raise RunError(f"{len(said)} of {len(plan.trials)} runs failed. {' '.join(said[:SHOWN_FAILURES] + more)}")
