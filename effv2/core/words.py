"""Numbers and differences as text, in the same form wherever they are shown."""

import math
from collections.abc import Mapping
from typing import Any

whole, tenths = "{:,.0f}".format, "{:,.1f}".format  # without decimals, with one decimal


def percent(value: float) -> str:
    """Write a fraction as a percentage."""
    return f"{100 * value:.2f} %"


def points(value: float, sign: str = "+", unit: str = " points") -> str:
    """Write a difference of two fractions in percentage points; `sign` and `unit` may be empty."""
    return f"{round(100 * value, 2) + 0:{sign}.2f}{unit}"  # + 0: no -0.00


def decimal(value: float) -> str:
    """Write a number to three digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def number(text: str) -> float:
    """Read a number; NaN if the text is not a number."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def duration(seconds: float) -> str:
    """Write a duration in seconds, minutes or hours."""
    if seconds < 60:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"


def counted(number: int, word: str) -> str:
    """Write a count and its noun."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the differences of two definitions or identities, in a few words each.

    A difference that several groups of values share is named once, after these groups, or after none if all share it.
    """
    found: dict[str, list[str]] = {}  # the groups of each difference
    groups = 0
    for name in sorted({**before, **now}):
        old, new = (each.get(name, "absent") for each in (before, now))
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            groups += 1
            for words in differences(old, new):
                found.setdefault(words, []).append(name)
        elif old != new:
            was, is_ = ("there" if isinstance(each, Mapping) else each for each in (old, new))
            found[f"{name} was {was}, is {is_}"] = []
    named = ((", ".join(names) if len(names) < max(2, groups) else "", words) for words, names in found.items())
    return [f"{names}: {words}" if names else words for names, words in named]
