"""A search for the best configuration: ranges sampled by TPE, runs pruned early, the best one tested once."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import matplotlib
import optuna
from matplotlib import pyplot
from optuna.visualization import matplotlib as plots

from effv2.config.layers import Layer, build_config
from effv2.config.options import LogModel
from effv2.config.schema import TrainConfig, field_of
from effv2.config.studies import SearchFile, Study
from effv2.core import provenance
from effv2.core.errors import InputError
from effv2.core.randomness import stream_seed
from effv2.core.reporter import Reporter
from effv2.data.dataset import LoadData
from effv2.run.run import prepare, study_text
from effv2.studies.plan import ABOUT, TrainingPlan, best_of
from effv2.studies.queue import RUN, Params, Trials
from effv2.tracking.read import SELECTED_TEST, SELECTED_VALIDATION, read_runs
from effv2.tracking.tags import BEST_RUN, LOOKS
from effv2.tracking.writer import TrackedRun

RANDOM_TRIALS = 10  # before TPE has anything to go by
FIGURES: dict[str, Callable[[optuna.Study], Any]] = {
    "importance": plots.plot_param_importances,
    "history": plots.plot_optimization_history,
    "slice": plots.plot_slice,
    "parallel_coordinate": plots.plot_parallel_coordinate,
}


@dataclass(frozen=True, kw_only=True)
class Search(TrainingPlan):
    """A resolved base configuration and the ranges that are searched around it."""

    base: TrainConfig
    search: SearchFile
    searches: ClassVar[bool] = True

    def sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """Return TPE for one trial; its random numbers follow from the seed and the trial's number alone."""
        seed = stream_seed(self.base.random.seed, "sampler", number) % 2**32
        with warnings.catch_warnings():  # its options count as experimental in some versions
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=RANDOM_TRIALS, multivariate=True, constant_liar=True
            )

    def pruner(self) -> optuna.pruners.BasePruner | None:
        """Return asynchronous successive halving (Li et al. 2020)."""
        least = self.search.min_epochs or 1  # make_search has filled it in
        halving = optuna.pruners.SuccessiveHalvingPruner(min_resource=least, reduction_factor=2)
        return halving if self.search.prune else None

    def suggest(self, trial: optuna.Trial) -> Params:
        """Suggest a value for each range."""
        for name, limits in self.search.space.items():
            if field_of(name).annotation is int:
                trial.suggest_int(name, round(limits.low), round(limits.high), log=limits.log)
            else:
                trial.suggest_float(name, limits.low, limits.high, log=limits.log)
        return trial.params

    def conclude(self, trials: Trials, parent: TrackedRun, log_model: LogModel, load: LoadData) -> Mapping[str, str]:
        """Log the configuration of the best trial, its accuracies and Optuna's figures on the parent, too."""
        models, best = super().conclude(trials, parent, log_model, load), best_of(trials)
        if best is not None:
            run_id = best.user_attrs[RUN]
            looks = [*filter(None, read_runs([parent.run_id], ())[0].tags.get(LOOKS, "").split(",")), run_id]
            parent.set_tags({BEST_RUN: run_id, LOOKS: ",".join(dict.fromkeys(looks))})
            metrics = read_runs([run_id], ())[0].metrics
            parent.log_metrics({name: metrics[name] for name in (SELECTED_VALIDATION, SELECTED_TEST)})
            with tempfile.TemporaryDirectory() as folder:
                config = self.configuration(best.params | {"evaluation.test_set": True})
                Path(folder, "best.yaml").write_text(study_text(config, f"{self.name}-best"), encoding="utf-8")
                _draw(trials, Path(folder))
                parent.log_folder(Path(folder))
        return models

    def configuration(self, params: Params) -> TrainConfig:
        """Return the base with some fields changed."""
        layer = Layer(self.base.model_dump())
        for name, value in params.items():
            layer = layer.with_value(tuple(name.split(".")), value)
        return build_config([layer])


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


def make_search(study: Study, options: Layer, trials: int, load: LoadData, reporter: Reporter) -> Search:
    """Load the data, check that it can be searched on, resolve `auto`; `trials` 0 leaves their number as it is."""
    if study.arms or study.seeds:
        problem = "has arms or seeds, which a search doesn't know"
        raise InputError("study", study.name, problem, "use the commands ablate or hparam-check")
    untested = Layer({"evaluation": {"test_set": False}})
    (config,) = prepare([build_config([study.base, options, untested])], load, reporter.hint)
    ranges, epochs = study.search or SearchFile(), config.schedule.epochs
    ranges = ranges.model_copy(update={"min_epochs": ranges.min_epochs or max(1, epochs // 4)})
    searched = ranges.model_dump(exclude={"trials"})  # which may grow
    # The base's own values first, which the search is to beat.
    own = {name: config.flat()[name] for name in ranges.space}
    inside = all(limits.low <= own[name] <= limits.high for name, limits in ranges.space.items())
    wanted = {f"trial {number}": own if inside and not number else {} for number in range(trials or ranges.trials)}
    definition = {
        "base": config.identity(),
        **searched,
        "data": load(config.data).digest(),
        "code": provenance.code_version(),
    }
    about = study.model_dump(include=ABOUT)
    return Search(
        kind="search", trials=wanted, definition=definition, epochs=epochs, base=config, search=ranges, **about
    )
