"""What a command tells whoever watches it: a terminal, a log, nobody."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

Message = Callable[[str], None]


@dataclass(frozen=True)
class StudyProgress:
    """How far a study is; `done` counts a running trial by the share of its epochs."""

    total: int
    pruned: int
    failed: int
    running: int
    done: float
    best: tuple[str, float] | None
    ended: Mapping[str, str]  # trials by name: how they ended, in that order


class Reporter:
    """Hears what happens, and tells nobody. What else is to become of it is for subclasses to say."""

    def message(self, text: str) -> None:
        """Say something once."""

    def hint(self, text: str) -> None:
        """Say something that only somebody who waits at a terminal has use for."""

    def working(self, text: str) -> None:
        """Say what is being done, where it isn't known how much of it there is."""

    def decoding(self, done: int, total: int) -> None:
        """Report decoded images."""

    def study_opened(self, address: str) -> None:
        """Report where the study's run is to be seen."""

    def study_progress(self, progress: StudyProgress) -> None:
        """Report how far the study is."""

    def run_started(self, name: str, epochs: int) -> None:
        """Report that a run begins, and its largest number of epochs."""

    def step(self, step: int, steps: int) -> None:
        """Report a step of an epoch."""

    def epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Report a finished epoch, counted from 1, and its metrics."""

    def evaluating(self, name: str, done: int, total: int) -> None:
        """Report evaluated images of a network."""
