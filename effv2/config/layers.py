"""Settings with the place where they were written, so that errors name the line of a file, or a setting."""

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from effv2.config.schema import OF_KEY
from effv2.core.errors import InputError
from effv2.core.paths import read_text

Place = tuple[str | int, ...]
MOST_VALUES, DEEPEST = 50_000, 50  # of a file after its aliases are expanded
Model = TypeVar("Model", bound=BaseModel)


class Written(NamedTuple):
    """A value and the place where it was written; empty if its name says it."""

    value: Any
    where: str = ""


Layer = dict[str, Written]  # by dotted setting; `below | above` merges two, and `above` has priority


def dotted(place: Place) -> str:
    """Name a place by its keys."""
    return ".".join(map(str, place))


# Pydantic's words, and plainer ones.
PLAIN = {
    "input should be ": "must be ",
    "string should match pattern": "must match the pattern",
    "a valid integer": "a whole number",
    "a valid boolean": "true or false",
    "a valid ": "a ",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
}


def _plain(problem: str) -> str:
    problem = re.sub(", unable to .*", "", problem[0].lower() + problem[1:])
    for word, plainer in PLAIN.items():
        problem = problem.replace(word, plainer)
    return problem


def validate(model: type[Model], values: Mapping[str, Any], where: Callable[[Place], str] = dotted) -> Model:
    """Validate `values`; InputError names the first error, its place and its remedy."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        # An unknown key is named first: it may be a missing key, misspelt.
        first = min(error.errors(), key=lambda one: one["type"] != OF_KEY)
        kind, place, value = first["type"], first["loc"], first["input"]
        if kind == OF_KEY:
            place = (*place, first["ctx"]["key"])
        if place[-1:] == ("[key]",):  # the key itself is wrong
            place, kind = place[:-1], OF_KEY
        if kind == "literal_error":
            names = re.findall(r"'([^']*)'", first["ctx"]["expected"])
            raise InputError(where(place), value, "no such choice", choices=names) from None
        problem, _, remedy = first["msg"].removeprefix("Value error, ").partition("; ")
        if kind == "string_type" and not isinstance(value, dict | list):
            remedy = "write it in quotes"
        shown = "" if kind in (OF_KEY, "missing") else value
        raise InputError(where(place), shown, _plain(problem), remedy) from None


def build(model: type[Model], layer: Layer) -> Model:
    """Return a layer as a validated model; InputError as `validate`."""
    groups: dict[str, Any] = {}
    for name, written in layer.items():
        group, _, field = name.partition(".")
        if field:
            groups.setdefault(group, {})[field] = written.value
    for name, written in layer.items():  # whole groups: empty ones, and values that are not groups, which are refused
        if "." not in name and (written.value != {} or name not in groups):
            groups[name] = written.value

    def where(place: Place) -> str:
        name = dotted(place[:2])
        near = name if name in layer else next((each for each in layer if each.startswith(f"{name}.")), "")
        return layer[near].where or near if near else name

    return validate(model, groups, where)


@dataclass(frozen=True)
class Document:
    """A YAML file: the parameter that named it, with its path; its first line, its values, and the line of each key."""

    named: str
    first: str
    values: dict[str, Any]
    lines: dict[Place, int]

    def where(self, place: Place) -> str:
        """Name a place by file, line (from 1) and dotted key; for an unknown place, of the nearest key above."""
        known = place
        while known and known not in self.lines:
            known = known[:-1]
        line = f", line {self.lines[known]}" if known else ""
        return f"{self.named}{line}: {dotted(place)}"

    def layer(self, *place: str) -> Layer:
        """Return the groups of settings at a place."""
        values: Any = self.values
        for step in place:
            values = values.get(step) or {}
        if not isinstance(values, dict):
            raise InputError(self.where(place), "", "must be a mapping of settings", "indent them below the key")
        layer: Layer = {}
        for group, fields in values.items():
            if "." in group:
                problem = "not a group of settings"
                raise InputError(self.where((*place, group)), "", problem, "write the group, and its settings below it")
            if not isinstance(fields, dict) or not fields:  # perhaps an error, which `build` names
                layer[group] = Written(fields, self.where((*place, group)))
            for name, value in fields.items() if isinstance(fields, dict) else ():
                layer[f"{group}.{name}"] = Written(value, self.where((*place, group, name)))
        return layer


def read_document(path: Path, parameter: str) -> Document:
    """Read a YAML file of plain values; InputError for a missing, malformed or repetitive one."""
    named = f"{parameter} {path}"
    try:
        text = read_text(path)
        root = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # libyaml is much faster
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(named, "", f"can't be read ({reason})", "give the path of a YAML file") from error
    except Exception as error:  # PyYAML also raises errors that aren't its own
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or type(error).__name__
        raise InputError(f"{named}{line}", "", f"not valid YAML ({problem})", "correct it") from error
    if not isinstance(root, yaml.MappingNode):
        raise InputError(named, "", "must be a mapping of keys to values", "write `key: value`")
    reader = _Reader(named)
    return Document(named, text.partition("\n")[0], reader.values(root, ()), reader.lines)


class _Reader:
    """Turns a file's nodes into plain values, and notes the line of each.

    Keys remain text. So do values that YAML 1.1 would convert: dates, yes, no, on and off, and numbers such as 012.
    """

    def __init__(self, named: str) -> None:
        self.named, self.count = named, 0
        self.lines: dict[Place, int] = {}

    def values(self, node: yaml.Node, place: Place) -> Any:
        """Return the value of a node; InputError if it is too large or too deep, or has a key twice."""
        self.count += 1
        if self.count > MOST_VALUES or len(place) > DEEPEST:
            problem = f"it holds more than {MOST_VALUES:,} values or {DEEPEST} levels, or a part of it contains itself"
            raise InputError(self.named, "", problem, "shorten it, and write it without aliases")
        if isinstance(node, yaml.MappingNode):
            return {str(key.value): self._inner(key, value, (*place, str(key.value))) for key, value in node.value}
        if isinstance(node, yaml.SequenceNode):
            return [self._inner(each, each, (*place, index)) for index, each in enumerate(node.value)]
        return _scalar(node)

    def _inner(self, start: yaml.Node, value: yaml.Node, place: Place) -> Any:
        line = start.start_mark.line + 1
        if first := self.lines.get(place):
            problem = f"the key {place[-1]!r} appears twice (first in line {first})"
            raise InputError(f"{self.named}, line {line}", "", problem, "remove one")
        self.lines[place] = line
        return self.values(value, place)


def _scalar(node: yaml.Node) -> bool | int | float | str | None:
    kind, text = node.tag.rpartition(":")[2], str(node.value)
    if kind == "null":
        return None
    if kind == "bool" and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind == "int" and re.fullmatch(r"[-+]?(0|[1-9]\d{0,17})", text):  # no setting needs more digits
        return int(text)
    if kind == "float":
        with suppress(ValueError):  # such as 1:30.5
            return float(text)
    return text
