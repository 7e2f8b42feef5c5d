"""What a command tells whoever watches it: a terminal, a log, nobody."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

Message = Callable[[str], None]


@dataclass(frozen=True)
class StudyProgress:
    """How far a study is; `done` counts a running trial by the share of its epochs."""

    total: int
    done: float
    counts: Mapping[str, int]  # of trials that are running, pruned and failed
    best: tuple[str, float] | None
    ended: Mapping[str, str]  # trials by name: how they ended, in that order


class Reporter:
    """Hears what happens, and tells nobody. What else is to become of it is for subclasses to say."""

    def message(self, text: str) -> None:
        """Say something once."""

    def progress(self, what: str, done: int = 0, total: int | None = None) -> None:
        """Say what is being done now, and how much of it is done where that is known."""

    def study_progress(self, progress: StudyProgress) -> None:
        """Report how far the study is."""

    def run_started(self, name: str, epochs: int) -> None:
        """Report that a run begins, and its largest number of epochs."""

    def epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Report a finished epoch, counted from 1, and its metrics."""
