"""From layers of settings (a study file, an arm of it, the command line) to one validated TrainConfig.

Every layer can say where each of its values was written, so that an error names the line or the option.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from effv2.config import TrainConfig
from effv2.errors import InputError, nearest

Place = tuple[str | int, ...]
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Layer:
    """Nested values, and a function from a place in them to the words that name it in an error."""

    values: Mapping[str, Any]
    where: Callable[[Place], str]

    def with_value(self, place: Place, value: Any) -> Layer:
        """Return the layer with one more value, or another one."""
        nested: Any = value
        for step in reversed(place):
            nested = {step: nested}
        return Layer(_merge(self.values, nested), self.where)


def dotted(place: Place) -> str:
    """Name a place by its keys alone."""
    return ".".join(map(str, place))


def option_layer(options: Mapping[str, str | None], fields: Mapping[str, str]) -> Layer:
    """Turn command line options into a layer; `fields` maps an option's name to its dotted field.

    Options that were not given (None) or left empty are left out.
    """
    values: dict[str, Any] = {}
    names: dict[Place, str] = {}
    for name, text in options.items():
        if text:
            *groups, last = place = tuple(fields[name].split("."))
            inner = values
            for group in groups:
                inner = inner.setdefault(group, {})
            inner[last] = text
            names[place] = f"--{name.replace('_', '-')}"
    return Layer(values, lambda place: names.get(place, dotted(place)))


def build_config(layers: list[Layer]) -> TrainConfig:
    """Merge the layers, later ones over earlier ones, and validate."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _merge(merged, layer.values)

    def where(place: Place) -> str:
        owner = next((layer for layer in reversed(layers) if _holds(layer.values, place)), layers[0])
        return owner.where(place)

    return validate(TrainConfig, merged, where)


def validate(model: type[Model], values: Mapping[str, Any], where: Callable[[Place], str]) -> Model:
    """Validate `values`; InputError names the first thing wrong, where it stands and what would be right."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = first["loc"]
        if first["type"] == "extra_forbidden":
            keys = _keys_at(model, place[:-1])
            raise InputError(f"{where(place)}: unknown key {place[-1]!r}; {nearest(str(place[-1]), keys)}.") from None
        message = first["msg"].removeprefix("Value error, ")
        value = "" if first["type"] == "missing" else f" {first['input']}"
        raise InputError(f"{where(place)}{value}: {message[0].lower()}{message[1:]}.") from None


def _keys_at(model: type[BaseModel], place: Place) -> list[str]:
    owner: Any = model
    for step in place:
        fields = getattr(owner, "model_fields", {})
        owner = fields[step].annotation if step in fields else None if fields else owner
        # Of `X | None` and of a mapping to X, the model X.
        owner = next((part for part in get_args(owner) if hasattr(part, "model_fields")), owner)
    return list(getattr(owner, "model_fields", {}))


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _holds(values: Any, place: Place) -> bool:
    for step in place:
        if not isinstance(values, Mapping) or step not in values:
            return False
        values = values[step]
    return True


@dataclass(frozen=True)
class Document:
    """A YAML file: its values, and the line (from 1) of every key."""

    path: Path
    values: dict[str, Any]
    lines: dict[Place, int]

    def where(self, place: Place) -> str:
        """Name a place by file, line and dotted key; an unknown one by the nearest key above it."""
        known = place
        while known and known not in self.lines:
            known = known[:-1]
        line = f", line {self.lines[known]}" if known else ""
        return f"--study {self.path}{line}: {dotted(place)}"

    def layer(self, *place: str) -> Layer:
        """Return the mapping at `place` as a layer."""
        values: Any = self.values
        for step in place:
            values = (values or {}).get(step)
        if values is None:
            values = {}
        if not isinstance(values, dict):
            raise InputError(f"{self.where(place)}: must be a mapping of settings; indent them below the key.")
        return Layer(values, lambda inner: self.where((*place, *inner)))


def read_document(path: Path) -> Document:
    """Read a YAML file of plain values; InputError for a missing, malformed or repetitive one."""
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"--study {path}: can't be read ({reason}); give the path of a study file.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or type(error).__name__
        raise InputError(f"--study {path}{line}: not valid YAML ({problem}); correct it.") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(f"--study {path}: must be a mapping of keys to values; see sweeps/ for examples.")
    lines: dict[Place, int] = {}
    try:
        _note_lines(root, (), lines, path)
    except RecursionError as error:
        raise InputError(f"--study {path}: a part of it contains itself; write it without aliases.") from error
    return Document(path, values, lines)


def _note_lines(node: yaml.Node | None, place: Place, lines: dict[Place, int], path: Path) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*place, str(key.value))
            line = key.start_mark.line + 1
            if inner in lines:
                raise InputError(
                    f"--study {path}, line {line}: the key {key.value!r} stands twice (first in line {lines[inner]}); "
                    "remove one."
                )
            lines[inner] = line
            _note_lines(value, inner, lines, path)
