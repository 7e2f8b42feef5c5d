"""The console script `effv2` and its commands. They import large packages late, so that `--help` is fast."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from effv2 import __version__
from effv2.api import calls
from effv2.api.console import ConsoleReporter, print_table
from effv2.cli import options as cli
from effv2.config.layers import Written, build
from effv2.config.options import DATA, Taken
from effv2.config.schema import TrainConfig
from effv2.core.errors import InputError, RunError

if TYPE_CHECKING:
    from PIL.Image import Image

    from effv2.api.results import Result

CHECKED = Taken(settings=DATA, defaults={"dataset": "folder"})
if sys.version_info < (3, 14):  # since then, triton would list its objects as leaked
    atexit.register(gc.freeze)  # saves a second at the end of a command, by not searching modules for garbage


@click.group()
@click.version_option(__version__)
def main() -> None:
    """Train, ablate and compare EfficientNetV2 on small images, tracked in MLflow."""


def _command(call: calls.Call) -> click.Command:
    """Make the command of a function of the API. The command shows the result."""

    def command(**given: Any) -> None:
        named = partial(cli.in_options, command=click.get_current_context().command, settings=False)
        with ConsoleReporter(named) as reporter:
            result = call(**given, reporter=reporter)
        _show(result)

    name = call.function.__name__.replace("_", "-")
    made = click.command(name, cls=cli.Command, help=call.help, taken=call.taken)(command)
    main.add_command(made)
    return made


def _show(result: Result) -> None:
    """Print a result and where to see it; RunError if runs of a study failed."""
    command = click.get_current_context().command
    for line in result.answers:
        click.echo(cli.in_options(line, command, settings=False))
    print_table(result.table)
    for line in filter(None, (*result.notes, result.address)):
        click.echo(line)
    if result.trouble:
        raise RunError(result.trouble)


train = _command(calls.train)
ablate = _command(calls.ablate)
hparam_check = _command(calls.hparam_check)
search = _command(calls.search)
evaluate_pretrained = _command(calls.evaluate_pretrained)
report = _command(calls.report)


@main.command(cls=cli.Command)
@click.argument("model")
@click.argument("folder")
def export(model: str, folder: str) -> None:
    """Write a logged MODEL in ONNX format to a new FOLDER, which MLflow can serve without torch.

    MODEL is its address: runs:/ID, models:/ID or models:/NAME@ALIAS. Needs pip install 'effv2[onnx]'.
    """
    from effv2.tracking.models import export_onnx

    export_onnx(model, target := Path(os.path.expanduser(folder)).absolute())
    click.echo(f"{target}/artifacts/model.onnx is the network")
    click.echo(f"serve it with: mlflow models serve --model-uri {target} --env-manager local")


@main.command(cls=cli.Command, taken=Taken(more=("experiment",)))
@click.option("--port", default=5000, show_default=True, type=click.IntRange(1, 65535), help="The port to serve on.")
def ui(port: int, experiment: str | None) -> None:
    """Open MLflow's UI for the current store, at the newest finished run or its study. Ctrl-C ends it.

    Without a browser on this machine, it only prints the address.
    """
    from effv2.tracking.ui import open_ui

    open_ui(experiment or "", port, click.echo, browse=sys.stdout.isatty())


@main.group()
def data() -> None:
    """Check data sets before training."""


@data.command("check", cls=cli.Command, taken=CHECKED)
@click.argument("folder", default="")
@click.option("--sheet", metavar="FILE", help="Write some images of each class here, as the network sees them.")
def data_check(folder: str, sheet: str | None, **options: Any) -> None:
    """Report the content of the data set in FOLDER, broken images and duplicates.

    The exit code is 1 if training would fail, learn two labels for one image, or test on an identical training image.
    """
    given = {name: value for name, value in options.items() if value}
    if folder and "data_dir" in given:
        raise InputError("data_dir", given["data_dir"], f"the folder {folder} is given too", "name one of them")
    given = ({"data_dir": folder} if folder else {}) | given
    own = {"data.dataset": Written("folder")} if "data_dir" in given else {}
    config = build(TrainConfig, own | CHECKED.read(given)[0]).data

    from effv2.data.dataset import load_dataset
    from effv2.data.inspection import check, contact_sheet

    fault = ""
    with ConsoleReporter() as reporter:
        found = check(config, partial(reporter.progress, "decoding images"))
        try:
            dataset = load_dataset(config, partial(reporter.progress, "decoding images"))
        except InputError as error:
            fault = f"Training would fail: {error}"
        else:
            if sheet:
                _write_sheet(contact_sheet(dataset), sheet)
    print_table(found.table())
    remedy, command = found.remedy(config.skip_broken), click.get_current_context().command
    advice = fault or f"Train on it: {calls.command_line('train', {'dataset': config.dataset, **given})}"
    summary = [] if fault else [f"Training would use: {dataset.summary.removeprefix('Data: ')}"]
    shown = f"Images of each class, as the network sees them: {sheet}"
    written = ["No sheet was written, since training would fail." if fault else shown] if sheet else []
    last = f"First {remedy}; then check again." if remedy else advice
    for sentence in (*found.sentences(), *summary, *written, last):
        click.echo(cli.in_options(sentence, command))
    sys.exit(int(bool(remedy or fault)))


def _write_sheet(sheet: Image, path: str) -> None:
    try:
        sheet.save(os.path.expanduser(path))
    except (OSError, ValueError) as error:  # the latter for an unknown extension
        problem = f"can't be written ({error})"
        raise InputError("sheet", path, problem, "give the path of a .png or .jpg file") from error


@main.command(cls=cli.Command)
@click.argument("model")
@click.option("--name", metavar="NAME", required=True, help="Name of the model in MLflow's registry.")
@click.option("--max-milliseconds", type=float, help="Refuse a model that takes longer for one image.")
@click.option("--max-megabytes", type=float, help="Refuse a model whose files are larger (MB, 10^6 bytes).")
@click.option("--dry-run", is_flag=True, help="Print what would happen. Change nothing.")
def promote(model: str, name: str, dry_run: bool, **limits: float | None) -> None:
    """Register MODEL and make it the champion, if it is better than the current champion.

    MODEL is models:/ID, or runs:/ID of the run that logged it. The better model classifies more of the same test images
    correctly, by McNemar's exact test. The first model has no rival. A refused model isn't registered: exit code 1.
    """
    from effv2.evidence.promotion import promote as decide

    decision = decide(model, name, dry_run=dry_run, **limits)
    print_table(decision.table)
    if decision.verdict == "refused":
        raise RunError(decision.reason)
    click.echo(decision.reason)
    if decision.verdict == "promoted":
        serve = f"It is served by: mlflow models serve --model-uri models:/{name}@champion --env-manager local"
        click.echo("This was a dry run, so nothing was changed." if dry_run else serve)
