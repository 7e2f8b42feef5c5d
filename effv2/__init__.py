"""effv2: experiment tracking on MLflow around EfficientNetV2.

Each command is a function here, with the names of its options: `effv2.ablate(study="ablate-digits", seeds=[0, 1, 2])`.
Their results have `.verdicts`, `.runs`, `.model()` and `.figure()`. Wrong input raises InputError, a fault RunError.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
# Modules are imported when a name is first used, so that `import effv2` takes no time.
_PLACES = dict.fromkeys(
    ("train", "ablate", "hparam_check", "search", "evaluate_pretrained", "report"), "effv2.api.calls"
) | dict.fromkeys(("InputError", "RunError"), "effv2.core.errors")
__all__ = [*_PLACES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'effv2' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
