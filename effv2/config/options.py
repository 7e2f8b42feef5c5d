"""The options: how studies and runs are made and kept, but not what a run computes."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from effv2.config.schema import Group

LogModel = Literal["best", "all", "none"]


def _distinct_seeds(value: Any) -> Any:
    words = [word.strip() for word in value.split(",")] if isinstance(value, str) else value
    words = [words] if type(words) is int else words
    if not isinstance(words, (list, tuple)) or not all(str(word).isdecimal() and int(word) < 2**32 for word in words):
        raise ValueError("must be whole numbers from 0 on, separated by commas, as 0,1,2")
    if len(set(map(int, words))) < len(words):
        raise ValueError("the same seed appears twice; remove one")
    return words


Seeds = Annotated[tuple[int, ...], BeforeValidator(_distinct_seeds)]
AUTO, RACE = "auto", "race"  # instead of seeds: as many as it takes to know each answer, or the best arm


class CheckpointOptions(Group):
    """Where and how often a training is saved."""

    checkpoint_dir: str = Field("checkpoints", description="Folder for checkpoints, from which a killed run resumes.")
    checkpoint_minutes: float = Field(
        10.0, ge=0, description="Minutes of training that a kill may cost; checkpoints take 2 % of the time at most."
    )
    checkpoint_upload_minutes: float = Field(
        0.0, ge=0, description="Minutes between checkpoints uploaded for another machine to resume from, 0 = never."
    )


class StudyOptions(CheckpointOptions):
    """Where a study is kept and logged, and how it is run. `seeds` and `trials` go before those of the study file."""

    workers: int = Field(1, ge=1, le=100_000, description="Processes that share the study here.")
    storage: str = Field(
        "sqlite:///optuna.db",
        description="Optuna's storage, which keeps the state of studies: sqlite:///FILE, or for several machines "
        "postgresql://USER@HOST/DATABASE.",
    )
    experiment: str = Field("", description="The MLflow experiment.  [default: MLflow's own choice]")
    log_model: LogModel = Field("all", description="Which runs log their model: the best of the study, all, none.")
    fresh: bool = Field(False, description="Start over, repeating what was finished.")
    seeds: Annotated[
        tuple[int, ...] | Literal["auto", "race"],
        BeforeValidator(lambda value: value if value in (AUTO, RACE) else _distinct_seeds(value)),
    ] = Field(
        (),
        description="Seeds of every arm, as 0,1,2; auto: three, then more of each arm until its difference from the "
        "baseline is decided; race: until it is known which arm is best.  [default: 0, or the study's]",
    )
    max_seeds: int | None = Field(
        None, ge=3, le=50, description="Seeds of an arm at most, fixed before the study begins.  [default: 30]"
    )
    margin: float | None = Field(
        None, gt=0, lt=1, description="Smallest difference of interest, 0.01 = one point: arms closer count as equal."
    )
    budget_hours: float | None = Field(None, gt=0, description="Hours of runs, added up, that auto seeds may take.")
    plan: bool = Field(False, description="Say what the study would take and find; run nothing.")
    trials: int | None = Field(
        None, ge=1, le=100_000, description="Trials of the study in all.  [default: 12, or the study's]"
    )
