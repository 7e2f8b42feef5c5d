"""From layers of settings (a study file, an arm of it, the command line) to one validated TrainConfig.

Every layer can say where each of its values was written, so that an error names the file's line, or the setting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from effv2.config.schema import UNKNOWN_KEY, TrainConfig
from effv2.core.errors import InputError, nearest

Place = tuple[str | int, ...]
Model = TypeVar("Model", bound=BaseModel)


def dotted(place: Place) -> str:
    """Name a place by its keys alone."""
    return ".".join(map(str, place))


def validate(model: type[Model], values: Mapping[str, Any], where: Callable[[Place], str] = dotted) -> Model:
    """Validate `values`; InputError names the first thing wrong, where it stands and what would be right."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        # An unknown key is named first: it may be the missing one, misspelt.
        first = min(error.errors(), key=lambda one: one["type"] != UNKNOWN_KEY)
        unknown = first["type"] == UNKNOWN_KEY
        place = (*first["loc"], first["ctx"]["key"]) if unknown else first["loc"]
        problem, _, remedy = first["msg"].removeprefix("Value error, ").partition("; ")
        value = "" if unknown or first["type"] == "missing" else first["input"]
        raise InputError(where(place), value, problem[0].lower() + problem[1:], remedy) from None


@dataclass(frozen=True)
class Layer:
    """Nested values, and a function from a place in them to the words that name it in an error."""

    values: Mapping[str, Any]
    where: Callable[[Place], str] = dotted

    def with_value(self, place: Place, value: Any) -> Layer:
        """Return the layer with one more value, or another one."""
        nested: Any = value
        for step in reversed(place):
            nested = {step: nested}
        return Layer(_merge(self.values, nested), self.where)


def option_layer(options: Mapping[str, Any], others: Mapping[str, Any] | None = None) -> Layer:
    """Turn dotted settings into a layer: those that have an option, and `others`, which the parameter `set` gave."""
    others, names = others or {}, list(TrainConfig().flat())
    for name, value in others.items():
        if name not in names:
            same = [each for each in names if each.endswith(f".{name}")]
            remedy = f"give {same[0]}" if same else nearest(name, names)
            raise InputError(f"set {name}", value, "no such setting", remedy)
        if name in options:
            raise InputError(f"set {name}", value, f"{name} is given as well", "remove one of the two")
    layer = Layer({}, lambda place: f"set {dotted(place)}" if dotted(place) in others else dotted(place))
    for name, value in {**options, **others}.items():
        layer = layer.with_value(tuple(name.split(".")), value)
    return layer


def build_config(layers: list[Layer]) -> TrainConfig:
    """Merge the layers, later ones over earlier ones, and validate."""

    def where(place: Place) -> str:
        owner = next((layer for layer in reversed(layers) if _holds(layer.values, place)), layers[0])
        return owner.where(place)

    return validate(TrainConfig, reduce(_merge, (layer.values for layer in layers)), where)


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _holds(values: Any, place: Place) -> bool:
    try:
        reduce(getitem, place, values)
    except (KeyError, TypeError, IndexError):
        return False
    return True


@dataclass(frozen=True)
class Document:
    """A YAML file, the parameter that named it, its values, and the line (from 1) of every key."""

    parameter: str
    path: Path
    values: dict[str, Any]
    lines: dict[Place, int]

    def where(self, place: Place) -> str:
        """Name a place by file, line and dotted key; an unknown one by the nearest key above it."""
        known = place
        while known and known not in self.lines:
            known = known[:-1]
        line = f", line {self.lines[known]}" if known else ""
        return f"{self.parameter} {self.path}{line}: {dotted(place)}"


def read_document(path: Path, parameter: str) -> Document:
    """Read a YAML file of plain values; InputError for a missing, malformed or repetitive one."""
    named = f"{parameter} {path}"
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # libyaml is much faster
        values = yaml.SafeLoader("").construct_document(root) if root else None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(named, "", f"can't be read ({reason})", "give the path of a YAML file") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or type(error).__name__
        raise InputError(f"{named}{line}", "", f"not valid YAML ({problem})", "correct it") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(named, "", "must be a mapping of keys to values", "write `key: value`")
    lines: dict[Place, int] = {}
    try:
        _note_lines(root, (), lines, named)
    except RecursionError as error:
        raise InputError(named, "", "a part of it contains itself", "write it without aliases") from error
    return Document(parameter, path, values, lines)


def _note_lines(node: yaml.Node | None, place: Place, lines: dict[Place, int], named: str) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*place, str(key.value))
            line = key.start_mark.line + 1
            if inner in lines:
                problem = f"the key {key.value!r} stands twice (first in line {lines[inner]})"
                raise InputError(f"{named}, line {line}", "", problem, "remove one")
            lines[inner] = line
            _note_lines(value, inner, lines, named)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*place, index)] = value.start_mark.line + 1
            _note_lines(value, (*place, index), lines, named)


def document_layer(document: Document, *place: str) -> Layer:
    """Return the mapping at `place` of a YAML file as a layer."""
    values: Any = document.values
    for step in place:
        values = values.get(step) or {}
    if not isinstance(values, dict):
        raise InputError(document.where(place), "", "must be a mapping of settings", "indent them below the key")
    return Layer(values, lambda inner: document.where((*place, *inner)))
