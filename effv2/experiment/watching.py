"""Who watches a run: a display that shows it, and an observer that may end it."""

from __future__ import annotations

from typing import Protocol

from effv2.training.loop import EpochResult


class Display(Protocol):
    """What a run tells whoever watches."""

    def run_started(self, name: str, epochs: int) -> None:
        """Report the begin of a run."""

    def remark(self, text: str) -> None:
        """Say something once."""

    def step(self, step: int, steps: int) -> None:
        """Report a step of an epoch."""

    def epoch(self, result: EpochResult) -> None:
        """Report a finished epoch."""


class Observer:
    """What a study wants to know of a run, and to decide: nothing, for a run of its own."""

    def started(self, run_id: str) -> None:
        """Hear that the run is open."""

    def resumed(self, accuracy: float) -> None:
        """Hear that the run goes on from its checkpoint, with the best watched accuracy so far (below 0: none)."""

    def stops(self, result: EpochResult) -> bool:
        """Hear of an epoch; say whether to prune the run now."""
        return False

    def keeps_weights(self, accuracy: float) -> bool:
        """Say whether the weights of a run that reached this accuracy must outlive its process."""
        return False
