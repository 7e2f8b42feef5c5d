"""The command `evaluate-pretrained`."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import click

from effv2.cli.options import config_options, reports_errors, study_options
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
@study_options(log_model="none")
@reports_errors
def evaluate_pretrained(models: str, weights_dir: str, **options: Any) -> None:
    """Evaluate published ImageNet weights, each with its own transforms, and say which are really better.

    On Imagenette, or any folder whose classes are ImageNet's. Rankings rest on images that the weights were not fitted
    to. The same command again resumes where the last one ended.
    """
    from effv2.cli.options import take_study_options
    from effv2.config.documents import validate
    from effv2.config.layers import option_layer
    from effv2.core.paths import expanded

    how = take_study_options(options, "none")
    layer = option_layer(options, FIELDS)
    config = validate(PretrainedConfig, layer.values, layer.where)

    from effv2.cli.run import run_and_show
    from effv2.studies.weights import make_weights

    folder = expanded(weights_dir) if weights_dir else None
    make = partial(make_weights, models or PUBLISHED_COMPARISON, config, folder, show_downloads=sys.stderr.isatty())
    run_and_show(make, how)
