"""The plan of `evaluate-pretrained`: each network with published weights, or with your own, is evaluated once."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from effv2.config.options import LogModel
from effv2.core.reporter import Reporter
from effv2.data.dataset import LoadData
from effv2.execution.resolve import resolve_device
from effv2.pretrained import evaluation
from effv2.pretrained.config import PretrainedConfig
from effv2.pretrained.images import choose_images
from effv2.pretrained.own import find_networks, load_network
from effv2.run.run import Attempt, RunSpec
from effv2.run.weights import OUTPUTS, parse_models
from effv2.studies.plan import Plan, best_of, run_ids
from effv2.studies.queue import NAME, Params, Trials
from effv2.tracking.models import model_address
from effv2.tracking.writer import TrackedRun

LONGEST_NAME = 200  # characters


@dataclass(frozen=True, kw_only=True)
class Comparison(Plan):
    """The evaluations of a comparison, by label."""

    measure: ClassVar[str] = "top-1 accuracy"
    evaluations: Mapping[str, evaluation.Evaluation]

    def execute(self, spec: RunSpec, params: Params, load: LoadData) -> Attempt:
        """Evaluate a network."""
        return evaluation.evaluate(self.evaluations[spec.name], spec)

    def conclude(self, trials: Trials, parent: TrackedRun, log_model: LogModel, load: LoadData) -> None:
        """Log the wanted networks to the runs that evaluated them, unless these have one."""
        best = best_of(trials.values())
        for name, run_id in run_ids(trials).items() if log_model != "none" else ():
            run = TrackedRun(run_id, parent.experiment_id)
            wanted = log_model == "all" or (best is not None and best.user_attrs[NAME] == name)
            if wanted and not model_address(run_id):
                evaluation.log_network(self.evaluations[name], run)


def make_comparison(
    models: str, config: PretrainedConfig, folder: Path | None, *, progress: bool, reporter: Reporter
) -> Comparison:
    """Find images and weights and load every network, so that errors appear before the first run; resolve `auto`.

    `models` is in the form of `parse_models`, `folder` holds weight files, and `progress` shows downloads.
    """
    requests, evaluations = parse_models(models), {}
    own = [each.outputs != OUTPUTS for each in requests]
    images = choose_images(config.data, imagenet=not all(own), own=any(own))
    precision = "bf16" if config.execution.precision == "bf16" else "fp32"
    config = config.updated("execution", device=resolve_device(config.execution.device), precision=precision)
    found = find_networks(requests, folder, progress, images)
    if config.data.skip_broken:  # for all networks, without the images that any of them can't take
        all_ = (evaluation.Evaluation(each, images, config).decode(reporter) for each in found)
        if broken := {at for decoded in all_ for at in decoded.broken}:
            images = images.without(broken)
    if images.note:
        reporter.message(images.note)
    for requested in found:
        load_network(requested)
        evaluations[requested.label] = evaluation.Evaluation(requested, images, config)
    # All networks and images, because corrections depend on the number of networks that are ranked together.
    definition = {
        "networks": {label: each.definition() for label, each in evaluations.items()},
        "data": {label: each.data_digest(each.decode(reporter)) for label, each in evaluations.items()},
        "code": evaluation.CODE,
    }
    kind = "evaluate-pretrained"
    name = f"{kind} {images.name}: {', '.join(evaluations)}"[:LONGEST_NAME]
    trials: dict[str, Params] = {label: {} for label in evaluations}
    return Comparison(kind=kind, name=name, trials=trials, definition=definition, evaluations=evaluations)
