"""Functions by name, of which a setting names one."""

from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

from pydantic_core import CoreSchema, core_schema

from effv2.core.errors import nearest

Function = TypeVar("Function", bound=Callable[..., Any])


class Registry:
    """Functions by name, each entered where it stands. `Annotated[str, registry]` makes a field one of the names.

    `module` holds the entries. It is imported when names are first asked for, by the commands' help too: so it imports
    torch, numpy and the like inside functions only.
    """

    def __init__(self, kind: str, module: str) -> None:
        self._kind, self._module = kind, module
        self._functions: dict[str, Callable[..., Any]] = {}

    def register(self, name: str) -> Callable[[Function], Function]:
        """Enter the decorated function under a name."""

        def enter(function: Function) -> Function:
            if self._functions.setdefault(name, function) is not function:
                raise ValueError(f"there are two of the {self._kind} {name!r}; rename one")
            return function

        return enter

    def names(self) -> list[str]:
        """Return the names, in the order of their entry."""
        import_module(self._module)
        return list(self._functions)

    def __getitem__(self, name: str) -> Callable[..., Any]:
        """Return the function; ValueError names the nearest ones."""
        if name not in self.names():
            raise ValueError(f"no such {self._kind}; {nearest(name, self.names())}")
        return self._functions[name]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        def known(name: str) -> str:
            self[name]
            return name

        return core_schema.no_info_after_validator_function(known, handler(source))
