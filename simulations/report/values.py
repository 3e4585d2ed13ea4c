"""How numbers and text of a result are read: strictly, with None and NaN as "not known".

A result comes from a file that anybody may have written. What is not a number is refused; text loses
the characters that no page can show.
"""

import math
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, TypeAdapter

FloatArray = NDArray[np.float64]
LIMIT = 1e30  # no bytes, seconds or tokens are more; pictures of larger ones overflow
MAX_CHARACTERS = 4000


def printable(value: object) -> str:
    """Text with what cannot be printed shown as U+FFFD, and not longer than a page of it."""
    if not isinstance(value, str):
        raise ValueError("must be text")
    if len(value) > MAX_CHARACTERS:
        value = value[: MAX_CHARACTERS - 1] + "…"
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in value)


def number(value: object) -> float:
    """A finite float; NaN for None, NaN and infinity."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a number or null")
    if isinstance(value, float) and not math.isfinite(value):
        return math.nan
    if abs(value) > LIMIT:
        raise ValueError(f"must be at most {LIMIT:g}")
    return float(value)


def whole(value: object) -> int | None:
    """A whole number from 0, or None where it is not known."""
    read = number(value)
    if math.isnan(read):
        return None
    if read < 0 or read != int(read):
        raise ValueError("must be a whole number, not negative")
    return int(read)


def _array(value: object, ndim: int) -> FloatArray:
    if value is None:
        return np.zeros((0,) * ndim)
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        array = None
    if array is not None and array.size == 0:
        return np.zeros((0,) * ndim)
    if array is None or array.ndim != ndim:
        shape = "a list of numbers" if ndim == 1 else "a list of equally long lists of numbers"
        raise ValueError(f"must be {shape}")
    array[~np.isfinite(array)] = np.nan
    if (np.abs(array) > LIMIT).any():
        raise ValueError(f"must have numbers of at most {LIMIT:g}")
    return array


def _line(value: object) -> FloatArray:
    return _array(value, 1)


def _grid(value: object) -> FloatArray:
    return _array(value, 2)


Text = Annotated[str, BeforeValidator(printable)]
Number = Annotated[float, BeforeValidator(number)]
Whole = Annotated[int | None, BeforeValidator(whole)]
Line = Annotated[FloatArray, BeforeValidator(_line)]
Grid = Annotated[FloatArray, BeforeValidator(_grid)]
_FACTS: TypeAdapter[Any] = TypeAdapter(dict[Text, Any])


def facts(value: object) -> dict[str, str]:
    """A mapping of anything as text, for showing: numbers short, what is nested in brackets."""
    given = _FACTS.validate_python({} if value is None else value)
    return {name: fact(inner) for name, inner in given.items()}


def fact(value: object) -> str:
    """One value as a person would write it."""
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}" if abs(value) <= LIMIT else "?"
        case float():
            return f"{value:,.6g}" if math.isfinite(value) else "–"
        case dict():
            return ", ".join(f"{fact(k)}: {fact(v)}" for k, v in value.items())
        case list() | tuple():
            return ", ".join(fact(inner) for inner in value)
        case _:
            return printable(str(value))


Facts = Annotated[dict[str, str], BeforeValidator(facts)]
