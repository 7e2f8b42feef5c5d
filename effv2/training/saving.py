"""Where and how often a training is saved. Imports nothing heavy: commands build it before they do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Saving:
    """Where checkpoints go, in a folder for each run, and how many minutes of training a kill may cost.

    Every `upload_minutes` one is uploaded to the run's artifacts as well, so that another machine can go on; 0 = never.
    """

    folder: str = "checkpoints"
    minutes: float = 10.0
    upload_minutes: float = 0.0
