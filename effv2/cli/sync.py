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
    from effv2.errors import RunError
    from effv2.tracking.recovery import left, send_all
    from effv2.tracking.store import open_store, store_name

    if not left():
        click.echo("Nothing is waiting.")
        return
    open_store("")
    sent = send_all(click.echo)
    for store in sorted(set(sent.waiting) - {store_name()}):
        click.echo(f"Entries wait for another store: set MLFLOW_TRACKING_URI to {store} and sync again.")
    if sent.waiting:
        raise RunError(f"{len(sent.waiting)} runs still have entries in the outbox.")
    if not sent.journals:
        click.echo("Nothing is waiting but what running processes send themselves.")
