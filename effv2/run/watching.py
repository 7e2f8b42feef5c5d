"""Who watches a run and may end it: the study that it belongs to."""

from __future__ import annotations

from effv2.training.loop import EpochResult


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
