"""Run a study and show its end, the same for every command that runs one."""

from __future__ import annotations

from collections.abc import Callable

import click

from effv2.cli.console import ConsoleReporter, print_table
from effv2.config.options import StudyOptions
from effv2.core.errors import RunError
from effv2.studies.engine import run_study
from effv2.studies.plan import LoadedData, Plan
from effv2.tracking.run import open_experiment, run_address

SHOWN_FAILURES = 5


def run_and_show(make: Callable[..., Plan], options: StudyOptions) -> None:
    """Make the plan (`make` is given `load` and `message`), run it, print its table and where to look."""
    with ConsoleReporter() as reporter:
        load = LoadedData(reporter.decoding)
        plan = make(load=load, message=reporter.hint)
        ending = run_study(plan, open_experiment(options.experiment, reporter.message), options, load, reporter)
    print_table(ending.table)
    click.echo(run_address(ending.parent.run_id, ending.parent.experiment_id))
    if ending.failed:
        said = [f"{slot}: {error}" for slot, error in ending.failed.items()]
        more = [f"And {len(said) - SHOWN_FAILURES} more."] if len(said) > SHOWN_FAILURES else []
        raise RunError(f"{len(said)} of {len(plan.slots)} runs failed. {' '.join(said[:SHOWN_FAILURES] + more)}")
