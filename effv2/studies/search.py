"""A search for the best configuration: ranges sampled by TPE, runs pruned early, the best one tested once."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib
import optuna
from matplotlib import pyplot
from optuna.visualization import matplotlib as plots

from effv2.config.layers import Layer, build_config, dotted
from effv2.config.options import LogModel
from effv2.config.schema import TrainConfig, field_of
from effv2.core import provenance
from effv2.core.errors import InputError
from effv2.core.randomness import stream_seed
from effv2.core.reporter import Message
from effv2.execution.resolve import place, resolve
from effv2.run.outcome import restore, score_on_test
from effv2.run.records import study_text
from effv2.run.run import check
from effv2.studies.files import SearchFile, Study
from effv2.studies.plan import LoadData, PlannedRun, Purpose, Trials, best_of, discard_weights
from effv2.studies.queue import RUN
from effv2.tracking.accuracies import SELECTED_TEST
from effv2.tracking.run import TrackedRun
from effv2.tracking.tags import BEST_RUN, LOOKS
from effv2.tracking.writer import TrackedRun

RANDOM_TRIALS = 10  # before TPE has anything to go by
FIGURES: dict[str, Callable[[optuna.Study], Any]] = {
    "importance": plots.plot_param_importances,
    "history": plots.plot_optimization_history,
    "slice": plots.plot_slice,
    "parallel_coordinate": plots.plot_parallel_coordinate,
}


@dataclass(frozen=True)
class Search:
    """A resolved base configuration and the ranges that are searched around it."""

    purpose: Purpose
    base: TrainConfig
    search: SearchFile
    data: str
    samples: bool = True

    @cached_property
    def slots(self) -> dict[str, dict[str, Any]]:
        """Return a slot a trial: the base's own values first, which the search is to beat, then free ones."""
        own = {name: self.base.flat()[name] for name in self.search.space}
        inside = all(limits.low <= own[name] <= limits.high for name, limits in self.search.space.items())
        return {f"trial {number}": own if inside and not number else {} for number in range(self.search.trials)}

    @property
    def epochs(self) -> int:
        """Return the epochs of a run at most."""
        return self.base.schedule.epochs

    @property
    def min_epochs(self) -> int:
        """Return how many epochs each trial is given before it may be pruned."""
        return self.search.min_epochs or max(1, self.epochs // 4)

    def definition(self) -> dict[str, Any]:
        """Return all but the number of trials, so that a search may grow."""
        search = self.search.model_dump(exclude={"trials"}) | {"min_epochs": self.min_epochs}
        return {"base": self.base.identity(), **search, "data": self.data, "code": provenance.code_version()}

    def sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """Return TPE for one trial; its random numbers follow from the seed and the trial's number alone."""
        seed = stream_seed(self.base.random.seed, "sampler", number) % 2**32
        with warnings.catch_warnings():  # its options count as experimental in some versions
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=RANDOM_TRIALS, multivariate=True, constant_liar=True
            )

    def pruner(self) -> optuna.pruners.BasePruner:
        """Return asynchronous successive halving (Li et al. 2020)."""
        if not self.search.prune:
            return optuna.pruners.NopPruner()
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=self.min_epochs, reduction_factor=2)

    def run_of(self, slot: str, trial: optuna.Trial) -> PlannedRun:
        """Suggest a value for each range."""
        values: dict[str, float] = {}
        for name, limits in self.search.space.items():
            if field_of(name).annotation is int:
                values[name] = trial.suggest_int(name, round(limits.low), round(limits.high), log=limits.log)
            else:
                values[name] = trial.suggest_float(name, limits.low, limits.high, log=limits.log)
        return PlannedRun(slot, "", self.configuration(values))

    def configuration(self, values: Mapping[str, float]) -> TrainConfig:
        """Return the base with some fields changed."""
        layer = Layer(self.base.model_dump(), dotted)
        for name, value in values.items():
            layer = layer.with_value(tuple(name.split(".")), value)
        return build_config([layer])

    def publish(self, trials: Trials, parent: TrackedRun, log_model: LogModel, load: LoadData) -> None:
        """Test the best trial, once; log its model, its configuration and Optuna's figures."""
        best = best_of(trials)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if best is not None:
                config = self.configuration(best.params)
                run = TrackedRun(best.user_attrs[RUN], parent.experiment_id)
                self._test(run, config, parent, log_model, load)
                (folder / "best.yaml").write_text(
                    study_text(_with_test(config, True), f"{self.purpose.name}-best"), encoding="utf-8"
                )
                _draw(trials, folder)
            parent.log_folder(folder)
        discard_weights(trials, parent)

    def _test(
        self, run: TrackedRun, config: TrainConfig, parent: TrackedRun, log_model: LogModel, load: LoadData
    ) -> None:
        """Evaluate a run on the test set unless that was done before; name all that ever were on the parent."""
        wants_model = log_model == "best" and not run.model_address()
        tested = SELECTED_TEST in run.metrics()
        if wants_model or not tested:
            outcome = restore(run, config, load(config.data))
            if not tested:
                score_on_test(outcome)
            if wants_model:
                outcome.log_model()
        looks = list(dict.fromkeys([*filter(None, parent.tags().get(LOOKS, "").split(",")), run.run_id]))
        parent.set_tags({BEST_RUN: run.run_id, LOOKS: ",".join(looks)})


def _with_test(config: TrainConfig, evaluated: bool) -> TrainConfig:
    evaluation = config.evaluation.model_copy(update={"test_set": evaluated})
    return config.model_copy(update={"evaluation": evaluation})


def _draw(trials: Trials, folder: Path) -> None:
    """Draw Optuna's figures; one that the trials don't suffice for is left out."""
    matplotlib.use("agg")
    study = optuna.create_study(direction="maximize")
    study.add_trials([trial for trial in trials.values() if trial.state.is_finished()])
    for name, plot in FIGURES.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                axes = plot(study)
            except (RuntimeError, ValueError):
                continue
            figure = getattr(axes, "figure", None) or axes.flat[0].figure
            figure.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
            pyplot.close(figure)


def make_search(study: Study, options: Layer, trials: int, load: LoadData, message: Message) -> Search:
    """Load the data, check that it can be searched on, resolve `auto`; `trials` 0 leaves their number as it is."""
    if study.arms or study.seeds:
        raise InputError(
            f"--study {study.name}: has arms or seeds, which a search doesn't know; use `ablate` or `hparam-check`."
        )
    config = _with_test(with_device(build_config([study.base, options])), False)
    dataset = load(config.data)
    if dataset.validation is None:
        raise InputError(
            "data.validation_fraction 0: a search is judged on a validation split; give it a share, as 0.1."
        )
    check(config, dataset)
    config = resolve(config, message)
    purpose = Purpose("search", study.name, study.description, study.retries)
    ranges = study.search or SearchFile()
    ranges = ranges.model_copy(update={"trials": trials or ranges.trials})
    return Search(purpose, config, ranges, dataset.digest())
