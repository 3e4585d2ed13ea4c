"""Reading a calibration file strictly: every key known, every number finite and in range."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from simulations.hardware.tables import Table

VERSION = 1
DTYPES = ("bfloat16", "float8", "float32")

Check = Callable[[str, Any], Any]


class CalibrationError(ValueError):
    """A calibration that is not there, or does not say what one must say."""


def read_values(text: str, source: str) -> dict[str, Any]:
    """The JSON's values, checked, optional parts filled in with {}. Raises CalibrationError."""
    try:
        return _document("", json.loads(text))
    except RecursionError:
        raise CalibrationError(f"{source}: nested too deeply") from None
    except ValueError as error:
        raise CalibrationError(f"{source}: {error}") from error


def _number(*, above: float = -math.inf, least: float = -math.inf, most: float = math.inf) -> Check:
    def check(where: str, value: Any) -> float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not (abs(value) <= 1e300 and above < value and least <= value <= most):
            wanted = f"> {above:g}" if above > -math.inf else f">= {least:g}"
            wanted += f" and <= {most:g}" if most < math.inf else ""
            raise ValueError(f"{where} must be a number {wanted}, got {_shown(value)}")
        return float(value)

    return check


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where} must be a text, got {_shown(value)}")
    return value


def _flag(where: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{where} must be true or false, got {_shown(value)}")
    return value


def _tile(where: str, value: Any) -> int:
    return int(_number(least=1)(where, value))


def _provenance(where: str, value: Any) -> dict[str, Any]:
    """Where it is from: three texts, and whatever else there is to say."""
    values = _mapping(where, _any(where, value))
    for key in ("hardware", "date", "source"):
        _text(f"{where}.{key}", values.get(key))
    return values


def _any(where: str, value: Any) -> Any:
    """Whatever JSON can say; Python's reader lets more pass."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise ValueError(f"{where} holds NaN or an infinite number") from None
    return value


def _version(where: str, value: Any) -> int:
    if value != VERSION or isinstance(value, bool):
        raise ValueError(f"{where} must be {VERSION}, got {_shown(value)}")
    return VERSION


def _pair(where: str, value: Any) -> list[float]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{where} must be [low, high], got {_shown(value)}")
    low, high = (_number(least=0)(where, bound) for bound in value)
    if low > high:
        raise ValueError(f"{where} must be [low, high], got {low:g} > {high:g}")
    return [low, high]


def _table(where: str, value: Any) -> dict[str, Any]:
    table = _mapping(where, _any(where, value))
    if table.get("unit") != "s":
        raise ValueError(f'{where}.unit must be "s", got {_shown(table.get("unit"))}')
    try:
        Table.from_json(table)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{where} is no table: {error}") from error
    return table


def _mapping(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where or 'the file'} must be an object, got {_shown(value)}")
    return value


def _object(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    optional = optional or {}
    known = {**required, **optional}

    def check(where: str, value: Any) -> dict[str, Any]:
        values, prefix = _mapping(where, value), f"{where}." if where else ""
        for key in required:
            if key not in values:
                raise ValueError(f"{prefix}{key} is missing")
        for key in values:
            if key not in known:
                raise ValueError(f"{prefix}{key} is unknown; known are {', '.join(known)}")
        return {key: known[key](prefix + key, values[key]) for key in values}

    return check


def _each(check: Check) -> Check:
    def check_each(where: str, value: Any) -> dict[str, Any]:
        return {key: check(f"{where}.{key}", v) for key, v in _mapping(where, value).items()}

    return check_each


def _by_dtype(check: Check) -> Check:
    others = {dtype: check for dtype in DTYPES if dtype != "bfloat16"}
    return _object({"bfloat16": check}, others)


def _document(where: str, value: Any) -> dict[str, Any]:
    values: dict[str, Any] = _DOCUMENT(where, value)
    if missing := sorted(set(values["peak_flops"]) ^ set(values["gemm"])):
        raise ValueError(f"peak_flops and gemm must name the same dtypes, not {missing[0]} alone")
    return {**{key: {} for key in _OPTIONAL}, **values}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


_POSITIVE, _SECONDS = _number(above=0), _number(least=0)
_LINK = _object({"alpha_s": _SECONDS, "beta": _POSITIVE})
_LINKS = {"node": _LINK, "network": _LINK}
_OPTIONAL: dict[str, Check] = {
    "attention": _object(
        {},
        {
            "decode_flops": _POSITIVE,
            "prefill_flops": _POSITIVE,
            "overhead_s": _SECONDS,
            "absorbed_prompts": _flag,
        },
    ),
    "tables": _each(_table),
    "dispatch": _object({}, _LINKS),
    "combine": _object({}, _LINKS),
    "low_latency": _object(
        {}, {"dispatch": _object({}, _LINKS), "combine": _object({}, _LINKS), "network_only": _flag}
    ),
    "fidelity": _any,
    "measured": _any,
}
_DOCUMENT = _object(
    {
        "version": _version,
        "name": _text,
        "provenance": _provenance,
        "memory_bytes": _POSITIVE,
        "memory_bandwidth": _POSITIVE,
        "peak_flops": _by_dtype(_POSITIVE),
        "gemm": _by_dtype(_object({"overhead_s": _SECONDS, "tile": _tile})),
        "links": _object(_LINKS),
        "overheads": _object({"step_s": _SECONDS, "layer_s": _SECONDS}),
        "overlap": _object(
            {"sm_share": _number(least=0, most=0.9), "supports_two_batch": _flag},
            {
                "pipelined_stages": _flag,
                "exchange_slowdown": _number(least=1),
                "held_s": _SECONDS,
            },
        ),
        "range": _object({"tokens": _pair, "context": _pair, "ranks": _pair}),
    },
    _OPTIONAL,
)
