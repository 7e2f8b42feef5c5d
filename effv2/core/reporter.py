"""How a command reports its progress: to a terminal, a log, or nobody."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from effv2.core.processes import stop_if_told
from effv2.core.secrets import masked
from effv2.core.words import counted

Message = Callable[[str], None]


@dataclass(frozen=True)
class StudyProgress:
    """The progress of a study. `done` counts a running trial by its share of finished epochs."""

    total: int
    done: float
    counts: Mapping[str, int]  # of trials that are running, pruned and failed
    best: str  # the best trial and its accuracy; empty without one
    ended: Mapping[str, str]  # trials by name: how each ended, in that order


class Reporter:
    """Receives reports and discards them. Subclasses show them."""

    def message(self, text: str) -> None:
        """Report a message."""

    def progress(self, what: str, done: int = 0, total: int | None = None) -> None:
        """Report the current work and, if known, how much of it is done."""

    def study_progress(self, progress: StudyProgress) -> None:
        """Report the progress of the study."""

    def run_started(self, name: str, epochs: int) -> None:
        """Report that a run begins, and its largest number of epochs."""

    def step(self, epoch: int, step: int, steps: int, images_per_second: float) -> None:
        """Report a step of an epoch, both counted from 1, and how fast it is. Raise a signal that Python lost."""
        stop_if_told()

    def epoch(self, epoch: int, metrics: Mapping[str, float], best: float) -> None:
        """Report a finished epoch, its metrics and the best watched accuracy so far, below 0 where there is none."""


class LineReporter(Reporter):
    """Prints a line for each message, epoch and trial to standard error; without `lines`, only messages."""

    def __init__(self, lines: bool = True) -> None:
        self.lines = lines
        self._most = 1  # epochs of the run
        self._trained = False  # whether a run has started
        self._ended: set[str] = set()

    def line(self, text: str) -> None:
        """Print a line of progress."""
        if self.lines:
            self.message(text)

    def message(self, text: str) -> None:
        """Print a message."""
        print(masked(text), file=sys.stderr, flush=True)

    def progress(self, what: str, done: int = 0, total: int | None = None) -> None:
        """Print which work begins, and its amount."""
        stop_if_told()
        if not done and (total or self._trained):  # before a run, a wrong input is answered by one line
            self.line(f"{what}: {total:,}" if total else what)

    def study_progress(self, progress: StudyProgress) -> None:
        """Print each trial that has ended, once."""
        for number, (trial, ending) in enumerate(progress.ended.items(), 1):
            if trial not in self._ended:
                self.line(f"[{number}/{progress.total}] {trial}: {ending}")
        self._ended |= set(progress.ended)

    def run_started(self, name: str, epochs: int) -> None:
        """Print that a run begins."""
        self._most, self._trained = epochs, True
        self.line(f"training {name}, at most {counted(epochs, 'epoch')}")

    def epoch(self, epoch: int, metrics: Mapping[str, float], best: float) -> None:
        """Print a finished epoch with its accuracies and speed."""
        rate = metrics["throughput/train_images_per_second"]
        self.line(f"epoch {epoch}/{self._most}: {accuracies(metrics)}, {rate:,.1f} images/s")


def accuracies(metrics: Mapping[str, float]) -> str:
    """Write the accuracies among the metrics of an epoch."""
    named = ((name, metrics.get(f"{name}/accuracy")) for name in ("train", "val", "test"))
    return ", ".join(f"{name} {accuracy:.1%}" for name, accuracy in named if accuracy is not None)
