"""An Optuna study as a queue that ends with exactly the wanted number of trials, whichever processes are killed.

Each trial has a name and is enqueued once before any work on it. Workers lease, finish and give back trials under one
lock, which disappears with its process. If a worker is gone, its trial itself waits again, so none is lost or copied.
Work is done at least once: a worker that is killed between finishing a run and recording this leaves a finished run,
which the next worker finds by its identity.
"""

import math
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any, TypeVar, cast

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from effv2.core.errors import LeaseLost, StoreAway
from effv2.core.internals import trial_id
from effv2.core.processes import is_gone, this_process, uninterrupted
from effv2.core.secrets import masked
from effv2.studies.storage import (
    DATABASE_ERRORS,
    GRACE_SECONDS,
    HEARTBEAT_SECONDS,
    LEAVING_SECONDS,
    SECOND_LOOK_SECONDS,
    Storage,
)

Method = TypeVar("Method", bound=Callable[..., Any])
Params = Mapping[str, Any]
Trials = Mapping[str, FrozenTrial]  # by name
NOTHING_MORE: Params = {}
# User attributes of a trial.
NAME, OWNER, RUN, ERROR, FAILURES, LOST, FINAL = "slot", "owner", "run_id", "error", "failures", "lost", "final"
PRUNED_AT = "pruned_at"  # the epoch; Optuna's pruner answers each question only once
# System attributes of Optuna: parameters that the sampler must not change; the state of successive halving.
FIXED, RUNG = "fixed_params", "completed_rung_"
AHEAD = 8  # trials that are enqueued at a time
MOST_LOST = 5  # deaths of workers after which a trial is given up, because it may be the cause


def retried(method: Method) -> Method:
    """Repeat a method while the database doesn't answer; LeaseLost if another process has finished the trial."""

    @wraps(method)
    def repeated(self: "Queue", *args: Any, **kwargs: Any) -> Any:
        try:
            return self.storage.retry(lambda: method(self, *args, **kwargs))
        except UpdateFinishedTrialError:
            raise LeaseLost from None

    return cast(Method, repeated)


class Queue:
    """The trials of a study. `wanted` maps them to the wanted trials, by name, each with its fixed parameters."""

    def __init__(
        self, storage: Storage, study: str, retries: int, wanted: Callable[[Trials], Mapping[str, Params]]
    ) -> None:
        self.storage, self.study, self.retries, self.wanted = storage, study, retries, wanted
        try:
            self.study_id = storage.retry(lambda: storage.optuna.get_study_id_from_name(study))
        except KeyError:
            problem = f"The storage {storage.shown} no longer has the study: it was removed or replaced."
            raise StoreAway(problem) from None
        self._stale: dict[int, float] = {}  # trials without a heartbeat at the last look, and since when
        self._looked = -math.inf

    @retried
    def repeat(self, deleted: Collection[str]) -> int:
        """Enqueue wanted trials again if their finished run is among `deleted`. Return the number of these.

        Also enqueue trials that failed for a reason that may be gone. Their runs are resumed, with their reports and
        the state of their pruner.
        """
        repeated = 0
        with self.storage.lock(self.study), uninterrupted():  # a signal within a commit can appear as another error
            there = self._by_name()
            wanted = self.wanted(there)
            for name, trial in there.items():
                failed = trial.state == TrialState.FAIL and not trial.user_attrs.get(FINAL)
                lost = trial.state.is_finished() and trial.user_attrs.get(RUN) in deleted
                if name in wanted and (failed or lost):
                    self._enqueue(name, wanted[name] or trial.params, trial if failed else None)
                    repeated += not failed
        return repeated

    @retried
    def lease(self) -> FrozenTrial | None:
        """Lease the first waiting trial, after freeing those whose worker is gone; None if none waits."""
        with self.storage.lock(self.study), uninterrupted():
            running = self._running()
            if ours := next(filter(_is_ours, running), None):  # left from an earlier call whose answer was lost
                return ours
            self._free(running)
            if (trial := self._first_waiting()) is not None:
                # Owner and heartbeat before the state: a running trial always has both.
                self.storage.optuna.set_trial_user_attr(trial_id(trial), OWNER, this_process())
                self.storage.beat(trial_id(trial))
                self.storage.optuna.set_trial_state_values(trial_id(trial), TrialState.RUNNING)
            return trial

    @contextmanager
    def heartbeat(self, trial: FrozenTrial) -> Iterator[None]:
        """Keep the lease of a trial alive."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(HEARTBEAT_SECONDS):
                with suppress(*DATABASE_ERRORS):  # the database doesn't answer; others wait before they take the trial
                    self.storage.beat(trial_id(trial))

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(LEAVING_SECONDS)

    @retried
    @uninterrupted()
    def suggest(self, trial: FrozenTrial, sampler: BaseSampler | None, choose: Callable[[Trial], Params]) -> Params:
        """Let `choose` suggest the parameters of a trial. Earlier suggestions don't change."""
        study = optuna.load_study(study_name=self.study, storage=self.storage.optuna, sampler=sampler)
        return choose(Trial(study, trial_id(trial)))

    @retried
    @uninterrupted()
    def note_run(self, trial: FrozenTrial, run_id: str) -> None:
        """Record the run of the trial; LeaseLost if the trial is no longer ours."""
        self._own(trial)
        self.storage.optuna.set_trial_user_attr(trial_id(trial), RUN, run_id)

    @retried
    @uninterrupted()
    def report(self, trial: FrozenTrial, epoch: int, value: float, pruner: BasePruner | None = None) -> bool:
        """Record a value at an epoch, and return whether a pruner ends the trial; LeaseLost if it isn't ours."""
        storage, number = self.storage.optuna, trial_id(self._own(trial))
        storage.set_trial_intermediate_value(number, epoch, value)
        trial = storage.get_trial(number)
        pruned = trial.user_attrs.get(PRUNED_AT)  # an earlier attempt was pruned here, or got further without pruning
        if pruner is None or pruned is not None or (trial.last_step or 0) > epoch:
            return pruned is not None and epoch >= pruned
        if prunes := bool(pruner.prune(_Rivals(self.study, storage), trial)):
            storage.set_trial_user_attr(number, PRUNED_AT, epoch)
        return prunes

    @retried
    def finish(
        self, trial: FrozenTrial, state: TrialState, value: float, run_id: str, about: Params = NOTHING_MORE
    ) -> None:
        """Finish a trial with its value, its run and more attributes; LeaseLost if it isn't ours."""
        with self.storage.lock(self.study), uninterrupted():
            if not self._own(trial).state.is_finished():  # else the answer to an earlier attempt was lost
                self._set(trial, state, {**about, RUN: run_id}, value)

    @retried
    def fail(self, trial: FrozenTrial, error: str, final: bool) -> None:
        """Let a failed trial wait again, or FAIL it if no retries are left or another attempt would fail too."""
        with self.storage.lock(self.study), uninterrupted():
            now = self.storage.optuna.get_trial(trial_id(trial))
            if _is_ours(now) and now.state == TrialState.RUNNING:
                failures = now.user_attrs.get(FAILURES, 0) + 1
                state = TrialState.FAIL if final or failures > self.retries else TrialState.WAITING
                self._set(trial, state, {ERROR: masked(error), FAILURES: failures, FINAL: final})

    @retried
    def release(self) -> None:
        """Give back the trials of this process, for example after Ctrl-C, even during `lease`."""
        with self.storage.lock(self.study), uninterrupted():
            for trial in filter(_is_ours, self._running()):
                self._set(trial, TrialState.WAITING, {})

    @retried
    @uninterrupted()
    def trials(self) -> dict[str, FrozenTrial]:
        """Return the study's trials by name. Of repeated trials, return the last."""
        return self._by_name()

    def unfinished(self) -> list[str]:
        """Return the names of the wanted trials that are not finished."""
        trials = self.trials()
        return [name for name in self.wanted(trials) if name not in trials or not trials[name].state.is_finished()]

    @retried
    def deserted(self) -> bool:
        """Say whether no process is known to work on the study."""
        stale = self.storage.stale(self.study_id)
        return all(is_gone(trial.user_attrs[OWNER]) or trial_id(trial) in stale for trial in self._running())

    def _own(self, trial: FrozenTrial) -> FrozenTrial:
        """Return the current state of a leased trial; LeaseLost if it is no longer ours."""
        now = self.storage.optuna.get_trial(trial_id(trial))
        if not _is_ours(now):
            raise LeaseLost
        return now

    def _by_name(self) -> dict[str, FrozenTrial]:
        found = self.storage.optuna.get_all_trials(self.study_id, deepcopy=False)
        return {trial.user_attrs[NAME]: trial for trial in found if NAME in trial.user_attrs}

    def _running(self) -> list[FrozenTrial]:
        return [trial for trial in self._by_name().values() if trial.state == TrialState.RUNNING]

    def _first_waiting(self) -> FrozenTrial | None:
        """Return the oldest waiting trial. Without one, enqueue a few, since all would slow every look at the queue."""
        there = self._by_name()
        wanted = self.wanted(there)
        waiting = [each for name, each in there.items() if each.state == TrialState.WAITING and name in wanted]
        if waiting:
            return min(waiting, key=lambda trial: trial.number)
        new = [name for name in wanted if name not in there][:AHEAD]
        for name in new:
            self._enqueue(name, wanted[name])
        return self._by_name()[new[0]] if new else None

    def _enqueue(self, name: str, params: Params, failed: FrozenTrial | None = None) -> None:
        """Add a waiting trial. One that `failed` keeps its run, its reports and the state of its pruner."""
        trial = create_trial(state=TrialState.WAITING, user_attrs={NAME: name}, system_attrs={FIXED: dict(params)})
        if failed is not None:
            trial.user_attrs |= {key: value for key, value in failed.user_attrs.items() if key == RUN}
            trial.system_attrs |= {key: value for key, value in failed.system_attrs.items() if key.startswith(RUNG)}
            trial.intermediate_values = failed.intermediate_values
        self.storage.optuna.create_new_trial(self.study_id, trial)

    def _free(self, running: list[FrozenTrial]) -> None:
        """Let the trials of gone workers (by heartbeat if on other machines) wait again, or give them up."""
        now = time.monotonic()
        before = self._stale if now - self._looked <= GRACE_SECONDS else {}
        stale = self.storage.stale(self.study_id) if running else ()
        self._stale, self._looked = {each: before.get(each, now) for each in stale}, now
        for trial in running:
            missing = now - self._stale.get(trial_id(trial), math.inf) >= SECOND_LOOK_SECONDS
            if missing or is_gone(trial.user_attrs[OWNER]):
                lost: int = trial.user_attrs.get(LOST, 0) + 1
                state = TrialState.WAITING if lost < MOST_LOST else TrialState.FAIL
                self._set(trial, state, {LOST: lost, ERROR: f"its worker was gone, {lost} times"})

    def _set(self, trial: FrozenTrial, state: TrialState, attributes: Params, value: float | None = None) -> None:
        """Set attributes of a trial, then the state that they explain."""
        for name, attribute in attributes.items():
            self.storage.optuna.set_trial_user_attr(trial_id(trial), name, attribute)
        self.storage.optuna.set_trial_state_values(trial_id(trial), state, None if value is None else [value])
        self.storage.beat(trial_id(trial), ended=True)


class _Rivals(optuna.Study):
    """A study from the pruner's view: without failed trials and without diverged ones, which no pruner ended."""

    def get_trials(self, *arguments: Any, **options: Any) -> list[FrozenTrial]:
        there = super().get_trials(*arguments, **options)
        ended = TrialState.FAIL, TrialState.PRUNED
        return [each for each in there if each.state not in ended or PRUNED_AT in each.user_attrs]


def _is_ours(trial: FrozenTrial) -> bool:
    return bool(trial.user_attrs.get(OWNER) == this_process())
