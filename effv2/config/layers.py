"""Settings that know where they were written, so that errors name a file's line, or a setting, and the remedy."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from effv2.config.schema import UNKNOWN_KEY
from effv2.core.errors import InputError
from effv2.core.paths import read_text

Place = tuple[str | int, ...]
# Of a file whose aliases are written out; and digits of a number, which Python could not even print.
MOST_VALUES, DEEPEST, MOST_DIGITS = 50_000, 50, 100
NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
Model = TypeVar("Model", bound=BaseModel)


class Written(NamedTuple):
    """A value, and the words for where it was written; none where its name says it."""

    value: Any
    where: str = ""


class _Loader(yaml.SafeLoader):
    """Takes as text what YAML 1.1 would change: keys, words for truth but true and false, numbers as 012 and 1:30."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Make every key a text, once what others share with it is merged."""
        super().flatten_mapping(node)
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                key.tag = "tag:yaml.org,2002:str"

    def construct_plainly(self, node: yaml.ScalarNode) -> bool | int | str:
        """Return a truth value or a whole number where everybody reads it as that, else the text."""
        text = str(node.value)
        number = re.fullmatch(r"[-+]?(0|[1-9]\d*)", text)
        return text.lower() == "true" if text.lower() in ("true", "false") else int(text) if number else text


for _kind in ("bool", "int"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_plainly)

Layer = dict[str, Written]  # by dotted setting; `below | above` are both, one over the other


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
        kind, place, value = first["type"], first["loc"], first["input"]
        if kind == UNKNOWN_KEY:
            place = (*place, first["ctx"]["key"])
        if place[-1:] == ("[key]",):  # the key itself is wrong
            place, kind = place[:-1], UNKNOWN_KEY
        if kind == "literal_error":
            names = re.findall(r"'([^']*)'", first["ctx"]["expected"])
            raise InputError(where(place), value, "no such choice", choices=names) from None
        problem, _, remedy = first["msg"].removeprefix("Value error, ").partition("; ")
        if kind == "string_type" and not isinstance(value, dict | list):
            remedy = "write it in quotes"
        shown = "" if kind in (UNKNOWN_KEY, "missing") else value
        raise InputError(where(place), shown, problem[0].lower() + problem[1:], remedy) from None


def build(model: type[Model], layer: Layer) -> Model:
    """Return a layer as a validated model; InputError as `validate`."""
    groups: dict[str, Any] = {}
    for name, written in layer.items():
        group, _, field = name.partition(".")
        if field:
            groups.setdefault(group, {})[field] = written.value
    for name, written in layer.items():  # whole groups: empty ones, and what is none, which is refused
        if "." not in name and (written.value != {} or name not in groups):
            groups[name] = written.value

    def where(place: Place) -> str:
        name = dotted(place[:2])
        near = name if name in layer else next((each for each in layer if each.startswith(f"{name}.")), "")
        return layer[near].where or near if near else name

    return validate(model, groups, where)


@dataclass(frozen=True)
class Document:
    """A YAML file: the parameter that named it with its path, its first line, its values, and every key's line."""

    named: str
    first: str
    values: dict[str, Any]
    lines: dict[Place, int]

    def where(self, place: Place) -> str:
        """Name a place by file, line (from 1) and dotted key; an unknown one by the nearest key above it."""
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
            if "." in str(group):
                problem = "not a group of settings"
                raise InputError(self.where((*place, group)), "", problem, "write the group, and its settings below it")
            if not isinstance(fields, dict) or not fields:  # perhaps an error, to be named when it is built
                layer[str(group)] = Written(fields, self.where((*place, str(group))))
            for name, value in fields.items() if isinstance(fields, dict) else ():
                layer[f"{group}.{name}"] = Written(value, self.where((*place, str(group), str(name))))
        return layer


def read_document(path: Path, parameter: str) -> Document:
    """Read a YAML file of plain values; InputError for a missing, malformed or repetitive one."""
    named = f"{parameter} {path}"
    try:
        text = read_text(path)
        root = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # libyaml is much faster
        _must_be_small(root, named)
        values = _Loader("").construct_document(root) if root else None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(named, "", f"can't be read ({reason})", "give the path of a YAML file") from error
    except InputError:
        raise
    except Exception as error:  # PyYAML's constructors raise what they happen to
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or type(error).__name__
        raise InputError(f"{named}{line}", "", f"not valid YAML ({problem})", "correct it") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(named, "", "must be a mapping of keys to values", "write `key: value`")
    document = Document(named, text.partition("\n")[0], values, {})
    _note_lines(root, (), document)
    return document


def _must_be_small(root: yaml.Node | None, named: str) -> None:
    """Refuse what is too much or too deep once its aliases are written out; numbers of too many digits, too."""
    waiting, count = [(root, 0)], 0
    while waiting:
        node, depth = waiting.pop()
        count += 1
        if count > MOST_VALUES or depth > DEEPEST:
            problem = f"it holds more than {MOST_VALUES:,} values or {DEEPEST} levels, or a part of it contains itself"
            raise InputError(named, "", problem, "shorten it, and write it without aliases")
        if isinstance(node, yaml.CollectionNode):
            pairs = isinstance(node, yaml.MappingNode)
            inner = [each for pair in node.value for each in pair] if pairs else node.value
            waiting += [(each, depth + 1) for each in inner]
        elif isinstance(node, yaml.ScalarNode) and node.tag in NUMBERS and len(node.value) > MOST_DIGITS:
            line = f"{named}, line {node.start_mark.line + 1}"
            raise InputError(line, "", f"a number of more than {MOST_DIGITS} digits", "correct it")


def _note_lines(node: yaml.Node | None, place: Place, document: Document) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*place, str(key.value))
            line = key.start_mark.line + 1
            if first := document.lines.get(inner):
                problem = f"the key {key.value!r} appears twice (first in line {first})"
                raise InputError(f"{document.named}, line {line}", "", problem, "remove one")
            document.lines[inner] = line
            _note_lines(value, inner, document)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            document.lines[(*place, index)] = value.start_mark.line + 1
            _note_lines(value, (*place, index), document)
