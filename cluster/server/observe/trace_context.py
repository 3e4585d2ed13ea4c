"""The trace that a caller's request belongs to: https://www.w3.org/TR/trace-context/#traceparent-header."""

import re
from typing import NamedTuple

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


class TraceContext(NamedTuple):
    """Ids in lower-case hexadecimal digits."""

    trace_id: str
    span_id: str
    sampled: bool


def parse_traceparent(traceparent: str | None) -> TraceContext | None:
    """None if there is none or it is malformed: then a request begins a trace of its own."""
    match = _TRACEPARENT.fullmatch((traceparent or "").strip())
    if match is None:
        return None
    version, trace_id, span_id, flags, rest = match.groups()
    if (
        version == "ff"
        or (version == "00" and rest)
        or not int(trace_id, 16)
        or not int(span_id, 16)
    ):
        return None
    return TraceContext(trace_id, span_id, bool(int(flags, 16) & 1))


def trace_id_of(traceparent: str | None) -> str | None:
    context = parse_traceparent(traceparent)
    return context.trace_id if context else None
