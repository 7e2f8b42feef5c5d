"""Plans, the engine's view of a study: its trials, the work on each, and the computations at the end.

A search samples ranges by TPE and prunes poor runs early. Its best run is tested once. Grids of arms and
seeds, and comparisons of weights, have modules of their own.
"""

import re
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import matplotlib
import optuna
from matplotlib import pyplot
from optuna.trial import FrozenTrial, TrialState
from optuna.visualization import matplotlib as plots

from effv2.config.layers import Layer, Written, build
from effv2.config.options import LogModel
from effv2.config.schema import TrainConfig, field_of
from effv2.config.studies import SearchFile, Study
from effv2.core import provenance
from effv2.core.errors import InputError
from effv2.core.randomness import stream_seed
from effv2.core.reporter import Reporter, StudyProgress
from effv2.core.words import percent
from effv2.data.dataset import Dataset, LoadData
from effv2.run.initial import find_weights
from effv2.run.records import WEIGHTS, log_network, log_test, restore
from effv2.run.run import Attempt, RunSpec, attempt, prepare, study_text
from effv2.studies.queue import ERROR, FINAL, NAME, RUN, Params, Trials
from effv2.studies.seeds import ACCURACY, ELSEWHERE, MEASURE, Round
from effv2.tracking.models import model_address
from effv2.tracking.read import SELECTED_TEST, find_runs, read_runs
from effv2.tracking.tags import BEST_RUN, CONFIG_HASH, LOOKS
from effv2.tracking.writer import TrackedRun

ABOUT = {"name", "description", "retries", "baseline", "show"}  # keys that a plan takes from a study file
COUNTED = {"running": TrialState.RUNNING, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
RANDOM_TRIALS = 10  # of a search, before TPE has enough data
FIGURES: dict[str, Callable[[optuna.Study], Any]] = {
    "importance": plots.plot_param_importances,
    "history": plots.plot_optimization_history,
    "slice": plots.plot_slice,
    "parallel_coordinate": plots.plot_parallel_coordinate,
}


@dataclass(frozen=True, kw_only=True)
class Plan(ABC):
    """A fixed grid, a search, or published weights. Plans are sent to worker processes, so they only hold plain data.

    `kind` is the command that makes it. `trials` are wanted now, by name, with their fixed parameters. `definition`
    identifies the study, in plain values. `about` is shown when it begins. `epochs` is the maximum per trial. If a plan
    `searches`, a sampler chooses the parameters, poor and diverged runs are pruned, and the best one is tested.
    `stamps` are params of the study's run, fixed before the first trial. `show` names additional columns of its tables.
    """

    kind: str
    name: str
    trials: Mapping[str, Params]
    definition: Mapping[str, Any]
    epochs: int = 1
    about: Sequence[str] = ()
    description: str = ""
    retries: int = 0
    baseline: str = ""
    show: Sequence[str] = ()
    stamps: Mapping[str, Any] = field(default_factory=dict)
    searches: ClassVar[bool] = False
    shows_best: ClassVar[bool] = True  # while it runs
    measure: ClassVar[str] = "accuracy"  # of trials that don't record a name

    def sampler(self, number: int) -> optuna.samplers.BaseSampler | None:
        """Return the sampler of a trial's parameters."""
        return None

    def pruner(self) -> optuna.pruners.BasePruner | None:
        """Return the pruner, which ends poor trials."""
        return None

    def suggest(self, trial: optuna.Trial) -> Params:
        """Return the parameters of a leased trial."""
        return {}

    def wanted(self, trials: Trials) -> Mapping[str, Params]:
        """Return the trials that are wanted, given the existing ones, by name, with their fixed parameters."""
        return self.trials

    def as_in(self, definition: Mapping[str, Any]) -> "Plan":
        """Return the plan with what `auto` meant in an earlier study with this definition: timings vary."""
        return self

    def resumed(self, stamped: Mapping[str, str], begin: Callable[[str], Sequence[str]]) -> "Plan":
        """Return the plan with the rules that a study began with; InputError if the options give others.

        `begin` takes the name of a selection, and returns the trials that were finished when the study first began it.
        """
        return self

    def rounds(self, trials: Trials) -> list[Round]:
        """Return the rounds of seeds so far, if the results decide their number."""
        return []

    def facts(self, params: Params, metrics: Mapping[str, float]) -> dict[str, Any]:
        """Return the attributes to record of a finished trial, besides its value."""
        return {}

    def measured(self, trial: FrozenTrial) -> str:
        """Write the accuracy that a trial is compared by, with its name."""
        name = str(trial.user_attrs.get(MEASURE, self.measure)).replace("val_", "validation_")
        return f"{re.sub('[/_]', ' ', name)} {percent(trial.user_attrs.get(ACCURACY, trial.value or 0.0))}"

    @abstractmethod
    def execute(self, spec: RunSpec, params: Params, load: LoadData) -> Attempt:
        """Work on a trial, in a run of the same name. The run may already be finished, or interrupted."""

    @abstractmethod
    def conclude(self, trials: Trials, parent: TrackedRun, log_model: LogModel, load: LoadData) -> None:
        """Make the computations that need all trials. Repeatable."""

    def dataset(self, load: LoadData) -> Dataset | None:
        """Return the data set that all trials share, if any."""
        return None


@dataclass(frozen=True, kw_only=True)
class TrainingPlan(Plan):
    """A plan whose trials are trainings. `chosen` names the configurations whose precision `auto` chose."""

    chosen: Sequence[str] = ()

    def with_precisions(
        self, configs: Mapping[str, TrainConfig], identities: Mapping[str, Any]
    ) -> dict[str, TrainConfig]:
        """Return configurations, those in `chosen` with the precision of the identity of the same name."""
        there = {name: identities[name]["execution.precision"] for name in self.chosen if name in identities}
        return {
            name: config.updated("execution", precision=there[name]) if name in there else config
            for name, config in configs.items()
        }

    @abstractmethod
    def configuration(self, params: Params) -> TrainConfig:
        """Return the configuration of a trial with these parameters."""

    def check_new(self, experiment_id: str, fresh: bool) -> None:
        """Raise InputError for missing weights, unless all runs that need them are finished and count."""
        configs = map(self.configuration, self.trials.values())
        for key, config in {config.hash(): config for config in configs if config.model.weights}.items():
            known = [] if fresh else find_runs(experiment_id, {CONFIG_HASH: key}, running=False)
            if not any(run.status == "FINISHED" for run in known):
                find_weights(config.model)

    def execute(self, spec: RunSpec, params: Params, load: LoadData) -> Attempt:
        """Train the configuration."""
        config = self.configuration(params)
        return attempt(config, load(config.data), spec)

    def conclude(self, trials: Trials, parent: TrackedRun, log_model: LogModel, load: LoadData) -> None:
        """Log the model of the best run if only that is wanted, and test the best run of a search."""
        best = best_of(trials.values())
        if best is None or not (log_model == "best" or self.searches):
            return
        run, config = TrackedRun(best.user_attrs[RUN], parent.experiment_id), self.configuration(best.params)
        records = {record.run_id: record for record in read_runs(run_ids(trials).values())}
        model = log_model == "best" and not model_address(run.run_id)
        test = self.searches and SELECTED_TEST not in records[run.run_id].metrics
        if model or test:
            training = restore(run.run_id, config, load(config.data))
            if test:
                run.log_metrics(log_test(run, training))
            if model:
                log_network(run, training)
        for record in records.values():
            if record.parent == parent.run_id:  # the study's own runs keep their weights until the best run is known
                TrackedRun(record.run_id, parent.experiment_id).discard(WEIGHTS)


@dataclass(frozen=True, kw_only=True)
class Search(TrainingPlan):
    """A resolved base configuration and the ranges that the search varies."""

    base: TrainConfig
    ranges: SearchFile
    searches: ClassVar[bool] = True
    measure: ClassVar[str] = "validation accuracy"

    def sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """Return TPE for one trial. Its random numbers follow only from the seed and the trial's number."""
        seed = stream_seed(self.base.random.seed, "sampler", number) % 2**32
        with warnings.catch_warnings():  # some versions call its options experimental
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            how: dict[str, Any] = {"n_startup_trials": RANDOM_TRIALS, "multivariate": True, "constant_liar": True}
            return optuna.samplers.TPESampler(seed=seed, **how)

    def pruner(self) -> optuna.pruners.BasePruner | None:
        """Return asynchronous successive halving (Li et al. 2020)."""
        least = self.ranges.min_epochs or 1  # make_search has set it
        halving = optuna.pruners.SuccessiveHalvingPruner(min_resource=least, reduction_factor=2)
        return halving if self.ranges.prune else None

    def as_in(self, definition: Mapping[str, Any]) -> "Search":
        """Return the search with the precision of an earlier one, if it is free."""
        base = self.with_precisions({"base": self.base}, definition)["base"]
        return replace(self, base=base, definition={**self.definition, "base": base.identity()})

    def suggest(self, trial: optuna.Trial) -> Params:
        """Suggest a value for each range."""
        for name, limits in self.ranges.space.items():
            if field_of(name).annotation is int:
                trial.suggest_int(name, round(limits.low), round(limits.high), log=limits.log)
            else:
                trial.suggest_float(name, limits.low, limits.high, log=limits.log)
        return trial.params

    def configuration(self, params: Params) -> TrainConfig:
        """Return the base with some settings changed."""
        return build(TrainConfig, {name: Written(value) for name, value in {**self.base.flat(), **params}.items()})

    def conclude(self, trials: Trials, parent: TrackedRun, log_model: LogModel, load: LoadData) -> None:
        """Also log the configuration of the best trial and Optuna's figures to the parent."""
        super().conclude(trials, parent, log_model, load)
        if (best := best_of(trials.values())) is not None:
            own, tested = read_runs([parent.run_id, best.user_attrs[RUN]])
            looks = [*filter(None, own.tags.get(LOOKS, "").split(",")), tested.run_id]
            parent.set_tags({BEST_RUN: tested.run_id, LOOKS: ",".join(dict.fromkeys(looks))})
            with parent.new_artifacts() as folder:
                config = self.configuration(best.params | {"evaluation.test_set": True})
                (folder / "best.yaml").write_text(study_text(config, f"{self.name}-best"), encoding="utf-8")
                _draw(trials, folder)


def _draw(trials: Trials, folder: Path) -> None:
    """Draw Optuna's figures. Figures that need more trials are left out."""
    matplotlib.use("agg")
    study = optuna.create_study(direction="maximize")
    study.add_trials([trial for trial in trials.values() if trial.state.is_finished()])
    for name, plot in FIGURES.items():
        with warnings.catch_warnings(), suppress(RuntimeError, ValueError):
            warnings.simplefilter("ignore")
            plot(study)
            pyplot.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
        pyplot.close("all")


def make_search(study: Study, layer: Layer, trials: int, load: LoadData, reporter: Reporter) -> Search:
    """Load the data, check that it suits a search, and resolve `auto`. `trials` 0 keeps the number of the study."""
    if study.arms or study.seeds:
        problem = "has arms or seeds, which a search can't have"
        raise InputError("study", study.name, problem, "use the commands ablate or hparam-check")
    if study.splits > 1:
        raise InputError("study", study.name, "has splits, but a search has one", "give it `split_seed` instead")
    untested = {"evaluation.test_set": Written(False)}
    asked = build(TrainConfig, study.base | layer | untested)
    (config,) = prepare([asked], load, reporter.message)
    ranges, epochs = study.search or SearchFile(), config.schedule.epochs
    ranges = ranges.model_copy(update={"min_epochs": ranges.min_epochs or max(1, epochs // 4)})
    other = next((name for name in ranges.space if name.endswith("_multiplier")), "")
    if other and config.model.weights and not config.model.weights_partial:
        problem = f"a search of {other} makes networks that don't fit them"
        raise InputError("model.weights", config.model.weights, problem, "give model.weights_partial, or search others")
    # First the values of the base, which the search must beat.
    own = {name: config.flat()[name] for name in ranges.space}
    inside = all(limits.low <= own[name] <= limits.high for name, limits in ranges.space.items())
    wanted = {f"trial {number}": own if inside and not number else {} for number in range(trials or ranges.trials)}
    data, code = load(config.data).digest(), provenance.code_version()
    definition = {"base": config.identity(), "data": data, "code": code, **ranges.model_dump(exclude={"trials"})}
    named = study.model_dump(include=ABOUT) | {"kind": "search", "epochs": epochs, "about": [load(config.data).summary]}
    named["chosen"] = ("base",) if asked.execution.precision == "auto" else ()
    return Search(trials=wanted, definition=definition, base=config, ranges=ranges, **named)


def best_of(trials: Iterable[FrozenTrial]) -> FrozenTrial | None:
    """Return the complete trial with the highest value; of equals, the first."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    return max(complete, key=lambda trial: (trial.value or 0.0, -trial.number), default=None)


def run_ids(trials: Trials) -> dict[str, str]:
    """Return the run ids of the complete trials, by name."""
    return {name: trial.user_attrs[RUN] for name, trial in trials.items() if trial.state == TrialState.COMPLETE}


def progress_of(plan: Plan, trials: Trials) -> StudyProgress:
    """Summarise the wanted trials."""

    def ending(trial: FrozenTrial) -> str:
        if trial.state == TrialState.FAIL:
            return f"failed: {trial.user_attrs.get(ERROR, 'for an unknown reason')}"
        if trial.user_attrs.get(FINAL):
            return f"diverged: {trial.user_attrs[ERROR]}"
        earlier = ", finished earlier" * bool(trial.user_attrs.get(ELSEWHERE))
        return f"{'pruned at ' * (trial.state == TrialState.PRUNED)}{plan.measured(trial)}{earlier}"

    names = plan.wanted(trials)
    wanted = [trial for name, trial in trials.items() if name in names]
    count, best = Counter(trial.state for trial in wanted), best_of(wanted)
    shares = [(trial.last_step or 0) / plan.epochs for trial in wanted if trial.state == TrialState.RUNNING]
    finished = sorted(
        (each for each in wanted if each.state.is_finished()), key=lambda each: str(each.datetime_complete)
    )
    return StudyProgress(
        total=len(names),
        done=len(finished) + sum(shares),
        counts={word: count[state] for word, state in COUNTED.items()},
        best=f"{best.user_attrs[NAME]}, {plan.measured(best)}" if best and plan.shows_best else "",
        ended={trial.user_attrs[NAME]: ending(trial) for trial in finished},
    )
