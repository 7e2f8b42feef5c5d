"""A forecast of a grid before anything is created: runs, hours, and the differences that it can find."""

import math
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
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
from effv2.evidence.protocols import FREE, has, looks_of, planned_looks
from effv2.evidence.quantities import TRAIN_SECONDS
from effv2.evidence.statistics import EVERY_LOOK, FEWEST, LEVEL, Looks, power
from effv2.studies.earlier import DEFINITION, PARENT, earlier
from effv2.studies.engine import deleted_runs
from effv2.studies.grid import Grid
from effv2.studies.plan import run_ids
from effv2.studies.queue import Params
from effv2.studies.storage import check_storage, open_storage
from effv2.studies.worker import OpenedStudy
from effv2.tracking.addresses import OF_OPTUNA, tables_of
from effv2.tracking.read import RunRecord, decisive_accuracy, read_experiment, read_run
from effv2.tracking.store import tracking_faults
from effv2.tracking.studies import complete
from effv2.tracking.tags import DATA_DIGEST, IDENTITY
from effv2.tracking.writer import TrackedRun
from effv2.training.loop import Training

TIMED_SECONDS = 15.0  # of training for all arms together, if there are no finished runs
GUESSED_DEVIATION = 0.02  # standard deviation of accuracy over seeds, if there are no finished runs
CHANCES = 0.5, 0.8, 0.95
LARGEST = 1.0  # differences, as fractions


def as_begun(plan: Any, experiment_id: str, options: StudyOptions) -> tuple[Any, RunRecord | None, int, int]:
    """Return the plan as in the study that it would resume, that study's run, and its finished and wanted trials.

    Without such a study, there is no run and no trials. This creates nothing.
    """
    address = check_storage(options.storage)
    there = address.exists() if isinstance(address, Path) else tables_of(address) >= OF_OPTUNA
    if options.fresh or not there:
        return plan, None, 0, 0
    with tracking_faults(), closing(open_storage(options.storage)) as storage:
        for each in earlier(plan, storage, experiment_id)[2]:
            if (run := read_run(each.user_attrs[PARENT])) is not None:
                parent, plan = TrackedRun(run.run_id, experiment_id), plan.as_in(each.user_attrs[DEFINITION])
                queue = OpenedStudy(plan, options, each.study_name, parent, fresh=False).queue(storage)
                plan, trials = plan.resumed(run.params, partial(queue.began, note=False)), queue.trials()
                deleted, wanted = deleted_runs(trials, experiment_id), plan.wanted(trials).keys()
                done = wanted & {name for name, run_id in run_ids(trials).items() if run_id not in deleted}
                return plan, run, len(done), len(wanted)
    return plan, None, 0, 0


def forecast(
    plan: Grid,
    options: StudyOptions,
    load: LoadData,
    experiment_id: str | None,
    reporter: Reporter,
    *,
    begun: RunRecord | None,
) -> tuple[list[str], list[list[str]]]:
    """Forecast a grid in sentences and a table, titles first, of the differences that it would find.

    The basis is finished runs of the same arms in the experiment, if there are any, otherwise a short timing. `begun`
    is the run of the study that would be resumed. Without one, this also counts the runs that it would find finished.
    """

    runs = complete(read_experiment(experiment_id, ())) if experiment_id is not None else []
    seeds = Counter(str(params["arm"]) for params in plan.trials.values())
    digests = {_identity(plan, load, params)[1] for params in plan.trials.values()}
    runs = [run for run in runs if run.tags.get(DATA_DIGEST) in digests]
    same = {arm: [run for run in runs if _is_like(run, plan.arms[arm])] for arm in sorted(seeds)}
    seconds, how = _seconds(plan, load, same, reporter)
    planned = planned_looks(begun.params if begun else {name: str(value) for name, value in plan.stamps.items()})
    first = plan.auto.trials(dict.fromkeys(seeds, FEWEST)) if plan.auto else plan.trials
    newest = {} if options.fresh else {tuple(run.tags.get(tag, "") for tag in IDENTITY): run for run in runs}
    finished = {name: newest.get(_identity(plan, load, params)) for name, params in first.items()}
    reused = [name for name, run in finished.items() if run]
    took = {name: seconds[str(params["arm"])] for name, params in first.items()}
    count, hours = f"{len(first)} runs", duration(sum(took.values()))
    if plan.auto and planned.most > FEWEST:
        count = f"{len(first)} to {planned.most * len(same)} runs, as many as the verdicts need"
        hours += f" to {duration(planned.most * sum(seconds.values()))}"
    saved = duration(sum(took[name] for name in reused))
    already = [f"Finished already: {counted(len(reused), 'run')} of these, which saves {saved}."] if reused else []
    shared = f"; {options.workers} workers share the machine" if options.workers > 1 else ""
    deviation, source = _deviation(same)
    lines = [
        f"{count}, about {hours} of training in total, estimated from {how}{shared}.",
        "Start-up, evaluation and logging take extra time.",
        *([] if begun else already),
        f"Differences from the baseline that verdicts would find, if the standard deviation over seeds is "
        f"{points(deviation, '')} ({source}). They grow in proportion to it.",
    ]
    looks = looks_of(begun, filter(None, finished.values())) if begun else EVERY_LOOK if reused else planned
    if looks != planned:
        lines.append(f"Reusing these runs widens the intervals to those of {looks.text()}; `fresh` repeats them.")
    return lines, _table(plan, planned, looks, deviation)


def _seconds(
    plan: Grid, load: LoadData, same: Mapping[str, Sequence[RunRecord]], reporter: Reporter
) -> tuple[dict[str, float], str]:
    """Return the seconds of a training of each arm, from the same runs or a short timing, and which of these."""
    known = {arm: [each.metrics[TRAIN_SECONDS] for each in same[arm] if TRAIN_SECONDS in each.metrics] for arm in same}
    seconds = {arm: statistics.fmean(each) for arm, each in known.items() if each}
    timed = [arm for arm in same if arm not in seconds]
    for arm in timed:
        reporter.progress(f"timing a few steps of {arm}")
        seconds[arm] = _timed(plan.arms[arm], load, TIMED_SECONDS / len(same))
    how = [f"a timing of a few steps of {', '.join(timed)}"] if timed else []
    return seconds, " and ".join([*how, *(["finished runs"] if len(timed) < len(same) else [])])


def _identity(plan: Grid, load: LoadData, params: Params) -> tuple[str, str, str]:
    """Return what the tags IDENTITY of a trial's run are, or will be."""
    config = plan.configuration(params)
    return config.hash(), load(config.data).digest(), plan.definition["code"]


def _table(plan: Grid, planned: Looks, looks: Looks, deviation: float) -> list[list[str]]:
    """Return the differences of one arm that a number of seeds finds with certain probabilities.

    With several splits, it is a number of splits, and the arms are paired by split.
    """
    most, samples, unit = planned.most, 2, "seeds per arm"
    if plan.splits > 1:
        samples, unit = 1, "splits"
        if planned.once:  # then the mean of a split's seeds counts once, otherwise its first seed
            deviation, most = deviation / math.sqrt(most if looks.once else 1), plan.splits
    listed = () if plan.auto else Counter(params["arm"] for params in plan.trials.values()).values()
    counts = {most} if planned.once else {3, 6, 10, most, *listed}
    nominal = looks.nominal(LEVEL, samples)

    def cell(count: int, chance: float) -> str:
        def lacks(difference: float) -> float:
            return power(difference, math.sqrt(2) * deviation, count, nominal, samples, overlap=plan.overlap) - chance

        return points(float(brentq(lacks, 0, LARGEST)), "") if lacks(LARGEST) > 0 else "none"

    shown = sorted(each for each in counts if FEWEST <= each <= most)
    rows = [[str(count), *(cell(count, chance) for chance in CHANCES)] for count in shown]
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
            raise TimeoutError

    training.on_step = on_step
    with suppress(TimeoutError):
        next(iter(training))
    return (ends[-1] - ends[0]) / max(1, len(ends) - 1) * steps_of_all
