# Types of the Python API, written from the options by: python -m tests.stubs
# fmt: off
# ruff: noqa: E702
from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Literal, TypedDict

from typing_extensions import Unpack

from effv2.api.results import Report, StudyResult, Training
from effv2.core.errors import InputError as InputError
from effv2.core.errors import RunError as RunError
from effv2.core.reporter import Reporter

__version__: str

class _Settings(TypedDict, total=False):
    dataset: str; data_dir: str | PathLike[str]; train_dir: str | PathLike[str]; test_dir: str | PathLike[str]
    labels: str | PathLike[str]; allow_incomplete_classes: bool; skip_broken: bool; max_megapixels: float
    download: bool; image_size: int; per_class: int; split_seed: int; epochs: int; batch_size: int; lr: float
    device: Literal["auto", "cpu", "cuda", "mps"]; precision: Literal["fp32", "bf16", "auto"]; compile: bool
    weights: str | PathLike[str]; weights_partial: bool
class _OneRun(TypedDict, total=False):
    variant: str; dropout: float; stochastic_depth: float; depth_multiplier: float; width_multiplier: float
    seed: int
class _Checkpoints(TypedDict, total=False):
    checkpoint_dir: str | PathLike[str]; checkpoint_minutes: float; checkpoint_upload_minutes: float
class _Logging(TypedDict, total=False):
    fresh: bool; log_model: Literal["best", "all", "none"]; experiment: str
class _Queue(TypedDict, total=False):
    workers: int; storage: str
class _Grid(TypedDict, total=False):
    seeds: Iterable[int] | int | str; max_seeds: int | None; margin: float | None; budget_hours: float | None
    plan: bool
class _Train(_Settings, _OneRun, _Checkpoints, _Logging, total=False):
    study: str | PathLike[str]; set: Mapping[str, object] | Iterable[str] | str; scheduler: str
def train(*, reporter: Reporter | None = None, **options: Unpack[_Train]) -> Training: ...
class _Ablate(_Settings, _Queue, _Checkpoints, _Logging, _Grid, total=False):
    variant: str | Iterable[str]; study: str | PathLike[str]; set: Mapping[str, object] | Iterable[str] | str
    scheduler: str
def ablate(*, reporter: Reporter | None = None, **options: Unpack[_Ablate]) -> StudyResult: ...
class _HparamCheck(_Settings, _Queue, _Checkpoints, _Logging, _Grid, total=False):
    check: str; scheduler: str; study: str | PathLike[str]; set: Mapping[str, object] | Iterable[str] | str
def hparam_check(*, reporter: Reporter | None = None, **options: Unpack[_HparamCheck]) -> StudyResult: ...
class _Search(_Settings, _OneRun, _Queue, _Checkpoints, _Logging, total=False):
    study: str | PathLike[str]; set: Mapping[str, object] | Iterable[str] | str; scheduler: str
    trials: int | None
def search(*, reporter: Reporter | None = None, **options: Unpack[_Search]) -> StudyResult: ...
class _EvaluatePretrained(_Queue, _Logging, total=False):
    models: str | Iterable[str]; weights_dir: str | PathLike[str]; dataset: str; data_dir: str | PathLike[str]
    download: bool; skip_broken: bool; max_megapixels: float; per_class: int; limit: int; seed: int
    device: Literal["auto", "cpu", "cuda", "mps"]; precision: Literal["fp32", "bf16", "auto"]; batch_size: int
def evaluate_pretrained(*, reporter: Reporter | None = None, **options: Unpack[_EvaluatePretrained]) -> StudyResult: ...
class _Report(TypedDict, total=False):
    export: str | PathLike[str]; from_export: str | Iterable[str]; claims: str | PathLike[str]; experiment: str
def report(*, reporter: Reporter | None = None, **options: Unpack[_Report]) -> Report: ...
