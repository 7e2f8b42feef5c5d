"""Write effv2/__init__.pyi, the types of the Python API, from the options: python -m tests.stubs."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from effv2.api import calls
from effv2.config import options as o
from tests.conftest import ROOT

STUB = ROOT / "effv2" / "__init__.pyi"
HEAD = """# Types of the Python API, written from the options by: python -m tests.stubs
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


def stub() -> str:
    """Return the text of the stub: the options that commands share in classes, the others in one of each command."""
    parts, written = [HEAD], dict[str, set[str]]()
    for call in CALLS:
        name, fields = call.function.__name__, call.taken.fields
        kinds = {option: kind_of(option, field) for option, field in fields.items()}
        bases = [base for base, names in SHARED.items() if set(names) <= kinds.keys()]
        for base in bases:
            lines = {f"    {option}: {kinds[option]}" for option in SHARED[base]}
            assert written.setdefault(base, lines) == lines, f"{base} has other types in {name}"
        shared = {option for base in bases for option in SHARED[base]}
        own = [f"    {option}: {kind}\n" for option, kind in kinds.items() if option not in shared]
        title = "".join(word.title() for word in name.split("_"))
        parts.append(f"class _{title}({', '.join(bases or ['TypedDict'])}, total=False):\n{''.join(own)}")
        returns = call.function.__annotations__["return"]
        options = f"reporter: Reporter | None = None, **options: Unpack[_{title}]"
        parts.append(f"def {name}(*, {options}) -> {returns}: ...\n")
    classes = [
        f"class {base}(TypedDict, total=False):\n" + "".join(f"{line}\n" for line in sorted(lines))
        for base, lines in written.items()
    ]
    return "\n".join([*parts[:1], *classes, *parts[1:]]).replace("\n\ndef ", "\ndef ")


def is_current() -> bool:
    """Say whether the file is what the options give, however it is broken into lines."""
    return STUB.read_text().split() == stub().split()


if __name__ == "__main__":
    STUB.write_text(stub())
