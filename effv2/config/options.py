"""How a study is run and logged, whatever it studies. Imports nothing heavy: commands build it before they do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from effv2.training.saving import Saving

LogModel = Literal["best", "all", "none"]  # best = that of the study's best run alone
DEFAULT_STORAGE = "sqlite:///optuna.db"
SHORT_EPOCHS = 3  # of a run of hparam-check and search without a study file


@dataclass(frozen=True)
class StudyInfo:
    """How a study is named and described, how often failed runs are retried, which arm the others are compared with."""

    kind: str
    name: str
    description: str = ""
    retries: int = 0
    baseline: str = ""


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
    saving: Saving = field(default_factory=Saving)
