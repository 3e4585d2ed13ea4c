"""Checks of single values that a request brings: a ValueError with name, value and what is allowed."""

import math
from collections.abc import Collection, Mapping
from typing import Any


def number(
    name: str, value: Any, high: float, *, low: float = 0.0, low_excluded: bool = False
) -> float:
    """A finite number of the range as a float; integers are taken too."""
    allowed = f"{'above' if low_excluded else 'at least'} {low:g} and at most {high:g}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number {allowed}, got {value!r:.100}")
    # Comparisons with NaN are false, so this refuses NaN as well; huge ints would overflow float().
    if not low <= value <= high or (low_excluded and value == low):
        shown = value if isinstance(value, float) and not math.isfinite(value) else f"{value!r:.40}"
        raise ValueError(f"{name} must be {allowed}, got {shown}")
    return float(value)


def integer(name: str, value: Any, low: int, high: int, note: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(
            f"{name} must be an integer from {low} to {high}{note}, got {value!r:.100}"
        )
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}{note}, got {value!r:.40}")


def boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r:.100}")


def items(name: str, values: Any, max_items: int) -> tuple[Any, ...]:
    """A list, or anything like one but no text and no map, of so many items at most."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Collection):
        raise ValueError(f"{name} must be a list, got {values!r:.100}")
    if len(values) > max_items:
        raise ValueError(f"{name} must have at most {max_items} entries, got {len(values)}")
    return tuple(values)


def token_ids(name: str, values: Any, max_items: int, high: int) -> tuple[int, ...]:
    """Items that are integers from 0 to `high`."""
    ids = items(name, values, max_items)
    for idx, token_id in enumerate(ids):
        integer(f"{name}[{idx}]", token_id, 0, high)
    return ids


def text(name: str, value: Any, max_chars: int) -> None:
    """A non-empty text that UTF-8 can carry."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, got {value!r:.100}")
    if not 1 <= len(value) <= max_chars:
        raise ValueError(
            f"{name} must have from 1 to {max_chars} characters, got {len(value)}: {value!r:.60}"
        )
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise ValueError(f"{name} must be valid Unicode, got lone surrogates: {value!r:.60}")
