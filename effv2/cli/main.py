"""The console script `effv2` and its commands, which import what is heavy late: `--help` is answered at once."""

import atexit
import gc
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import click

from effv2 import __version__
from effv2.architecture import VARIANTS
from effv2.cli import options as cli
from effv2.config.layers import Layer, Written, build
from effv2.config.options import StudyOptions
from effv2.config.schema import TrainConfig
from effv2.config.studies import SWEEPS, Study, open_study
from effv2.core.errors import InputError, RunError, listed
from effv2.pretrained.config import PretrainedConfig

WITHOUT_SCHEDULER = {name: setting for name, setting in cli.SHARED.items() if name != "scheduler"}
EVALUATION = cli.options_for(" ".join(PretrainedConfig().flat()))
PUBLISHED_COMPARISON = "efficientnet_v2_s,efficientnet_b0,resnet50"
SHOWN_FAILURES = 5
SHORT_EPOCHS = 3  # in the studies that hparam-check and search run without one
atexit.register(gc.freeze)  # so that the end of a command looks for no garbage in all that was imported: a second


@click.group()
@click.version_option(__version__)
def main() -> None:
    """Train, ablate and compare EfficientNetV2 on small images, tracked in MLflow."""


@main.command(cls=cli.Command)
@cli.study_option
@cli.set_option
@cli.takes(cli.ONE_RUN, *cli.CHECKPOINTS, *cli.LOGGING)
def train(study: str | None, layer: Layer, how: StudyOptions) -> None:
    """Train one EfficientNetV2 and track it in MLflow.

    Without options: the default variant on scikit-learn's digits, a minute on two cores.
    """
    file = open_study(study) if study else None
    config = file.config(layer) if file else build(TrainConfig, layer)

    from effv2.cli.console import ConsoleReporter
    from effv2.run.run import train_single
    from effv2.tracking.writer import run_address

    name = file.name if file else f"{config.model.variant}, seed {config.random.seed}"
    with ConsoleReporter() as reporter:
        ended = train_single(config, name, file.name if file else "", how, reporter)
    if ended.was_finished:
        without = ", but without a model" if how.log_model != "none" and not ended.model_address else ""
        click.echo(f"Finished before, with the same configuration, data and code{without}; --fresh repeats it.")
    if "best/test_accuracy" in ended.metrics:
        click.echo(
            f"test accuracy {ended.metrics['selected/test_accuracy']:.2%} at the selected epoch "
            f"{ended.metrics['selected/epoch']:.0f}, best {ended.metrics['best/test_accuracy']:.2%}"
        )
    if ended.model_address:
        click.echo(f"model {ended.model_address}")
    click.echo(run_address(ended.run.run_id, ended.run.experiment_id))


@main.command(cls=cli.Command)
@cli.option(
    "variant",
    f"The variant to train beside the baseline: {', '.join(VARIANTS)}, or what the study file calls its arms; or all "
    "arms.  [default: all]",
)
@cli.study_option
@cli.set_option
@cli.takes(cli.SHARED, *cli.GRID)
def ablate(variant: str | None, study: str | None, layer: Layer, how: StudyOptions) -> None:
    """Train architecture variants beside their baseline and compare them in MLflow.

    Without a study file: the five published variants of EfficientNetV2-S under one short protocol on
    scikit-learn's digits. The same command again resumes where the last one ended.
    """
    chosen = open_study(study or f"{SWEEPS}/ablate.yaml").with_variant(variant or "all")
    _run_or_plan("ablate", chosen, chosen.select(variant or "all"), layer, how)


@main.command("hparam-check", cls=cli.Command)
@cli.option(
    "check",
    "The change to train beside the default, or all: depth (depth multiplier 0.1), half_layers, dropout (0.6), "
    "stochastic_depth (0.5), or what the study file names.  [default: all]",
)
@cli.option("scheduler", "With ReduceLROnPlateau, without, or both.  [default: both]", "[both|plateau|none]")
@cli.study_option
@cli.set_option
@cli.takes(WITHOUT_SCHEDULER, *cli.GRID, epochs=SHORT_EPOCHS, log_model="best")
def hparam_check(check: str | None, scheduler: str | None, study: str | None, layer: Layer, how: StudyOptions) -> None:
    """Change one hyper-parameter at a time, with and without ReduceLROnPlateau, and compare in MLflow.

    Without a study: hparam-digits, the published check shortened to three epochs a run on scikit-learn's digits; the
    full protocols are the studies hparam-*. The same command again resumes where the last one ended.
    """
    chosen = open_study(study or f"{SWEEPS}/hparam-digits.yaml").with_plateau()
    _run_or_plan("hparam-check", chosen, chosen.select_checks(check or "all", scheduler or "both"), layer, how)


@main.command(cls=cli.Command)
@cli.study_option
@cli.set_option
@cli.takes(cli.ONE_RUN, "trials", *cli.STUDY, epochs=SHORT_EPOCHS, log_model="best")
def search(study: str | None, layer: Layer, how: StudyOptions) -> None:
    """Search for the best hyper-parameters on the validation split, with Optuna; test the best once.

    Without a study file: dropout, stochastic depth and depth multiplier on scikit-learn's digits. The same command
    again resumes where the last one ended; with more trials, the search grows.
    """
    chosen = open_study(study or f"{SWEEPS}/search.yaml")

    from effv2.studies.plan import make_search

    _run_and_show(partial(make_search, chosen, layer, how.trials or 0), how)


def _path(text: str | None) -> Path | None:
    """Return the path that an option gave, if any. `~` is expanded where the system knows that user."""
    return Path(os.path.expanduser(text)) if text else None


def _run_or_plan(kind: str, study: Study, arms: list[str], layer: Layer, options: StudyOptions) -> None:
    """Run a grid and show its results; where a plan alone is asked for, print what it would take and find."""
    from effv2.studies.grid import make_grid

    make = partial(make_grid, kind, study, arms, layer, options)
    if not options.plan:
        _run_and_show(make, options)
        return

    from effv2.cli.console import ConsoleReporter, print_table
    from effv2.data.dataset import load_once
    from effv2.studies.forecast import forecast
    from effv2.tracking.store import is_begun, open_store

    with ConsoleReporter() as reporter:
        load = load_once(reporter)
        plan, there = make(load=load, reporter=reporter), None
        with suppress(InputError):  # an experiment that isn't there is not created for it
            there = open_store(options.experiment, create=False) if is_begun() else None
        lines, table = forecast(plan, options, load, there)
    click.echo("\n".join(lines))
    print_table(table)


def _run_and_show(make: Callable[..., Any], options: StudyOptions) -> None:
    """Make the plan of a study (`make` takes `load` and `reporter`), run it, print its results and where to look."""
    from effv2.cli.console import ConsoleReporter, print_table
    from effv2.data.dataset import load_once
    from effv2.studies.engine import run_study
    from effv2.studies.storage import check_storage
    from effv2.tracking.run import open_experiment
    from effv2.tracking.writer import run_address

    with ConsoleReporter() as reporter:
        plan = make(load=(load := load_once(reporter)), reporter=reporter)
        check_storage(options.storage)  # before an experiment is created
        experiment_id = open_experiment(options.experiment, reporter.message)
        end = run_study(plan, experiment_id, options, load, reporter)
    for answer in end.results.answers:
        click.echo(answer)
    print_table(end.results.table)
    models = [f"model of {name}: {address}" for name, address in end.models.items()]
    for line in (*end.results.warnings, *models, run_address(end.parent.run_id, end.parent.experiment_id)):
        click.echo(line)
    if end.failed or end.in_vain:
        failures = [f"{name}: {error}" for name, error in end.failed.items()]
        shown = listed(failures, SHOWN_FAILURES)
        nothing = "No trial of the search was completed: " if end.in_vain else ""
        raise RunError(f"{nothing}{len(failures)} of {end.planned} runs failed. {shown}")


@main.command("evaluate-pretrained", cls=cli.Command)
@cli.option(
    "models",
    "Classification networks of torchvision, separated by commas: resnet50 with its default weights, "
    "resnet50:IMAGENET1K_V1 with others, resnet50=FILE with a state dict of your own, which isn't verified; "
    "mine=runs:/ID or mine=models:/ID with the model of a training. Heads may be of the data's own classes.  "
    f"[default: {PUBLISHED_COMPARISON}]",
    "LIST",
)
@cli.option(
    "weights-dir",
    "Folder with published files of weights, looked into before torchvision's cache and its download.",
    "FOLDER",
)
@cli.takes(EVALUATION, *cli.QUEUE, *cli.LOGGING, config=PretrainedConfig, log_model="none")
def evaluate_pretrained(models: str | None, weights_dir: str | None, layer: Layer, how: StudyOptions) -> None:
    """Evaluate published ImageNet weights, each with its own transforms, and say which are really better.

    On Imagenette, or any folder whose classes are ImageNet's. Rankings rest on images that the weights were not fitted
    to. The same command again resumes where the last one ended.
    """
    config = build(PretrainedConfig, layer)

    from effv2.studies.plan import make_weights

    make = partial(make_weights, models or PUBLISHED_COMPARISON, config, _path(weights_dir))
    _run_and_show(partial(make, progress=sys.stderr.isatty()), how)


@main.command(cls=cli.Command)
@click.argument("model")
@click.argument("folder")
def export(model: str, folder: str) -> None:
    """Write the ONNX form of a logged MODEL to a new FOLDER, which MLflow serves without torch.

    MODEL is its address: runs:/ID, models:/ID or models:/NAME@ALIAS. Needs pip install 'effv2[onnx]'.
    """
    from effv2.tracking.models import export_onnx

    export_onnx(model, target := (_path(folder) or Path()).absolute())
    click.echo(f"{target}/artifacts/model.onnx is the network")
    click.echo(f"serve it with: mlflow models serve --model-uri {target} --env-manager local")


@main.group()
def data() -> None:
    """Look at data sets before anything is trained."""


@data.command(cls=cli.Command)
@click.argument("folder", default="")
@cli.option("sheet", "Write a few images of each class there, as they enter the network.", "FILE")
@cli.takes({name: setting for name, setting in cli.DATA.items() if name != "data_dir"}, dataset="folder")
def check(folder: str, sheet: str | None, layer: Layer, how: StudyOptions) -> None:
    """Say what the data set in FOLDER holds, what in it is broken, and what is there more than once.

    The exit code is 1 where trainings would fail, learn two labels of one image, or test what they were trained on.
    """
    given = {"data.dir": Written(folder)} | ({"data.dataset": Written("folder")} if folder else {}) | dict(layer)
    config = build(TrainConfig, given).data

    from effv2.cli.console import ConsoleReporter, print_table
    from effv2.data.inspection import contact_sheet, inspect
    from effv2.data.sources import open_source

    with ConsoleReporter() as reporter:
        found = inspect(open_source(config), config.max_megapixels, partial(reporter.progress, "looking at images"))
        if sheet and not found.broken:
            from effv2.data.dataset import load_dataset

            contact_sheet(load_dataset(config, partial(reporter.progress, "decoding images"))).save(sheet)
    print_table(found.table())
    for sentence in found.sentences():
        click.echo(sentence)
    sys.exit(int(found.harmful(config.skip_broken)))


@main.command(cls=cli.Command)
@cli.option("export", "Also write the report there, with its data as CSV and a manifest of their hashes.", "FOLDER")
@cli.option(
    "from-export",
    "Read these exports, folders separated by commas, as one, instead of the tracking server; a run in several is "
    "that of the last. Needs --export for another folder.",
    "LIST",
)
@cli.option("claims", "Claims of your own (YAML), beside the published ones.", "FILE")
@cli.takes({}, "experiment")
def report(export: str | None, from_export: str | None, claims: str | None, layer: Layer, how: StudyOptions) -> None:
    """Show what the studies of an experiment answer, and judge claims on its runs: yours, and the published ones.

    One page (HTML, and Markdown) is logged to a run of its own. It needs no network to be read.
    """
    target = (_path(export) or Path()).resolve()
    sources = [path.resolve() for word in (from_export or "").split(",") if (path := _path(word.strip()))]
    if from_export and not sources:
        raise InputError("from_export", from_export, "names no folder", "give some, separated by commas")
    if sources and (not export or target in sources):
        raise InputError("from_export", from_export, "the report needs a folder of its own", "name one with `export`")

    from effv2.cli.console import ConsoleReporter
    from effv2.evidence.publication import publish, rebuild

    with ConsoleReporter() as reporter:
        if sources:
            made, address = rebuild(sources, _path(claims), target, reporter), ""
        else:
            made, address = publish(how.experiment, _path(claims), target if export else None, reporter)
    written = target / "report.html" if export else ""
    for line in filter(None, (*made.answers, *made.own, made.summary, address, written)):
        click.echo(line)


@main.command(cls=cli.Command)
@click.argument("model")
@cli.option("name", "The name in MLflow's registry, under which models are promoted and served.", required=True)
@click.option("--max-milliseconds", type=float, help="Refuse a model that took longer for one image.")
@click.option("--max-megabytes", type=float, help="Refuse a model whose files are larger (MB, 10^6 bytes).")
@click.option("--dry-run", is_flag=True, help="Say what would happen; change nothing.")
def promote(model: str, name: str, dry_run: bool, **limits: float | None) -> None:
    """Register MODEL, and make it the champion, if it is better than the model that is.

    MODEL is models:/ID, or runs:/ID of the run that logged it. Better is who has more right answers to the same test
    images, by McNemar's exact test; the first is unopposed. A refused model isn't registered, and the exit code is 1.
    """
    from effv2.cli.console import print_table
    from effv2.evidence.promotion import promote as decide

    decision = decide(model, name, dry_run=dry_run, **limits)
    print_table(decision.table)
    if decision.verdict == "refused":
        raise RunError(decision.reason)
    click.echo(decision.reason)
    if decision.verdict == "promoted":
        serve = f"It is served by: mlflow models serve --model-uri models:/{name}@champion --env-manager local"
        click.echo("Nothing was changed, as this was a dry run." if dry_run else serve)
