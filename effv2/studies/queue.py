"""An Optuna study as a queue that ends with exactly as many trials as it has slots, whatever is killed.

Each slot is enqueued once, as a waiting trial, before it is worked on. Workers claim, finish and give back trials
under one lock that dies with its process. The trial of a worker that is gone waits again, in place, so that none is
lost or copied. Work is done at least once: a worker killed between finishing and saying so leaves a finished run
behind, which the next one finds by its identity.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, TypeVar

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from effv2.core.errors import LeaseLost
from effv2.core.processes import is_gone, this_process
from effv2.studies.storage import DATABASE_ERRORS, GRACE_SECONDS, HEARTBEAT_SECONDS, HURRY_SECONDS, Storage, patient

T = TypeVar("T")
Params = Mapping[str, Any]
# User attributes of a trial.
SLOT, OWNER, RUN, ERROR, FAILURES, LOST, FINAL = "slot", "owner", "run_id", "error", "failures", "lost", "final"
RUNG = "completed_rung_"  # system attributes in which successive halving keeps a trial's values
AHEAD = 8  # so many slots are enqueued at a time
MOST_LOST = 5  # a trial whose workers died so often is given up: it may be what kills them
# A worker on another machine is gone if its heartbeat stays out for so long after it was first found missing: after
# an outage of the database every heartbeat is old for a moment.
SECOND_LOOK_SECONDS = 2 * HEARTBEAT_SECONDS


@dataclass(frozen=True)
class Claim:
    """A trial that this process works on, and the run that an earlier attempt left."""

    trial_id: int
    number: int
    slot: str
    previous_run: str


class Queue:
    """The slots of one study that are wanted here."""

    def __init__(self, storage: Storage, study: str, retries: int, wanted: Mapping[str, Params]) -> None:
        self.storage, self.study, self.retries, self.wanted = storage, study, retries, wanted
        self.study_id = patient(storage.optuna.get_study_id_from_name)(study)
        self._stale: dict[int, tuple[float, float]] = {}  # trial: when it was first and last seen without heartbeat

    @patient
    def retry_failed(self) -> None:
        """Enqueue once more the wanted slots that failed for a reason that may have gone; their runs go on."""
        with self.storage.lock(self.study):
            for slot, trial in self._by_slot().items():
                if slot in self.wanted and trial.state == TrialState.FAIL and not trial.user_attrs.get(FINAL):
                    self._enqueue(slot, self.wanted[slot] or trial.params)
                    self._take_over(self._by_slot()[slot]._trial_id, trial)

    @patient
    def repeat(self, lost: Collection[str]) -> int:
        """Enqueue once more the wanted slots that were finished by runs which are no longer there; say how many."""
        with self.storage.lock(self.study):
            again = [
                (slot, trial)
                for slot, trial in self._by_slot().items()
                if slot in self.wanted and trial.state.is_finished() and trial.user_attrs.get(RUN) in lost
            ]
            for slot, trial in again:
                self._enqueue(slot, self.wanted[slot] or trial.params)
        return len(again)

    @patient
    def claim(self) -> Claim | None:
        """Take the first waiting trial, after freeing those whose worker is gone; None where none waits."""
        with self.storage.lock(self.study):
            trials = self._by_slot()
            for trial in trials.values():  # left over where the answer to an earlier claim was lost
                if trial.state == TrialState.RUNNING and self._owns(trial):
                    return self._claim_of(trial)
            gone = self._gone([trial for trial in trials.values() if trial.state == TrialState.RUNNING])
            for trial in gone:
                self._free(trial)
            waiting = self._waiting()
            if not waiting:
                self._enqueue_some()
                waiting = self._waiting()
            if not waiting:
                return None
            trial = waiting[0]
            storage, trial_id = self.storage.optuna, trial._trial_id
            # Owner and heartbeat before the state: a running trial always has both.
            storage.set_trial_user_attr(trial_id, OWNER, this_process())
            storage.record_heartbeat(trial_id)
            storage.set_trial_state_values(trial_id, TrialState.RUNNING)
            return self._claim_of(trial)

    @contextmanager
    def heartbeat(self, claim: Claim) -> Iterator[None]:
        """Keep the claim alive."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(HEARTBEAT_SECONDS):
                with suppress(*DATABASE_ERRORS):  # the database is away; others look twice before they take the trial
                    self.storage.optuna.record_heartbeat(claim.trial_id)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(HURRY_SECONDS)

    @patient
    def suggest(self, claim: Claim, sampler: optuna.samplers.BaseSampler, choose: Callable[[optuna.Trial], T]) -> T:
        """Let `choose` suggest the parameters of a trial; those that were suggested before stay as they were."""
        study = optuna.load_study(study_name=self.study, storage=self.storage.optuna, sampler=sampler)
        return choose(optuna.Trial(study, claim.trial_id))

    @patient
    def note_run(self, claim: Claim, run_id: str) -> None:
        """Record which run works on the trial; LeaseLost if the trial is no longer ours."""
        with self._ours(claim):
            self.storage.optuna.set_trial_user_attr(claim.trial_id, RUN, run_id)

    @patient
    def report(self, claim: Claim, epoch: int, value: float) -> None:
        """Record the value reached at an epoch; LeaseLost if the trial is no longer ours."""
        with self._ours(claim):
            self.storage.optuna.set_trial_intermediate_value(claim.trial_id, epoch, value)

    @patient
    def prunes(self, claim: Claim, epoch: int, pruner: optuna.pruners.BasePruner) -> bool:
        """Ask the pruner whether the trial should end, after the report of an epoch."""
        trial = self.storage.optuna.get_trial(claim.trial_id)
        if (trial.last_step or 0) > epoch:  # an earlier attempt had come further, and was not pruned
            return False
        study = optuna.load_study(study_name=self.study, storage=self.storage.optuna, pruner=pruner)
        return bool(pruner.prune(study, trial))

    @patient
    def finish(
        self, claim: Claim, state: Literal[TrialState.COMPLETE, TrialState.PRUNED], value: float, run_id: str
    ) -> None:
        """Tell a trial's value, and the run that reached it; LeaseLost if the trial is no longer ours."""
        with self.storage.lock(self.study):
            trial = self.storage.optuna.get_trial(claim.trial_id)
            if not self._owns(trial):
                raise LeaseLost
            if not trial.state.is_finished():  # else the answer to an earlier attempt to tell was lost
                self.storage.optuna.set_trial_user_attr(claim.trial_id, RUN, run_id)
                self.storage.optuna.set_trial_state_values(claim.trial_id, state, [value])

    @patient
    def fail(self, claim: Claim, error: str, final: bool) -> None:
        """Let a failed trial wait again, or FAIL it where its retries are spent or another attempt would fail alike."""
        with self.storage.lock(self.study):
            trial = self.storage.optuna.get_trial(claim.trial_id)
            if self._owns(trial) and trial.state == TrialState.RUNNING:
                failures = trial.user_attrs.get(FAILURES, 0) + 1
                again = failures <= self.retries and not final
                attributes = {ERROR: error, FAILURES: failures, FINAL: final}
                self._leave(claim.trial_id, TrialState.WAITING if again else TrialState.FAIL, attributes)

    @patient
    def release(self) -> None:
        """Give back what this process works on, as on Ctrl-C, even where it was told while claiming."""
        with self.storage.lock(self.study):
            for trial in self._by_slot().values():
                if trial.state == TrialState.RUNNING and self._owns(trial):
                    self._leave(trial._trial_id, TrialState.WAITING, {})

    @patient
    def trials(self) -> dict[str, FrozenTrial]:
        """Return the study's trials by slot, of those that were repeated the last."""
        return self._by_slot()

    def unfinished(self) -> list[str]:
        """Return the wanted slots that are not finished."""
        finished = {slot for slot, trial in self.trials().items() if trial.state.is_finished()}
        return [slot for slot in self.wanted if slot not in finished]

    @patient
    def deserted(self) -> bool:
        """Say whether nobody works on the study, as far as can be seen."""
        running = [trial for trial in self._by_slot().values() if trial.state == TrialState.RUNNING]
        stale = set(self.storage.optuna._get_stale_trial_ids(self.study_id)) if running else set()
        return all(is_gone(trial.user_attrs[OWNER]) or trial._trial_id in stale for trial in running)

    @contextmanager
    def _ours(self, claim: Claim) -> Iterator[None]:
        """Write to a trial that is ours and unfinished; LeaseLost otherwise."""
        if not self._owns(self.storage.optuna.get_trial(claim.trial_id)):
            raise LeaseLost
        try:
            yield
        except UpdateFinishedTrialError:
            raise LeaseLost from None

    def _enqueue_some(self) -> None:
        """Enqueue the next slots that were never enqueued; all at once would slow every look at the queue."""
        there = self._by_slot()
        for slot in islice((slot for slot in self.wanted if slot not in there), AHEAD):
            self._enqueue(slot, self.wanted[slot])

    def _enqueue(self, slot: str, params: Params) -> None:
        study = optuna.load_study(study_name=self.study, storage=self.storage.optuna)
        study.enqueue_trial(dict(params), {SLOT: slot})

    def _take_over(self, trial_id: int, failed: FrozenTrial) -> None:
        """Give a trial the run of the one that it tries again, and what was reported and asked of the pruner of it."""
        storage = self.storage.optuna
        if run_id := failed.user_attrs.get(RUN):
            storage.set_trial_user_attr(trial_id, RUN, run_id)
        for epoch, value in failed.intermediate_values.items():
            storage.set_trial_intermediate_value(trial_id, epoch, value)
        for name, value in failed.system_attrs.items():
            if name.startswith(RUNG):
                storage.set_trial_system_attr(trial_id, name, value)

    def _waiting(self) -> list[FrozenTrial]:
        """Return the wanted trials that wait, the oldest first."""
        found = (trial for slot, trial in self._by_slot().items() if slot in self.wanted)
        return sorted((trial for trial in found if trial.state == TrialState.WAITING), key=lambda trial: trial.number)

    def _by_slot(self) -> dict[str, FrozenTrial]:
        found = self.storage.optuna.get_all_trials(self.study_id, deepcopy=False)
        by_slot: dict[str, FrozenTrial] = {}
        for trial in found:
            if (slot := trial.user_attrs.get(SLOT)) is not None:
                by_slot[slot] = trial
        return by_slot

    def _claim_of(self, trial: FrozenTrial) -> Claim:
        return Claim(trial._trial_id, trial.number, trial.user_attrs[SLOT], trial.user_attrs.get(RUN, ""))

    def _owns(self, trial: FrozenTrial) -> bool:
        return bool(trial.user_attrs.get(OWNER) == this_process())

    def _gone(self, running: list[FrozenTrial]) -> list[FrozenTrial]:
        """Return the running trials whose worker is gone: seen on this machine, by heartbeat elsewhere."""
        if not running:
            return []
        now = time.monotonic()
        before, self._stale = self._stale, {}
        for trial_id in self.storage.optuna._get_stale_trial_ids(self.study_id):
            first, last = before.get(trial_id, (now, now))
            self._stale[trial_id] = (first if now - last <= GRACE_SECONDS else now, now)
        missing = {trial_id for trial_id, (first, _) in self._stale.items() if now - first >= SECOND_LOOK_SECONDS}
        return [trial for trial in running if is_gone(trial.user_attrs[OWNER]) or trial._trial_id in missing]

    def _free(self, trial: FrozenTrial) -> None:
        """Let the trial of a gone worker wait again, or give it up."""
        lost: int = trial.user_attrs.get(LOST, 0) + 1
        again = lost < MOST_LOST
        attributes = {LOST: lost, ERROR: f"its worker was gone, {lost} times"}
        self._leave(trial._trial_id, TrialState.WAITING if again else TrialState.FAIL, attributes)

    def _leave(self, trial_id: int, state: TrialState, attributes: dict[str, Any]) -> None:
        for name, value in attributes.items():
            self.storage.optuna.set_trial_user_attr(trial_id, name, value)
        self.storage.optuna.set_trial_state_values(trial_id, state)
