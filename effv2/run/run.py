"""One training run: found finished, resumed if it ended early, or trained from its beginning."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import yaml

from effv2.config.options import CheckpointOptions, StudyOptions
from effv2.config.schema import TrainConfig
from effv2.core import provenance
from effv2.core.errors import Diverged, InputError, RunError, Terminated, what_ran_out
from effv2.core.processes import is_alive, this_process
from effv2.core.reporter import Message, Reporter
from effv2.core.words import differences
from effv2.data.dataset import Dataset, LoadData, load_once
from effv2.data.inspection import contact_sheet, in_short
from effv2.execution import norms
from effv2.execution.resolve import remembered, resolve_study, with_device
from effv2.run.few_images import in_words, with_length
from effv2.run.initial import initialise, origin, with_weights
from effv2.run.records import keep_weights, log_end, log_network
from effv2.tracking import tags as tag
from effv2.tracking.models import model_address
from effv2.tracking.read import RunRecord, artifact_names, download, find_runs, reached_accuracy, read_run
from effv2.tracking.run import CHECKPOINTS, PATIENCE, OpenRun, end_left_open, open_experiment, open_run
from effv2.tracking.store import TRACKING_ERRORS, tracking_faults
from effv2.tracking.writer import TrackedRun, check_metric_name
from effv2.training.checkpoint import Checkpointer
from effv2.training.evaluation import EPOCH_METRICS
from effv2.training.loop import Training
from effv2.training.progress import watched_accuracy
from effv2.training.stages import check_stages, stages_of

FIRST_LOGGED = "time/epoch_seconds"  # a metric of each epoch: the start of the run is logged before it


@dataclass(frozen=True)
class RunSpec:
    """How a run is named, grouped and stored, and how its study follows and controls it.

    `parent` is the id of the parent run. `previous` is the id of the run of an earlier attempt at the same trial. It is
    None for a single run, which belongs to no queue. With `fresh`, runs from before the study, or before the single run
    itself, don't count.
    """

    name: str
    experiment_id: str
    study: str = ""
    arm: str = ""
    parent: str = ""
    log_model: bool = True
    checkpoints: CheckpointOptions = field(default_factory=CheckpointOptions)
    fresh: bool = False
    previous: str | None = None
    reporter: Reporter = field(default_factory=Reporter)
    patience: float = PATIENCE  # seconds that the end of the run waits for an unreachable tracking store
    run_opened: Callable[[str], None] = lambda run_id: None
    epoch_ended: Callable[[int, float], bool] = lambda epoch, best: False  # best accuracy so far; whether to prune
    keeps_weights: Callable[[float], bool] = lambda accuracy: False  # whether the weights must outlive the process

    def open_run(self, tags: Mapping[str, str], resumes: str = "") -> AbstractContextManager[OpenRun]:
        """Open the run with these tags; with `resumes` the run of that id again."""
        about = {**tags, tag.STUDY: self.study, **({} if self.parent else {tag.COMMAND: provenance.COMMAND.get()})}
        how: dict[str, Any] = {"message": self.reporter.message, "patience": self.patience}
        return open_run(self.name, self.experiment_id, about, parent=self.parent, resumes=resumes, **how)


@dataclass(frozen=True)
class Attempt:
    """The run with the result, its last metrics, and the accuracy that it is judged by."""

    run: TrackedRun
    metrics: Mapping[str, float]
    accuracy: float
    pruned: bool = False
    found: RunRecord | None = None  # this run, if an earlier command finished it: nothing was computed
    model_address: str = ""  # of a single run


def prepare(configs: Sequence[TrainConfig], load: LoadData, message: Message) -> list[TrainConfig]:
    """Load and check the data of runs, then resolve `auto` and length for all; InputError before any run is created."""
    for name in EPOCH_METRICS:
        check_metric_name(name)
    configs = with_length(with_weights(list(map(with_device, configs)), load, message), load, message)
    for config in configs:
        check_stages(config)
        dataset, outputs = load(config.data), config.model.outputs
        for stage in stages_of(config):
            dataset.at_size(stage.image_size)  # images of all stages are decoded before a run is created
        if 0 < outputs < len(dataset.classes):
            problem = f"the data has {len(dataset.classes)} classes"
            raise InputError("model.outputs", outputs, problem, "give at least as many outputs, or 0")
        if not config.evaluation.test_set and dataset.validation is None:
            problem = "there is no validation split, and the test set is not evaluated: nothing would be measured"
            raise InputError("data.validation_fraction", 0, problem, "give a share, such as 0.1")
    return resolve_study(configs, message)


def train_single(config: TrainConfig, name: str, study: str, options: StudyOptions, reporter: Reporter) -> Attempt:
    """Make a single run, from its settings to its end. InputError before any run is created."""
    load = load_once(reporter)
    (config,) = prepare([config], load, reporter.message)
    with tracking_faults():
        reporter.progress("opening the tracking store")
        where, keeps = open_experiment(options.experiment, reporter.message), options.log_model != "none"
        spec = RunSpec(name, where, study, log_model=keeps, checkpoints=options, fresh=options.fresh, reporter=reporter)
        ended = attempt(config, load(config.data), spec)
        words = in_words(ended.metrics, load(config.data)) if config.evaluation.test_set else []
        for line in words:
            reporter.message(line)
        if words and not ended.found:
            ended.run.describe("\n\n".join(words))
        return replace(ended, model_address=model_address(ended.run.run_id))


def attempt(config: TrainConfig, dataset: Dataset, spec: RunSpec) -> Attempt:
    """Find the finished run of a resolved configuration, resume it if it ended early, or train it.

    Steps in its last checkpoint are not trained again, and metrics in the store are not logged again. When the training
    has ended, a checkpoint is written before anything waits for the store. From this checkpoint, the same command
    delivers what the store lacks. TrackingAway if the store is unreachable for longer than the run waits at its end.
    """
    tags = _tags(config, dataset)
    earlier = find_earlier(tags, spec)
    keeping = spec.checkpoints, _identity(tags), spec.reporter.message
    if earlier is not None:
        there = TrackedRun(earlier.run_id, spec.experiment_id)
        there.take_over_adopted()
        checkpointer = Checkpointer(earlier.run_id, *keeping)
        if earlier.status == "FINISHED":
            checkpointer.remove()  # if only the status was missing
            pruned = earlier.tags.get(tag.OUTCOME) == "pruned"
            return Attempt(there, earlier.metrics, reached_accuracy(earlier), pruned, earlier)
        _compare_norms(earlier, tags, spec.reporter)
    elif config.model.weights:
        tags[tag.WEIGHTS] = origin(config, dataset.classes)  # before the run is created: it may fail
    _must_be_alone(tags, spec)
    try:
        with ExitStack() as stack:
            if earlier is not None:
                stack.enter_context(checkpointer.lock())  # before the store knows it
            resumes = "" if earlier is None else earlier.run_id
            group = f"{spec.arm or config.model.variant}, {spec.study or 'train'}: {config.in_short}"
            run = stack.enter_context(spec.open_run(tags | {tag.ARM: spec.arm, tag.GROUP: group}, resumes))
            stack.enter_context(what_ran_out())
            spec.run_opened(run.run_id)
            if earlier is None:
                checkpointer = Checkpointer(run.run_id, *keeping)
                stack.enter_context(checkpointer.lock())
                _must_be_alone(tags, spec, run)
            if earlier is None or FIRST_LOGGED not in earlier.metrics:
                _log_beginning(run, config, dataset, earlier.params if earlier else {})
            ended = _train(config, dataset, spec, run, checkpointer)
            if run.resumed or spec.checkpoints.checkpoint_upload_minutes:  # perhaps uploaded by an earlier command
                run.discard(CHECKPOINTS)
            run.complete("pruned" if ended.pruned else "complete")
    except Diverged:  # it would diverge again, so the checkpoints aren't needed once the store has the result
        if run.delivered:
            checkpointer.remove()
            with suppress(*TRACKING_ERRORS):
                run.discard(CHECKPOINTS)
        raise
    checkpointer.remove()
    return ended


def _tags(config: TrainConfig, dataset: Dataset) -> dict[str, str]:
    """Return the identity of a run, and the resolved settings of this machine."""
    code, variant, seed = provenance.code_version(), config.model.variant, config.random.seed
    tags = tag.run_tags(config.hash(), dataset.digest(), code, variant, seed)
    if config.execution.device == "cpu":
        tags[tag.NORMS] = "compiled" if norms.compiled() else "torch"
        tags |= {tag.CALIBRATION: str(timed)} if (timed := remembered(config)) else {}
    return tags


def _identity(tags: Mapping[str, str]) -> dict[str, str]:
    """Return the identity in the tags of a run."""
    return {name.removeprefix("effv2."): tags.get(name, "") for name in tag.IDENTITY}


def _compare_norms(earlier: RunRecord, tags: Mapping[str, str], reporter: Reporter) -> None:
    """Warn before a run is resumed with the other form of batch norm."""
    before, now = earlier.tags.get(tag.NORMS), tags.get(tag.NORMS)
    if before and before != now:
        reporter.message(f"Batch norm was {before} in the run {earlier.run_id} and is {now} now. Digits may differ.")


def _must_be_alone(tags: Mapping[str, str], spec: RunSpec, run: OpenRun | None = None) -> None:
    """Refuse a single run that another process of this machine already trains. Of two that begin at once, the later.

    A `run` that was opened in vain then loses its identity, so that it is not resumed. Studies have their queue, and
    with `fresh` a second run is intended.
    """
    if spec.previous is not None or spec.fresh:
        return
    known = find_runs(spec.experiment_id, {tag.CONFIG_HASH: tags[tag.CONFIG_HASH]}, running=True)
    equal = [each for each in known if _identity(each.tags) == _identity(tags)]
    ours = next(((each.started, each.run_id) for each in equal if run and each.run_id == run.run_id), None)
    for each in equal:
        process = each.tags.get(tag.PROCESS, "")
        first = ours is None or (each.started, each.run_id) < ours
        if first and not each.parent and process != this_process() and is_alive(process):
            if run:
                run.set_tags({tag.CONFIG_HASH: ""})
            problem = f"Another process trains this configuration, with equal data and code, in the run {each.run_id}"
            raise RunError(f"{problem}; wait for it, or repeat it with `fresh`.")


def _log_beginning(run: OpenRun, config: TrainConfig, dataset: Dataset, known: Mapping[str, str]) -> None:
    """Log the facts that are known before the first epoch, except the params `known`, which a resumed run has.

    They may differ now, as the data folder can, and the store would refuse them.
    """
    run.log_params({name: value for name, value in config.flat().items() if name not in known})
    # This is the first file, so that a failing artifact store is noticed before any training.
    run.log_text(study_text(config), "study.yaml")
    run.log_git()
    if dataset.notes:
        broken = (f"{id_}: {why}" for id_, why in dataset.broken.items())
        run.log_text("\n".join([*dataset.notes, *broken, ""]), "data_notes.txt")
    with run.new_artifacts() as folder:
        contact_sheet(dataset).save(folder / "images.jpg")
    for name, split in dataset.splits.items():
        counts = np.bincount(split.labels.numpy(), minlength=len(dataset.classes)).tolist()
        profile: dict[str, Any] = {"images": len(split), "classes": dict(zip(dataset.classes, counts, strict=True))}
        if name != "train":
            profile["images_also_in_train"] = len(split.also_in(dataset.train))
        run.log_dataset(dataset.name, name, split.digest, dataset.location, profile)


def study_text(config: TrainConfig, name: str = "again") -> str:
    """Write `config` as a study file that `train` can run."""
    groups = config.model_dump()
    table = str(config.model.build_table())
    command = "# mlflow run . -e train -P study=<this file>"
    return f"{command}\n# Architecture: {table}\n" + yaml.safe_dump({"name": name, "config": groups}, sort_keys=False)


def find_earlier(tags: Mapping[str, str], spec: RunSpec) -> RunRecord | None:
    """Return the run of this identity from earlier commands: a finished one, or an unfinished one to resume.

    For a trial with an earlier attempt, it is the run of that attempt, which is ended if a dead process left it open. A
    run that a live process works on is not touched. Without a queue, it is the last interrupted run outside of any
    study, unless another run finished after that one began. A fresh study only counts its own finished runs.
    """
    if spec.fresh and spec.previous is None:
        return None
    before = read_run(spec.previous) if spec.previous else None
    if before is not None and _is_worked_on(before, spec):
        before = None
    if before is not None and (end_left_open(before.run_id) or before.status == "FINISHED"):
        return read_run(before.run_id)
    alike = {tag.CONFIG_HASH: tags[tag.CONFIG_HASH]} | ({tag.PARENT: spec.parent} if spec.fresh else {})
    known = find_runs(spec.experiment_id, alike, running=False)
    equal = [run for run in known if _identity(run.tags) == _identity(tags)]
    complete = (run for run in equal if run.status == "FINISHED" and run.tags.get(tag.OUTCOME) == "complete")
    finished = next(complete, None)
    if spec.previous is not None:
        return finished or before
    single = [run for run in known if run.status != "FINISHED" and not run.parent]
    last = next((run for run in single if run in equal), None)
    if last is not None and (finished is None or last.started >= finished.ended):
        return last
    if single and last is None and finished is None:
        words = "; ".join(differences(_identity(single[0].tags), _identity(tags)))
        spec.reporter.message(f"The run {single[0].run_id} that ended early can't be resumed: {words}.")
    return finished


def _is_worked_on(run: RunRecord, spec: RunSpec) -> bool:
    """Say whether another process works on a run: one of this machine, even if suspended, or of another machine."""
    process = run.tags.get(tag.PROCESS, "")
    here = run.status == "RUNNING" and process != this_process() and is_alive(process)
    return here or Checkpointer(run.run_id, spec.checkpoints, {}, spec.reporter.message).is_locked()


def _begun(
    config: TrainConfig, dataset: Dataset, run: OpenRun, checkpointer: Checkpointer, message: Message
) -> Training:
    """Return a training at a run's last checkpoint, or without one, at its initial weights, which are read again."""
    if run.resumed:
        here, uploaded = checkpointer.folder, artifact_names(run.run_id, CHECKPOINTS)
        saved = checkpointer.read(uploaded, lambda name: download(run.run_id, f"{CHECKPOINTS}/{name}", here))
        if saved is not None:
            training = Training(config, dataset)
            training.state.load_state_dict(saved)
            done = training.state.progress.epoch
            where = f"at epoch {done + 1}" if done < config.schedule.epochs else "after its last epoch"
            message(f"resuming the run {run.run_id} {where}")
            return training
        message(f"starting the run {run.run_id} again at epoch 1: it has no checkpoint here or in its artifacts")
    return Training(config, dataset, initialise=initialise(config, dataset.classes))


def _train(config: TrainConfig, dataset: Dataset, spec: RunSpec, run: OpenRun, checkpointer: Checkpointer) -> Attempt:
    """Train from the run's last checkpoint, if it has one, and log each epoch and the results.

    A checkpoint is written on an ending signal and at the end of the training. The results follow from the last one.
    """
    reporter = spec.reporter
    training = _begun(config, dataset, run, checkpointer, reporter.message)
    if not (run.resumed or spec.parent):
        for line in in_short(dataset):
            reporter.message(line)
    reporter.run_started(spec.name, config.schedule.epochs)
    state = training.state
    if spec.checkpoints.checkpoint_upload_minutes:
        checkpointer.upload = run.upload_checkpoint
    if training.execution.compiled:
        reporter.message("compiling the blocks: the first step takes a minute or two, unless it was done before")
    if run.resumed:
        for epoch, metrics in enumerate(state.progress.history, 1):
            run.log_metrics(metrics, step=epoch)  # epochs in the store are not logged again
    run.sender.check()

    def on_step(step: int, steps: int) -> None:
        reporter.step(state.progress.epoch + 1, step, steps, state.sums.images / state.sums.seconds)
        checkpointer.save_if_due(state, epoch_ended=False)

    training.on_step = on_step
    try:
        for metrics in training:
            epoch, best = state.progress.epoch, state.progress.best_accuracy
            evaluated = watched_accuracy(metrics) is not None
            pruned = evaluated and spec.epoch_ended(epoch, best)  # first: another process may have the trial
            run.log_metrics(metrics, step=epoch)
            checkpointer.save_if_due(state, epoch_ended=True)
            reporter.epoch(epoch, metrics, best)
            if pruned:
                run.log_metrics({"selected/val_accuracy": best})
                return Attempt(run, metrics, best, pruned)
    except (KeyboardInterrupt, Terminated):
        checkpointer.save(state, leaving=True)
        raise
    checkpointer.save(state)
    reporter.progress("logging the results")
    state.take_selected()
    if spec.keeps_weights(state.progress.best_accuracy):
        keep_weights(run, state.evaluated)
    summary = log_end(run, training)
    if spec.log_model:
        reporter.progress("logging the model")
        log_network(run, training)
    return Attempt(run, summary, state.progress.best_accuracy)
