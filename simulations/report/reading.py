"""Results from files and from commands, checked before anything is drawn."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from simulations.report.balance_result import BalanceResult
from simulations.report.errors import ReportError
from simulations.report.other_results import ClaimsResult, ScoreboardResult, SweepResult
from simulations.report.results import Result
from simulations.report.serve_result import ServeResult
from simulations.report.values import printable

KINDS: dict[str, type[Result]] = {
    "balance": BalanceResult,
    "serve": ServeResult,
    "sweep": SweepResult,
    "scoreboard": ScoreboardResult,
    "claims": ClaimsResult,
}


def load_results(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The results in these files, in their order: one in each, or a list of them.

    Raises ReportError that names the file, and the key that is not what it should be.
    """
    results = []
    for path in paths:
        for where, result in _results_of(path):
            read_result(result, where)
            results.append(result)
    return results


def read_result(raw: Any, where: str = "the result") -> Result:
    """A result as the report uses it. Raises ReportError that names `where` and the key."""
    if not isinstance(raw, Mapping) or not isinstance(raw.get("kind"), str):
        raise ReportError(f'{where}: is not a result: it has no "kind"')
    try:
        return KINDS[raw["kind"]].model_validate(raw)
    except KeyError:
        kind = printable(raw["kind"])[:40]
        raise ReportError(f"{where}: kind: {kind!r} is not one of {', '.join(KINDS)}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        what = first["msg"].removeprefix("Value error, ")
        key = _key(first["loc"]).replace("\n", " ")
        raise ReportError(f"{where}: {key}: {what[0].lower()}{what[1:]}") from None


def plain(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The results as JSON would give them back, with null for NaN. TypeError for other objects."""
    text = json.dumps(list(results), default=_of_numpy)
    plain: list[dict[str, Any]] = json.loads(text, parse_constant=lambda _: None)
    return plain


def _results_of(path: Path) -> Iterator[tuple[str, Any]]:
    """Every result of the file, with where it is."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror or error}") from None
    except RecursionError:
        raise ReportError(f"{path}: is not a result: brackets too deep") from None
    except ValueError as error:  # also text that is not UTF-8, and numbers of too many digits
        raise ReportError(f"{path}: is not JSON: {error}") from None
    if not isinstance(read, list):
        yield str(path), read
        return
    for i, result in enumerate(read):
        yield f"{path}: [{i}]", result


def _key(location: tuple[int | str, ...]) -> str:
    """`policies.eplb.rebalances[3].step`, and not longer than a line."""
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    key = printable(key.removeprefix("."))
    return key if len(key) <= 120 else f"{key[:119]}…"


def _of_numpy(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"a result has a {type(value).__name__}, which JSON has no word for")
