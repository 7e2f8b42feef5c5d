"""The command `evaluate-pretrained`."""

from __future__ import annotations

from typing import Any

import click

from effv2.cli.options import (
    config_options,
    experiment_option,
    fresh_option,
    log_model_option,
    parse_fresh,
    parse_log_model,
    reports_errors,
)
from effv2.pretrained.config import PretrainedConfig

# Option names (as in MLproject) and the fields that they set.
FIELDS = {
    "dataset": "data.dataset",
    "data_dir": "data.dir",
    "download": "data.download",
    "per_class": "data.per_class",
    "limit": "data.limit",
    "seed": "data.seed",
    "device": "execution.device",
    "precision": "execution.precision",
    "batch_size": "execution.batch_size",
}
PUBLISHED_COMPARISON = "efficientnet_v2_s,efficientnet_b0,resnet50"


@click.command("evaluate-pretrained")
@click.option(
    "--models",
    default="",
    metavar="LIST",
    help="Classification networks of torchvision, separated by commas: resnet50 with its default weights, "
    "resnet50:IMAGENET1K_V1 with others, resnet50=FILE with a state dict of your own, which isn't verified.  "
    f"[default: {PUBLISHED_COMPARISON}]",
)
@click.option(
    "--weights-dir",
    default="",
    metavar="FOLDER",
    help="Folder with published files of weights, looked into before torchvision's cache and its download.",
)
@config_options(FIELDS, PretrainedConfig)
@fresh_option
@log_model_option("none")
@experiment_option
@reports_errors
def evaluate_pretrained(
    models: str, weights_dir: str, fresh: str, log_model: str, experiment: str, **options: Any
) -> None:
    """Evaluate published ImageNet weights, each with its own transforms, and say which are really better.

    On Imagenette, or any folder whose classes are ImageNet's. Rankings rest on images that the weights were not fitted
    to. The same command again goes on where the last one ended.
    """
    from effv2.config.documents import validate
    from effv2.config.layers import option_layer

    over, which = parse_fresh(fresh), parse_log_model(log_model, "none")
    layer = option_layer(options, FIELDS)
    config = validate(PretrainedConfig, layer.values, layer.where)

    from effv2.cli.console import ConsoleReporter, print_table
    from effv2.core.errors import RunError
    from effv2.pretrained import comparison, weights
    from effv2.tracking.run import run_address

    requests = weights.parse_models(models or PUBLISHED_COMPARISON)
    folder = weights.check_folder(weights_dir)
    with ConsoleReporter() as reporter:
        ending = comparison.evaluate_pretrained(
            requests,
            config,
            reporter,
            weights_dir=folder,
            experiment=experiment,
            fresh=over,
            log_model=which,
            show_downloads=reporter.console.is_terminal,
        )
    if ending.results is not None:
        print_table(ending.results.table)
        click.echo(ending.results.sentence)
    for label, address in ending.models.items():
        click.echo(f"model of {label}: {address}")
    click.echo(run_address(ending.parent.run_id, ending.parent.experiment_id))
    if ending.failed:
        said = " ".join(f"{label}: {reason}." for label, reason in ending.failed.items())
        raise RunError(f"{len(ending.failed)} of {len(requests)} networks failed. {said}")
