"""All uses of private names of other packages, imported when needed. tests/test_internals.py tries each."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow.entities import Run
    from optuna.storages import BaseStorage
    from optuna.study._frozen import FrozenStudy as FrozenStudy  # noqa: PLC0414
    from optuna.trial import FrozenTrial
    from torch import Tensor


def lerp_all(tensors: list[Tensor], others: list[Tensor], weight: float) -> None:
    """Move each tensor towards its partner by `weight`, in place, in a few kernels for all of them."""
    import torch

    torch._foreach_lerp_(tensors, others, weight)


def copy_all(tensors: list[Tensor], others: list[Tensor]) -> None:
    """Copy each partner into its tensor, in a few kernels for all of them."""
    import torch

    torch._foreach_copy_(tensors, others)


def set_up_compiler(forms: int, folder: Path) -> None:
    """Set how many forms of one function torch.compile keeps, and the folder of its code, unless the user named one."""
    import torch
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    torch._dynamo.config.recompile_limit = forms
    torch._dynamo.config.accumulated_recompile_limit = forms
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, default_cache_dir()):  # torch's own since its import
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def imagenette() -> tuple[str, str, dict[str, str]]:
    """Return the address and the MD5 of Imagenette's archive of small images, and names of classes by their folders."""
    from torchvision.datasets import Imagenette

    url, md5 = Imagenette._ARCHIVES["160px"]
    return url, md5, {folder: names[0] for folder, names in Imagenette._WNID_TO_CLASS.items()}


def classification_networks() -> list[str]:
    """Return the names of torchvision's classification networks, read from its files: importing it takes seconds."""
    folder = Path(str(find_spec("torchvision").origin)).parent / "models"  # type: ignore[union-attr]
    builder = re.compile(r"^@register_model\(\)\n(?:@.*\n)*def (\w+)", re.MULTILINE)
    return sorted(name for file in folder.glob("*.py") for name in builder.findall(file.read_text("utf-8")))


def pet_files(pets: Any) -> list[tuple[Path, int]]:
    """Return paths and labels of torchvision's OxfordIIITPet, which opens its files itself."""
    return list(zip(pets._images, pets._labels, strict=True))


def imagenet_metrics(weights: Any) -> Mapping[str, float]:
    """Return torchvision's published accuracies of weights on ImageNet, in percent: acc@1 and acc@5; empty if none."""
    return dict(weights.meta["_metrics"].get("ImageNet-1K", {}))


def trial_id(trial: FrozenTrial) -> int:
    """Return the id of a trial in its Optuna storage."""
    return trial._trial_id


def study_id(study: FrozenStudy) -> int:
    """Return the id of a study in its Optuna storage. Later studies have higher ids."""
    return study._study_id


def stale_trial_ids(storage: BaseStorage, study_id: int) -> list[int]:
    """Return the running trials whose heartbeat has been missing for longer than the storage's grace period."""
    return list(storage._get_stale_trial_ids(study_id))  # type: ignore[attr-defined]


def latest_steps(run: Run) -> dict[str, int]:
    """Return the latest step of each metric of a run."""
    return {each.key: each.step for each in run.data._metric_objs}


def default_experiment_id() -> str:
    """Return the experiment that MLflow would log to in this process."""
    from mlflow.tracking.fluent import _get_experiment_id

    return str(_get_experiment_id() or "0")
