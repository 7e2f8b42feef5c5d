"""The command `sync`."""

from __future__ import annotations

import click

from effv2.cli.options import reports_errors


@click.command()
@reports_errors
def sync() -> None:
    """Send what runs logged while the tracking store was away, after their processes ended.

    Every other command does so too when it begins. Exit code 1 if something still waits.
    """
    from effv2.core.errors import RunError
    from effv2.tracking.recovery import left, send_all
    from effv2.tracking.store import check_store

    if not left():
        click.echo("Nothing is waiting.")
        return
    check_store()
    ends = send_all(click.echo)
    for store in sorted({each.store for each in ends} - {""}):
        click.echo(f"Entries wait for another store: set MLFLOW_TRACKING_URI to {store} and sync again.")
    undone = sum(each.end in ("refused", "waits") for each in ends)
    if undone:
        raise RunError(f"The entries of {undone} runs were not sent, or not all of them.")
    if all(each.end == "busy" for each in ends):
        click.echo("Nothing is waiting but what running processes send themselves.")
