"""Published weights compared: each network is evaluated once. What `evaluate-pretrained` runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from effv2.config.schema import LogModel
from effv2.core.reporter import Reporter
from effv2.data.dataset import LoadData
from effv2.execution.resolve import resolve_device
from effv2.pretrained.config import PretrainedConfig
from effv2.pretrained.evaluation import CODE, Evaluation, evaluate, log_network
from effv2.pretrained.images import choose_images
from effv2.pretrained.weights import find_all_weights, load_network, parse_models
from effv2.run.run import Attempt, RunSpec
from effv2.studies.plan import Plan, best_of, run_ids
from effv2.studies.queue import NAME, Params, Trials
from effv2.tracking.writer import TrackedRun, model_address

KIND = "evaluate-pretrained"
LONGEST_NAME = 200  # characters


@dataclass(frozen=True, kw_only=True)
class Weights(Plan):
    """The evaluations of a comparison by label."""

    evaluations: Mapping[str, Evaluation]

    def execute(self, spec: RunSpec, params: Params, load: LoadData) -> Attempt:
        """Evaluate a network."""
        return evaluate(self.evaluations[spec.name], spec)

    def conclude(self, trials: Trials, parent: TrackedRun, log_model: LogModel, load: LoadData) -> dict[str, str]:
        """Log the networks that are wanted to the runs that evaluated them, those that have none."""
        best, models = best_of(trials.values()), dict[str, str]()
        for name, run_id in run_ids(trials).items() if log_model != "none" else ():
            run = TrackedRun(run_id, parent.experiment_id)
            wanted = log_model == "all" or (best is not None and best.user_attrs[NAME] == name)
            if wanted and not model_address(run_id):
                log_network(self.evaluations[name], run)
                models[name] = model_address(run_id)
        return models


def make_weights(
    models: str, config: PretrainedConfig, folder: Path | None, *, progress: bool, load: LoadData, reporter: Reporter
) -> Weights:
    """Find images and weights and load every network, so that nothing wrong is found half-way; resolve `auto`.

    `models` are named as `parse_models` says; `folder` holds files of weights; `progress` shows that of downloads.
    """
    requests, evaluations = parse_models(models), {}
    images = choose_images(config.data)
    precision = "bf16" if config.execution.precision == "bf16" else "fp32"
    resolved = {"device": resolve_device(config.execution.device), "precision": precision}
    config = config.model_copy(update={"execution": config.execution.model_copy(update=resolved)})
    for requested in find_all_weights(requests, folder, progress):
        load_network(requested)
        evaluations[requested.label] = Evaluation(requested, images, config)
    # All networks and images: what is ranked together is corrected for its number.
    definition = {
        "networks": {label: each.definition() for label, each in evaluations.items()},
        "data": {label: each.data_digest(each.decode(reporter)) for label, each in evaluations.items()},
        "code": CODE,
    }
    name = f"{KIND} {images.name}: {', '.join(evaluations)}"[:LONGEST_NAME]
    trials: dict[str, Params] = {label: {} for label in evaluations}
    return Weights(kind=KIND, name=name, trials=trials, definition=definition, evaluations=evaluations)
