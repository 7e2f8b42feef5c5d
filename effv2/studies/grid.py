"""The grid of `ablate` or `hparam-check`: arms by seeds, on one or several splits of the images."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar

import optuna

from effv2.config.layers import Layer
from effv2.config.options import RACE, StudyOptions
from effv2.config.schema import TrainConfig
from effv2.config.studies import Study
from effv2.core import provenance
from effv2.core.errors import InputError
from effv2.core.reporter import Reporter
from effv2.core.words import counted
from effv2.data.dataset import Dataset, LoadData
from effv2.evidence.protocols import SEED_SETTING, overlap_of
from effv2.evidence.statistics import EVERY_LOOK, FEWEST
from effv2.run.run import prepare
from effv2.studies.plan import ABOUT, TrainingPlan
from effv2.studies.queue import Params, Trials
from effv2.studies.seeds import ACCURACY, MEASURE, AutoSeeds, Round, named_trial
from effv2.tracking.read import SELECTED_TEST, SELECTED_VALIDATION, Images, RunRecord, decisive_accuracy

MAX_SEEDS, MARGIN, LOOKS = "study.max_seeds", "study.margin", "study.looks"  # params of a study's run
FEWEST_ARMS = 2  # that a comparison can have


@dataclass(frozen=True, kw_only=True)
class Grid(TrainingPlan):
    """The resolved arms of a study. A trial has an arm, a seed and, if there are several, a split."""

    arms: Mapping[str, TrainConfig]
    splits: int = 1
    overlap: float = 0.0  # of several splits: the ratio of test to other images, if the test images differ
    auto: AutoSeeds | None = None
    options: StudyOptions
    shows_best: ClassVar[bool] = False  # one run is no answer

    def dataset(self, load: LoadData) -> Dataset | None:
        """Return the images of the first arm, which the report shows."""
        return load(next(iter(self.arms.values())).data)

    def wanted(self, trials: Trials) -> Mapping[str, Params]:
        """Return the trials of the listed seeds, or of the last round."""
        return self.auto.trials(self.auto.rounds(trials)[-1].counts) if self.auto else self.trials

    def rounds(self, trials: Trials) -> list[Round]:
        """Return the rounds of seeds so far."""
        return self.auto.rounds(trials) if self.auto else []

    def as_in(self, definition: Mapping[str, Any]) -> "Grid":
        """Return the grid with the precisions of an earlier one, where they are free."""
        arms = self.with_precisions(self.arms, definition["arms"])
        auto = replace(self.auto, arms=arms) if self.auto else None
        return replace(self, arms=arms, auto=auto, definition={**self.definition, "arms": _identities(arms)})

    def resumed(self, stamped: Mapping[str, str], begin: Callable[[str], Sequence[str]]) -> "Grid":
        """Return the plan with the rules that a study began with; InputError if the options give others."""
        for name, given in ((MAX_SEEDS, self.options.max_seeds), (MARGIN, self.options.margin)):
            if given is not None and stamped.get(name) != str(given):
                was = f"with {stamped[name]}" if name in stamped else "without it"
                problem = f"the study began {was}, which can't change after its first runs"
                remedy = "leave it out, or repeat all runs with `fresh`"
                raise InputError(name.partition(".")[2], given, problem, remedy)
        began, most = stamped.get(LOOKS, "every"), int(stamped.get(MAX_SEEDS, EVERY_LOOK.most))
        seeds = max(Counter((each["arm"], each.get("split")) for each in self.trials.values()).values(), default=0)
        if (self.auto and began != self.stamps[LOOKS]) or (began == "once" and seeds > most):
            ways = {"once": f"for one look, at {counted(most, 'seed')}", RACE: "as a race"}
            asked = self.options.seeds if self.auto else seeds
            problem = f"the study began {ways.get(began, 'with auto seeds or a list')}"
            raise InputError("seeds", asked, problem, "give the same again, or repeat all runs with `fresh`")
        if not self.auto:
            return self
        margin = float(stamped.get(MARGIN, 0))
        before = tuple(begin(", ".join(self.auto.wanted)))
        return replace(self, auto=replace(self.auto, most=most, margin=margin, before=before))

    def suggest(self, trial: optuna.Trial) -> Params:
        """Return the trial's arm, seed and split."""
        arm = trial.suggest_categorical("arm", sorted(self.arms))  # in one order, independent of the study file's
        params = {"arm": arm, "seed": trial.suggest_int("seed", 0, 2**32 - 1)}
        return params | ({"split": trial.suggest_int("split", 0, 2**32 - 1)} if self.splits > 1 else {})

    def configuration(self, params: Params) -> TrainConfig:
        """Return the arm with the seed, on the split."""
        return self.arms[params["arm"]].with_seed(params["seed"], params.get("split", 0))

    def facts(self, params: Params, metrics: Mapping[str, float]) -> dict[str, Any]:
        """Return the accuracy that verdicts use, with its name. It is not the one that selected the epoch."""
        settings = {name: str(value) for name, value in self.configuration(params).flat().items()}
        run = RunRecord("", "", "FINISHED", settings, dict(metrics), {})
        return {ACCURACY: metrics[name := decisive_accuracy([run])], MEASURE: name}


def make_grid(
    kind: str,
    study: Study,
    names: list[str],
    layer: Layer,
    options: StudyOptions,
    *,
    load: LoadData,
    reporter: Reporter,
) -> Grid:
    """Load and check every data set, so that errors appear before the first run, then resolve `auto`.

    `names` are those of the wanted arms. Seeds in options override those of the study, which override those of arms.
    """
    seeds = () if isinstance(options.seeds, str) else options.seeds or study.seeds
    rules = {"max_seeds": options.max_seeds or study.max_seeds, "margin": options.margin or study.margin}
    options = options.model_copy(update=rules)
    stamps = _stamps(study, names, options, len(seeds))
    if len(seeds) == 1 and seeds[0] > 1:
        reporter.message(f"The only seed is {seeds[0]}; for {seeds[0]} seeds give `seeds` 0-{seeds[0] - 1}.")
    asked = [study.arm(name, layer) for name in study.arms]
    if len({config.evaluation.test_set for config in asked}) > 1:
        problem = "true in some arms and false in others"
        raise InputError("evaluation.test_set", "", problem, "give all arms the same value")
    splits = [each.with_seed(each.random.seed, split) for split in range(study.splits) for each in asked]
    prepared = prepare(splits, load, reporter.message)
    arms = dict(zip(study.arms, prepared, strict=False))  # those of the first split
    definition: dict[str, Any] = {"arms": _identities(arms), "code": provenance.code_version()}
    definition["data"] = {arm: load(config.data).digest() for arm, config in arms.items()}
    # Later additions, unless they have the default, so that earlier studies remain the same.
    definition |= {"splits": study.splits} if study.splits > 1 else {}
    definition |= {"paired": True} if study.paired else {}
    overlap, race = _overlap(prepared[:: len(arms)], load) if study.splits > 1 else 0.0, options.seeds == RACE
    how: dict[str, Any] = {"budget": options.budget_hours or math.inf, "paired": study.paired, "race": race}
    auto = AutoSeeds(arms, tuple(names), study.baseline, own_splits=study.splits > 1, overlap=overlap, **how)
    return Grid(
        kind=kind,
        trials=_trials(arms, names, seeds, study.splits),
        definition=definition,
        about=[*dict.fromkeys(load(config.data).summary for config in arms.values()), *_advice(stamps, len(seeds))],
        epochs=max(config.schedule.epochs for config in arms.values()),
        arms=arms,
        chosen=[arm for arm, each in zip(study.arms, asked, strict=True) if each.execution.precision == "auto"],
        splits=study.splits,
        overlap=overlap,
        auto=auto if isinstance(options.seeds, str) else None,
        options=options,
        stamps=stamps,
        **study.model_dump(include=ABOUT),
    )


def _advice(stamps: Mapping[str, Any], count: int) -> list[str]:
    """Say before the first run how a list of seeds could have a less strict test."""
    if MAX_SEEDS in stamps or count < FEWEST:
        return []
    more = f"Intervals allow for seeds that you may add, up to {EVERY_LOOK.most}."
    return [f"{more} If {count} seeds are all, stop and give `max_seeds` {count}: the intervals are then narrower."]


def _identities(arms: Mapping[str, TrainConfig]) -> dict[str, dict[str, Any]]:
    """Return the identities of arms for the definition of a study, without seeds, so that it may get more."""
    found = {arm: config.identity() for arm, config in arms.items()}
    return {arm: {name: each[name] for name in each if name != SEED_SETTING} for arm, each in found.items()}


def _trials(arms: Mapping[str, TrainConfig], names: list[str], seeds: Sequence[int], splits: int) -> dict[str, Params]:
    """Return the trials of these seeds, or of each arm's own, on each split: all arms with the first seed first."""
    wanted = product(range(splits) if splits > 1 else (None,), seeds or (None,), names)
    return dict(named_trial(arm, arms[arm].random.seed if seed is None else seed, split) for split, seed, arm in wanted)


def _overlap(configs: Sequence[TrainConfig], load: LoadData) -> float:
    """Return the ratio of test to other images of the splits of one arm, by the rule for its runs."""
    runs = []
    for config in configs:
        settings = {name: str(value) for name, value in config.flat().items()}
        images = {part: Images("", each.digest) for part, each in load(config.data).splits.items()}
        runs.append(RunRecord("", "", "", settings, {}, {}, {}, images))
    return overlap_of([runs], SELECTED_TEST if configs[0].evaluation.test_set else SELECTED_VALIDATION)


def _stamps(study: Study, names: list[str], options: StudyOptions, count: int) -> dict[str, Any]:
    """Return what is fixed before the first run of `count` seeds; InputError for options that exclude each other."""
    auto, most = isinstance(options.seeds, str), options.max_seeds
    if auto and len(names) < FEWEST_ARMS:
        raise InputError("seeds", options.seeds, "needs two arms or more", "name a variant besides the baseline")
    limit = study.splits if auto and study.splits > 1 else EVERY_LOOK.most
    if limit < FEWEST or (auto and study.splits > 1 and (most or limit) > limit):
        problem = f"the study {study.name} has {study.splits} splits, and each of these seeds needs one"
        remedy = f"use at least {FEWEST} splits, and no larger `max_seeds`"
        raise InputError("seeds", options.seeds, problem, remedy)
    if options.budget_hours is not None and not auto:
        raise InputError("budget_hours", options.budget_hours, "only applies to auto seeds", "also set `seeds` to auto")
    if most is not None and count > most:
        raise InputError("max_seeds", most, f"{count} seeds are given", "raise it, or give fewer seeds")
    on_splits = study.splits > 1 and not auto  # more seeds on the same splits would not count
    stamps: dict[str, Any] = {}
    if auto or most is not None or on_splits:
        planned = most or (max(count, 1) if on_splits else limit)
        looks = RACE if options.seeds == RACE else "once" if on_splits or count == most else "every"
        stamps = {MAX_SEEDS: planned, LOOKS: looks}
    stamps |= {MARGIN: options.margin} if options.margin is not None else {}
    stamps |= {"study.paired": "true"} if study.paired else {}
    return stamps | ({"study.splits": study.splits} if study.splits > 1 else {})
