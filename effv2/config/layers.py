"""From layers of settings (a study file, an arm of it, the command line) to one validated TrainConfig.

Every layer can say where each of its values was written, so that an error names the line or the option.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from effv2.config.documents import Document, Place, dotted, validate
from effv2.config.schema import TrainConfig
from effv2.core.errors import InputError


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


def document_layer(document: Document, *place: str) -> Layer:
    """Return the mapping at `place` of a YAML file as a layer."""
    values: Any = document.values
    for step in place:
        values = (values or {}).get(step)
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise InputError(f"{document.where(place)}: must be a mapping of settings; indent them below the key.")
    return Layer(values, lambda inner: document.where((*place, *inner)))
