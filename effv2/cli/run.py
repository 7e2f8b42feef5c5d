"""Run a study and show its end, the same for every command that runs one."""

from __future__ import annotations

from collections.abc import Callable

import click

from effv2.cli.display import ConsoleDisplay, print_table
from effv2.errors import RunError
from effv2.studies.engine import run_study
from effv2.studies.options import StudyOptions
from effv2.studies.plan import LoadedData, Plan
from effv2.tracking.recovery import open_experiment
from effv2.tracking.run import run_address

SHOWN_FAILURES = 5


def run_and_show(make: Callable[..., Plan], options: StudyOptions) -> None:
    """Make the plan (`make` is given `load` and `remark`), run it, print its table and where to look."""
    with ConsoleDisplay() as display:
        load = LoadedData(display.decoding)
        plan = make(load=load, remark=display.hint)
        ending = run_study(plan, open_experiment(options.experiment, display.remark), options, load, display)
    print_table(ending.table)
    click.echo(run_address(ending.parent.run_id, ending.parent.experiment_id))
    if ending.failed:
        said = [f"{slot}: {error}" for slot, error in ending.failed.items()]
        more = [f"And {len(said) - SHOWN_FAILURES} more."] if len(said) > SHOWN_FAILURES else []
        raise RunError(f"{len(said)} of {len(plan.slots)} runs failed. {' '.join(said[:SHOWN_FAILURES] + more)}")
