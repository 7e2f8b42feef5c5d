"""Registries: functions by name. A setting chooses one of them."""

from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

from pydantic_core import CoreSchema, core_schema

from effv2.core.errors import nearest

Function = TypeVar("Function", bound=Callable[..., Any])


class Registry:
    """Functions by name, each registered at its definition. A field of type `Annotated[str, registry]` is a name.

    `module` holds the entries. It is imported when the names are first needed, also for the commands' help. So it
    imports torch, numpy and other large packages only inside functions.
    """

    def __init__(self, kind: str, module: str) -> None:
        self._kind, self._module = kind, module
        self._functions: dict[str, Callable[..., Any]] = {}

    def register(self, name: str) -> Callable[[Function], Function]:
        """Register the decorated function under a name."""

        def enter(function: Function) -> Function:
            if self._functions.setdefault(name, function) is not function:
                raise ValueError(f"the {self._kind} {name!r} is registered twice; rename one")
            return function

        return enter

    def names(self) -> list[str]:
        """Return the names, in the order of registration."""
        import_module(self._module)
        return list(self._functions)

    def __getitem__(self, name: str) -> Callable[..., Any]:
        """Return the function of a name; ValueError names the nearest names."""
        if name not in self.names():
            raise ValueError(f"no such {self._kind}; {nearest(name, self.names())}")
        return self._functions[name]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        def known(name: str) -> str:
            self[name]
            return name

        return core_schema.no_info_after_validator_function(known, handler(source))
