"""A forecast of a grid before anything is created: runs, hours, and the differences that it can detect."""

import math
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

from scipy.optimize import brentq

from effv2.config.options import StudyOptions
from effv2.config.schema import TrainConfig
from effv2.core.reporter import Reporter
from effv2.core.words import duration, points
from effv2.data.dataset import LoadData
from effv2.evidence.protocols import FREE
from effv2.evidence.quantities import TRAIN_SECONDS
from effv2.evidence.statistics import EVERY_LOOK, FEWEST, LEVEL, Looks, power
from effv2.studies.grid import LOOKS, MAX_SEEDS, Grid
from effv2.tracking.read import RunRecord, decisive_accuracy, read_experiment
from effv2.tracking.studies import complete
from effv2.training.loop import Training

TIMED_SECONDS = 15.0  # of training for all arms together, if there are no finished runs
GUESSED_DEVIATION = 0.02  # standard deviation of accuracy over seeds, if there are no finished runs
CHANCES = 0.5, 0.8, 0.95
LARGEST = 1.0  # differences, as fractions


class _TimeIsUp(Exception):
    """Ends a training after its timing."""


def forecast(
    plan: Grid, options: StudyOptions, load: LoadData, experiment_id: str | None, reporter: Reporter
) -> tuple[list[str], list[list[str]]]:
    """Forecast a grid in sentences and a table, titles first, of the differences that it would detect.

    The basis is finished runs of the same arms in the experiment, if there are any, otherwise a short timing.
    """
    runs = complete(read_experiment(experiment_id, ())) if experiment_id is not None else []
    seeds = Counter(str(params["arm"]) for params in plan.trials.values())
    same = {arm: [run for run in runs if _is_like(run, plan.arms[arm])] for arm in sorted(seeds)}
    seconds, timed = dict[str, float](), list[str]()
    for arm, alike in same.items():
        reporter.progress(f"timing a few steps of {arm}")
        known = [run.metrics[TRAIN_SECONDS] for run in alike if TRAIN_SECONDS in run.metrics]
        seconds[arm] = statistics.fmean(known) if known else _timed(plan.arms[arm], load, TIMED_SECONDS / len(same))
        timed += [] if known else [arm]
    most = int(plan.stamps.get(MAX_SEEDS, EVERY_LOOK.most))
    if plan.auto:
        count = f"{FEWEST * len(same)} to {most * len(same)} runs, as many as the verdicts need"
        one = sum(seconds.values())
        hours = f"{duration(FEWEST * one)} to {duration(most * one)}"
    else:
        count, hours = f"{len(plan.trials)} runs", duration(sum(seeds[arm] * seconds[arm] for arm in seeds))
    how = [f"a timing of a few steps of {', '.join(timed)}"] if timed else []
    how += ["finished runs"] if len(timed) < len(same) else []
    shared = f"; {options.workers} workers share the machine" if options.workers > 1 else ""
    deviation, source = _deviation(same)
    lines = [
        f"{count}, about {hours} of training in total, by {' and '.join(how)}{shared}. Evaluation takes extra time.",
        f"Differences from the baseline that would be detected, with a standard deviation of {points(deviation, '')} "
        f"({source}):",
    ]
    once = plan.stamps.get(LOOKS) == "once"
    if once and plan.splits > 1:  # the mean of a split's seeds counts once
        deviation, most = deviation / math.sqrt(most), plan.splits
    counts = [most] if once else sorted({3, 6, 10, most})
    return lines, _table(Looks(most, once), counts, deviation, plan.overlap if plan.splits > 1 else None)


def _table(looks: Looks, counts: Sequence[int], deviation: float, overlap: float | None) -> list[list[str]]:
    """Return the differences of one arm that a number of seeds detects with certain probabilities.

    With an `overlap`, it is a number of splits, and the arms are paired by split.
    """
    samples = 2 if overlap is None else 1
    nominal, shared = looks.nominal(LEVEL, samples), overlap or 0.0

    def cell(count: int, chance: float) -> str:
        def lacks(difference: float) -> float:
            return power(difference, math.sqrt(2) * deviation, count, nominal, samples, overlap=shared) - chance

        return points(float(brentq(lacks, 0, LARGEST)), "") if lacks(LARGEST) > 0 else "none"

    rows = [[str(count), *(cell(count, chance) for chance in CHANCES)] for count in counts if count <= looks.most]
    unit = "seeds per arm" if overlap is None else "splits"
    return [[unit, *(f"detected in {chance:.0%}" for chance in CHANCES)], *rows]


def _deviation(same: dict[str, list[RunRecord]]) -> tuple[float, str]:
    """Return the pooled standard deviation of runs that differ only in their seeds, and its source."""
    decisive = [run for runs in same.values() for run in runs]
    name = decisive_accuracy(decisive)
    groups = [[run.metrics[name] for run in runs if name in run.metrics] for runs in same.values()]
    groups = [group for group in groups if len(group) > 1]
    degrees = sum(len(group) - 1 for group in groups)
    found = math.sqrt(sum(statistics.variance(group) * (len(group) - 1) for group in groups) / max(1, degrees))
    return (found, f"that of {degrees + len(groups)} finished runs") if found else (GUESSED_DEVIATION, "a guess")


def _is_like(run: RunRecord, config: TrainConfig) -> bool:
    """Say whether a run has all settings, except the seed and the execution."""
    return all(run.params.get(name) == str(value) for name, value in config.flat().items() if name not in FREE)


def _timed(config: TrainConfig, load: LoadData, limit: float) -> float:
    """Estimate the seconds of a training, from its first steps except the very first."""
    training, ends, steps_of_all = Training(config, load(config.data)), list[float](), 0

    def on_step(step: int, steps: int) -> None:
        nonlocal steps_of_all
        ends.append(time.perf_counter())
        steps_of_all = steps * config.schedule.epochs
        if len(ends) > 1 and ends[-1] - ends[0] > limit:
            raise _TimeIsUp

    training.on_step = on_step
    with suppress(_TimeIsUp):
        next(iter(training))
    return (ends[-1] - ends[0]) / max(1, len(ends) - 1) * steps_of_all
