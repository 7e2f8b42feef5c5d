"""Write effv2/__init__.pyi, the types of the Python API, from the options: python -m tests.stubs."""

from __future__ import annotations

from collections.abc import Iterable
from textwrap import wrap
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from effv2.api import calls
from effv2.config import options as o
from tests.conftest import ROOT

STUB = ROOT / "effv2" / "__init__.pyi"
WIDTH = 110  # most characters in a line of fields
HEAD = """# Types of the Python API, written from the options by: python -m tests.stubs
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
"""
SHARED: dict[str, tuple[str, ...]] = {
    "_Settings": tuple(name for name in o.SHARED if name != "scheduler"),
    "_OneRun": tuple(name for name in o.ONE_RUN if name not in o.SHARED),
    "_Queue": o.QUEUE,
    "_Checkpoints": o.CHECKPOINTS,
    "_Logging": o.LOGGING,
    "_Grid": tuple(name for name in o.GRID if name not in o.STUDY),
}
PATHS = ("study", "labels", "weights", "export", "claims")
CALLS = [each for each in vars(calls).values() if isinstance(each, calls.Call)]


def kind_of(name: str, field: FieldInfo) -> str:
    kind: Any = field.annotation
    if name in ("seeds", "set"):
        return "Iterable[int] | int | str" if name == "seeds" else "Mapping[str, object] | Iterable[str] | str"
    if kind is str:
        is_path = name in PATHS or name.endswith("_dir")
        return "str | Iterable[str]" if field.title == "LIST" else "str | PathLike[str]" if is_path else "str"
    if get_origin(kind) is Literal:
        return f"Literal[{', '.join(repr(each) for each in get_args(kind))}]".replace("'", '"')
    return str(kind) if get_args(kind) else str(kind.__name__)


def listed(head: str, fields: Iterable[str]) -> str:
    """Return a class with as many fields per line as fit."""
    words = "; ".join(field.replace(" ", "\0") for field in fields)  # keep each field in one line
    lines = [f"    {line.rstrip(';')}" for line in wrap(words, WIDTH, break_long_words=False)]
    return "\n".join([f"class {head}, total=False):", *lines]).replace("\0", " ")


def stub() -> str:
    """Return the text of the stub: classes of shared options, and a class of the others for each command."""
    shared, own = dict[str, str](), list[str]()
    for call in CALLS:
        name, fields = call.function.__name__, call.taken.fields
        kinds = {option: f"{option}: {kind_of(option, field)}" for option, field in fields.items()}
        bases = [base for base, names in SHARED.items() if set(names) <= kinds.keys()]
        for base in bases:
            text = listed(f"{base}(TypedDict", (kinds[option] for option in SHARED[base]))
            assert shared.setdefault(base, text) == text, f"{base} has other types in {name}"
        inherited = {option for base in bases for option in SHARED[base]}
        title = "".join(word.title() for word in name.split("_"))
        more = (kind for option, kind in kinds.items() if option not in inherited)
        own.append(listed(f"_{title}({', '.join(bases or ['TypedDict'])}", more))
        options = f"reporter: Reporter | None = None, **options: Unpack[_{title}]"
        own.append(f"def {name}(*, {options}) -> {call.function.__annotations__['return']}: ...")
    return "\n".join([HEAD, *shared.values(), *own, ""])


def is_current() -> bool:
    """Say whether the file is up to date with the options."""
    return STUB.read_text() == stub()


if __name__ == "__main__":
    STUB.write_text(stub())
