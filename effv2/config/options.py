"""How a study is run and logged, whatever it studies. Imports nothing heavy: commands build it before they do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

LogModel = Literal["best", "all", "none"]  # best = that of the study's best run alone
DEFAULT_STORAGE = "sqlite:///optuna.db"
SHORT_EPOCHS = 3  # of a run of hparam-check and search without a study file


@dataclass(frozen=True)
class CheckpointOptions:
    """Where checkpoints go, in a folder for each run, and how many minutes of training a kill may cost.

    Every `upload_minutes` one is uploaded to the run's artifacts too, so that another machine can resume; 0 = never.
    """

    folder: str = "checkpoints"
    minutes: float = 10.0
    upload_minutes: float = 0.0


@dataclass(frozen=True)
class StudyOptions:
    """Where the queue is, how many processes share it here, whether to start over, what is logged where.

    An empty experiment leaves the choice to MLflow.
    """

    storage: str = DEFAULT_STORAGE
    workers: int = 1
    fresh: bool = False
    log_model: LogModel = "all"
    experiment: str = ""
    checkpoints: CheckpointOptions = field(default_factory=CheckpointOptions)
