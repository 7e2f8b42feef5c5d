"""YAML files and what is validated against a model: every error names the line, or the option, and the remedy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from effv2.core.errors import InputError, nearest

Place = tuple[str | int, ...]
Model = TypeVar("Model", bound=BaseModel)


def dotted(place: Place) -> str:
    """Name a place by its keys alone."""
    return ".".join(map(str, place))


def validate(model: type[Model], values: Mapping[str, Any], where: Callable[[Place], str]) -> Model:
    """Validate `values`; InputError names the first thing wrong, where it stands and what would be right."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        # An unknown key is told first: it may be the missing one, misspelt.
        first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        place = first["loc"]
        if first["type"] == "extra_forbidden":
            keys = _keys_at(model, place[:-1])
            raise InputError(f"{where(place)}: unknown key {place[-1]!r}; {nearest(str(place[-1]), keys)}.") from None
        message = first["msg"].removeprefix("Value error, ")
        value = "" if first["type"] == "missing" else f" {first['input']}"
        raise InputError(f"{where(place)}{value}: {message[0].lower()}{message[1:]}.") from None


def _keys_at(model: type[BaseModel], place: Place) -> list[str]:
    """Return the keys that a mapping at `place` may have; names in mappings, and places in lists, are passed over."""
    owners = [model]
    for step in place:
        inner = [each for one in owners if step in one.model_fields for each in _models_in(one, str(step))]
        of_kind = [one for one in owners if step in _kinds(one)]
        owners = inner or of_kind or owners
    named = (field.alias or name for owner in owners for name, field in owner.model_fields.items())
    return list(dict.fromkeys(named))


def _models_in(owner: type[BaseModel], field: str) -> list[type[BaseModel]]:
    found: list[type[BaseModel]] = []
    annotations: list[Any] = [owner.model_fields[field].annotation]
    while annotations:
        annotation = annotations.pop()
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found.append(annotation)
        annotations += get_args(annotation)
    return found


def _kinds(owner: type[BaseModel]) -> tuple[Any, ...]:
    """Return the values of the field that tells one of several models."""
    return get_args(owner.model_fields["kind"].annotation) if "kind" in owner.model_fields else ()


@dataclass(frozen=True)
class Document:
    """A YAML file, the option that named it, its values, and the line (from 1) of every key."""

    option: str
    path: Path
    values: dict[str, Any]
    lines: dict[Place, int]

    def where(self, place: Place) -> str:
        """Name a place by file, line and dotted key; an unknown one by the nearest key above it."""
        known = place
        while known and known not in self.lines:
            known = known[:-1]
        line = f", line {self.lines[known]}" if known else ""
        return f"--{self.option} {self.path}{line}: {dotted(place)}"


def read_document(path: Path, option: str) -> Document:
    """Read a YAML file of plain values; InputError for a missing, malformed or repetitive one."""
    named = f"--{option} {path}"
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"{named}: can't be read ({reason}); give the path of a YAML file.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or type(error).__name__
        raise InputError(f"{named}{line}: not valid YAML ({problem}); correct it.") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(f"{named}: must be a mapping of keys to values.")
    lines: dict[Place, int] = {}
    try:
        _note_lines(root, (), lines, named)
    except RecursionError as error:
        raise InputError(f"{named}: a part of it contains itself; write it without aliases.") from error
    return Document(option, path, values, lines)


def _note_lines(node: yaml.Node | None, place: Place, lines: dict[Place, int], named: str) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*place, str(key.value))
            line = key.start_mark.line + 1
            if inner in lines:
                raise InputError(
                    f"{named}, line {line}: the key {key.value!r} stands twice (first in line {lines[inner]}); "
                    "remove one."
                )
            lines[inner] = line
            _note_lines(value, inner, lines, named)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*place, index)] = value.start_mark.line + 1
            _note_lines(value, (*place, index), lines, named)
