"""Reads recorded arrivals: JSON lines or CSV, by the names of their columns.

    ours       arrival_s, prompt_tokens, output_tokens                 seconds
    Azure      TIMESTAMP, ContextTokens, GeneratedTokens               date and time
    Mooncake   timestamp, input_length, output_length                  milliseconds

(Azure: github.com/Azure/AzurePublicDataset, AzureLLMInferenceTrace_*.csv. Mooncake: github.com/
kvcache-ai/Mooncake, FAST'25 traces.) Other columns are ignored; times count from the first request.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from simulations.serving.arrivals import Arrival

MAX_TOKENS = 10_000_000
_LONGEST_S = 1e9


class TraceError(ValueError):
    """A file that is no trace of requests; the message names the file and the line."""


class _Format(NamedTuple):
    time: str
    prompt: str
    output: str
    seconds: Callable[[Any], float]


def read_trace(path: str | Path) -> list[Arrival]:
    """The requests of a trace in order of arrival, the first at second 0; raises TraceError.

    A request that asks for 0 tokens gets 1, as from a server: the prompt's step gives it.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise TraceError(f"{path}: cannot be read as a trace: {reason}") from None
    rows = _json_rows(text) if text.lstrip().startswith("{") else _csv_rows(text)
    try:
        arrivals = list(_arrivals(rows))
    except _LineError as error:
        raise TraceError(f"{path}: line {error.line}: {error}") from None
    if not arrivals:
        raise TraceError(f"{path}: no requests: expected a header and rows, or JSON lines")
    arrivals.sort(key=lambda arrival: arrival.time_s)
    first_s = arrivals[0].time_s
    return [arrival._replace(time_s=arrival.time_s - first_s) for arrival in arrivals]


def _arrivals(rows: Iterable[tuple[int, Mapping[str, Any]]]) -> Iterator[Arrival]:
    layout: _Format | None = None
    for line, row in rows:
        try:
            layout = layout or _format_of(row)
            yield _arrival(row, layout)
        except ValueError as error:
            raise _LineError(line, str(error)) from None


class _LineError(ValueError):
    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


def _json_rows(text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for line, content in enumerate(text.splitlines(), 1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except (ValueError, RecursionError):
            raise _LineError(line, f"not JSON (cut off?): {content:.60}") from None
        if not isinstance(row, dict):
            raise _LineError(line, f"not a JSON object: {content:.60}")
        yield line, row


def _csv_rows(text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.reader(text.splitlines(), strict=True)
    header: list[str] = []
    try:
        for cells in reader:
            if not header:
                header = [cell.strip() for cell in cells]
            elif cells:
                if len(cells) != len(header):
                    raise _LineError(
                        reader.line_num,
                        f"{len(cells)} cells under {len(header)} columns (cut off?)",
                    )
                yield reader.line_num, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise _LineError(reader.line_num, f"not CSV: {error}") from None


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r:.40} is no number")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{value!r:.40} is no number") from None
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{value!r:.40} is not a number of at least 0")
    return number


def _date(value: Any) -> float:
    """Seconds of `2023-11-16 18:15:46.6805900`; a date without a zone is UTC."""
    try:
        when = datetime.fromisoformat(str(value).strip())
        seconds = (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise ValueError(f"{value!r:.40} is no date and time") from None
    if seconds < 0:
        raise ValueError(f"{value!r:.40} is before 1970")
    return seconds


_FORMATS = (
    _Format("arrival_s", "prompt_tokens", "output_tokens", _number),
    _Format("TIMESTAMP", "ContextTokens", "GeneratedTokens", _date),
    _Format("timestamp", "input_length", "output_length", lambda value: _number(value) / 1e3),
)


def _format_of(row: Mapping[str, Any]) -> _Format:
    for layout in _FORMATS:
        if all(name in row for name in layout[:3]):
            return layout
    known = "; ".join(", ".join(layout[:3]) for layout in _FORMATS)
    raise ValueError(f"columns {', '.join(map(str, row))!s:.80} are none of: {known}")


def _arrival(row: Mapping[str, Any], layout: _Format) -> Arrival:
    for name in layout[:3]:
        if name not in row:
            raise ValueError(f"{name} is missing")
    try:
        name = layout.time
        time_s = layout.seconds(row[name])
        if time_s > 10 * _LONGEST_S:
            raise ValueError(f"{row[name]!r:.40} is too late")
        name = layout.prompt
        prompt = _count(row[name], least=1)
        name = layout.output
        output = max(1, _count(row[name], least=0))
    except ValueError as error:
        raise ValueError(f"{name} = {error}") from None
    return Arrival(time_s, prompt, output)


def _count(value: Any, least: int) -> int:
    number = _number(value)
    if number != int(number) or not least <= number <= MAX_TOKENS:
        raise ValueError(f"{value!r:.40} is no number of tokens from {least} to {MAX_TOKENS:,}")
    return int(number)
