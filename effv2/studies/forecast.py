"""A forecast of a grid before anything is created: runs, hours, and the differences that it can find."""

import math
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

from scipy.optimize import brentq

from effv2.config.options import StudyOptions
from effv2.config.schema import TrainConfig
from effv2.core.reporter import Reporter
from effv2.core.words import counted, duration, points
from effv2.data.dataset import LoadData
from effv2.evidence.protocols import FREE, has
from effv2.evidence.quantities import TRAIN_SECONDS
from effv2.evidence.statistics import EVERY_LOOK, FEWEST, LEVEL, Looks, power
from effv2.studies.earlier import DEFINITION, PARENT, earlier
from effv2.studies.engine import deleted_runs
from effv2.studies.grid import LOOKS, MAX_SEEDS, Grid
from effv2.studies.plan import run_ids
from effv2.studies.storage import check_storage, open_storage
from effv2.studies.worker import OpenedStudy
from effv2.tracking.addresses import OF_OPTUNA, tables_of
from effv2.tracking.read import RunRecord, decisive_accuracy, read_experiment, read_run
from effv2.tracking.store import tracking_faults
from effv2.tracking.studies import complete
from effv2.tracking.tags import CONFIG_HASH
from effv2.tracking.writer import TrackedRun
from effv2.training.loop import Training

TIMED_SECONDS = 15.0  # of training for all arms together, if there are no finished runs
GUESSED_DEVIATION = 0.02  # standard deviation of accuracy over seeds, if there are no finished runs
CHANCES = 0.5, 0.8, 0.95
LARGEST = 1.0  # differences, as fractions


def as_begun(plan: Any, experiment_id: str, options: StudyOptions) -> tuple[Any, int, int]:
    """Return the plan as in the study that it would resume, how many trials that has finished, and how many it wants.

    This creates nothing.
    """
    address = check_storage(options.storage)
    there = address.exists() if isinstance(address, Path) else tables_of(address) >= OF_OPTUNA
    if options.fresh or not there:
        return plan, 0, 0
    with tracking_faults(), closing(open_storage(options.storage)) as storage:
        for each in earlier(plan, storage, experiment_id)[2]:
            if (run := read_run(each.user_attrs[PARENT])) is not None:
                parent, plan = TrackedRun(run.run_id, experiment_id), plan.as_in(each.user_attrs[DEFINITION])
                queue = OpenedStudy(plan, options, each.study_name, parent, fresh=False).queue(storage)
                plan, trials = plan.resumed(run.params, partial(queue.began, note=False)), queue.trials()
                deleted, wanted = deleted_runs(trials, experiment_id), plan.wanted(trials).keys()
                done = wanted & {name for name, run_id in run_ids(trials).items() if run_id not in deleted}
                return plan, len(done), len(wanted)
    return plan, 0, 0


class _TimeIsUp(Exception):
    """Ends a training after its timing."""


def forecast(
    plan: Grid, options: StudyOptions, load: LoadData, experiment_id: str | None, reporter: Reporter, *, begun: bool
) -> tuple[list[str], list[list[str]]]:
    """Forecast a grid in sentences and a table, titles first, of the differences that it would find.

    The basis is finished runs of the same arms in the experiment, if there are any, otherwise a short timing. If the
    study has not `begun`, this also counts the runs that it would find finished.
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
    if plan.auto and most > FEWEST:
        count = f"{FEWEST * len(same)} to {most * len(same)} runs, as many as the verdicts need"
        one = sum(seconds.values())
        hours = f"{duration(FEWEST * one)} to {duration(most * one)}"
    else:
        planned = dict.fromkeys(seeds, FEWEST) if plan.auto else seeds
        count = f"{sum(planned.values())} runs"
        hours = duration(sum(planned[arm] * seconds[arm] for arm in planned))
    first = plan.auto.trials(dict.fromkeys(seeds, FEWEST)) if plan.auto else plan.trials
    hashes = set() if options.fresh or begun else {run.tags.get(CONFIG_HASH) for run in runs}
    reused = [params for params in first.values() if plan.configuration(params).hash() in hashes]
    saved = duration(sum(seconds[str(params["arm"])] for params in reused))
    how = [f"a timing of a few steps of {', '.join(timed)}"] if timed else []
    how += ["finished runs"] if len(timed) < len(same) else []
    shared = f"; {options.workers} workers share the machine" if options.workers > 1 else ""
    deviation, source = _deviation(same)
    lines = [
        f"{count}, about {hours} of training in total, by {' and '.join(how)}{shared}.",
        "Start-up, evaluation and logging take extra time.",
        *([f"Finished already: {counted(len(reused), 'run')} of these, which saves {saved}."] if reused else []),
        f"Differences from the baseline that verdicts would find, if the standard deviation over seeds is "
        f"{points(deviation, '')} ({source}). They grow in proportion to it.",
    ]
    once = plan.stamps.get(LOOKS) == "once"
    if once and plan.splits > 1:  # the mean of a split's seeds counts once
        deviation, most = deviation / math.sqrt(most), plan.splits
    counts = [most] if once else sorted({3, 6, 10, most, *(() if plan.auto else seeds.values())} - {1, 2})
    looks = Looks(most, once)
    if reused and MAX_SEEDS in plan.stamps:  # these runs had begun before the maximum was named
        looks = EVERY_LOOK
        lines.append(f"Reusing these runs widens the intervals to those of {looks.text()}; `fresh` repeats them.")
    return lines, _table(looks, counts, deviation, plan.overlap if plan.splits > 1 else None)


def _table(looks: Looks, counts: Sequence[int], deviation: float, overlap: float | None) -> list[list[str]]:
    """Return the differences of one arm that a number of seeds finds with certain probabilities.

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
    return [[unit, *(f"found in {chance:.0%} of studies" for chance in CHANCES)], *rows]


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
    return all(has(run, name, value) for name, value in config.flat().items() if name not in FREE)


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
