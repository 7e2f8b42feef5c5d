"""The command `report`."""

from __future__ import annotations

import click

from effv2.cli.options import experiment_option, reports_errors


@click.command()
@click.option(
    "--export",
    default="",
    metavar="FOLDER",
    help="Also write the report there, with its data as CSV and a manifest of their hashes.",
)
@click.option(
    "--from-export",
    default="",
    metavar="LIST",
    help="Read these exports, folders separated by commas, as one, instead of the tracking server; a run in several is "
    "that of the last. Needs --export for another folder.",
)
@click.option("--claims", default="", metavar="FILE", help="Claims of your own (YAML), beside the published ones.")
@experiment_option
@reports_errors
def report(export: str, from_export: str, claims: str, experiment: str) -> None:
    """Judge every published claim on the runs of an experiment, and show its studies beside them.

    One page (HTML, and Markdown) is logged to the run of every study that it covers. It needs no network to be read.
    """
    from effv2.core.errors import InputError
    from effv2.core.paths import expanded

    own = expanded(claims) if claims else None
    target = expanded(export or ".").resolve()
    sources = [expanded(word.strip()).resolve() for word in from_export.split(",") if word.strip()]
    if from_export and not sources:
        raise InputError(f"--from-export {from_export}: names no folder; give some, separated by commas.")
    if sources and (not export or target in sources):
        raise InputError(f"--from-export {from_export}: say with --export where the report is to go, another folder.")

    from effv2.cli.console import ConsoleReporter
    from effv2.evidence.publication import publish, rebuild

    with ConsoleReporter() as reporter:
        if sources:
            made = rebuild(sources, own, target, reporter)
        else:
            made, address = publish(experiment, own, target if export else None, reporter)
    for line in (*made.own, made.summary):
        click.echo(line)
    if not sources:
        click.echo(address)
    if export:
        click.echo(target / "report.html")
