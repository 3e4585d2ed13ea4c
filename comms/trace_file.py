"""The file in which Perfetto (https://ui.perfetto.dev) or Chrome shows the traces of all ranks.

JSON in the Trace Event Format: complete events ("ph": "X") and metadata ("M"), times in
microseconds. A rank is a process of the viewer, a stream a thread. Viewers demand that the spans of
a thread nest or are disjoint, and drop those that only overlap. Exchanges in flight together do
overlap, so a stream is shown as as many threads as that takes: "network", "network 2", ...
"""

import errno
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median_low
from typing import Any, NamedTuple

from comms.trace import Trace

STREAMS = (
    "step",
    "compute",
    "communication",
    "node",
    "network",
)  # in this order; others come below
# Perfetto keeps process 0 for the kernel's idle task, and takes the thread with the number of its
# process for the main one.
FIRST_PID = 1000

Event = dict[str, Any]


class TraceError(OSError):
    """The trace cannot be written where the user wants it."""


class _Timed(NamedTuple):
    """A span in integer nanoseconds, so that what nests still nests in the file."""

    start: int
    end: int
    stream: str
    name: str
    args: dict[str, Any]


def check_path(path: Path) -> None:
    """Raise TraceError if write_trace could not write there, to know it before a long run."""
    with _as_trace_error(path):
        target = path.resolve()
        if target.exists() and not target.is_file():
            raise OSError(errno.EINVAL, "not a regular file")
        unfinished = _unfinished(target)
        unfinished.touch()
        unfinished.unlink()


def write_trace(path: Path, traces: Sequence[Trace]) -> None:
    """The spans of all ranks in one file, which appears whole or not at all.

    Ranks of one host share a clock; hosts are aligned by their wall clocks, as well as those agree.
    Raises TraceError for a path that cannot be written.
    """
    check_path(path)
    text = "".join(trace_lines(traces))
    with _as_trace_error(path):
        target = path.resolve()
        unfinished = _unfinished(target)
        try:
            unfinished.write_text(text, encoding="utf-8")
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)


def trace_lines(traces: Sequence[Trace]) -> Iterator[str]:
    """The file's text, line by line; all of it is one JSON object."""
    dropped = {f"rank {trace.rank}": trace.num_dropped for trace in traces if trace.num_dropped}
    other = json.dumps({"program": "expertmesh", "dropped_spans": dropped})
    yield f'{{"displayTimeUnit": "ms", "otherData": {other}, "traceEvents": [\n'
    separator = ""
    for event in to_events(traces):
        yield separator + json.dumps(event, ensure_ascii=False)
        separator = ",\n"
    yield "\n]}\n"


def to_events(traces: Sequence[Trace]) -> list[Event]:
    """Trace events of all ranks, ranks in order; time 0 is the start of the first span."""
    offsets = _clock_offsets(traces)
    timed = {trace.rank: _in_nanoseconds(trace, offsets[trace.host]) for trace in traces}
    origin = min((span.start for spans in timed.values() for span in spans), default=0)
    events: list[Event] = []
    for trace in sorted(traces, key=lambda trace: trace.rank):
        events += _rank_events(trace, timed[trace.rank], origin)
    return events


def _clock_offsets(traces: Sequence[Trace]) -> dict[str, int]:
    """Wall clock minus perf_counter by host: one for all its ranks, who differ in nothing but when
    they read the two."""
    of_host: dict[str, list[int]] = {}
    for trace in traces:
        of_host.setdefault(trace.host, []).append(trace.clock_offset_ns)
    return {host: median_low(offsets) for host, offsets in of_host.items()}


def _in_nanoseconds(trace: Trace, offset: int) -> list[_Timed]:
    """By start; of spans that start together, the longest, which contains the others, first."""
    spans = [
        _Timed(
            round(span.start_s * 1e9) + offset,
            round(span.end_s * 1e9) + offset,
            span.stream,
            span.name,
            span.args,
        )
        for span in trace.spans
    ]
    return sorted(spans, key=lambda span: (span.start, -span.end))


def _rank_events(trace: Trace, spans: Sequence[_Timed], origin: int) -> list[Event]:
    pid, tid = FIRST_PID + trace.rank, 0
    events = _metadata("process", pid, 0, f"rank {trace.rank} (node {trace.node})", trace.rank)
    streams = {span.stream for span in spans}
    for stream in sorted(streams, key=lambda name: (_position(name), name)):
        lanes = _lanes([span for span in spans if span.stream == stream])
        for number, lane in enumerate(lanes, start=1):
            tid += 1
            name = stream if number == 1 else f"{stream} {number}"
            events += _metadata("thread", pid, tid, name, tid)
            events += [_complete(pid, tid, span, origin) for span in lane]
    return events


def _position(stream: str) -> int:
    return STREAMS.index(stream) if stream in STREAMS else len(STREAMS)


class _Lane:
    """Spans of one thread of the viewer: they nest or are disjoint. Added by start."""

    def __init__(self) -> None:
        self.spans: list[_Timed] = []
        self._open_ends: list[int] = []  # of the spans that are open, innermost last

    def add(self, span: _Timed) -> bool:
        """Take the span, or return False if it outlasts one that is open."""
        while self._open_ends and self._open_ends[-1] <= span.start:
            self._open_ends.pop()
        if self._open_ends and self._open_ends[-1] < span.end:
            return False
        self.spans.append(span)
        self._open_ends.append(span.end)
        return True


def _lanes(spans: Sequence[_Timed]) -> list[list[_Timed]]:
    """Each span in the first lane that takes it."""
    lanes: list[_Lane] = []
    for span in spans:
        if not any(lane.add(span) for lane in lanes):
            lanes.append(_Lane())
            lanes[-1].add(span)
    return [lane.spans for lane in lanes]


def _complete(pid: int, tid: int, span: _Timed, origin: int) -> Event:
    return {
        "ph": "X",
        "pid": pid,
        "tid": tid,
        "cat": span.stream,
        "name": span.name,
        "ts": (span.start - origin) / 1000,
        "dur": (span.end - span.start) / 1000,
        "args": span.args,
    }


def _metadata(kind: str, pid: int, tid: int, name: str, sort_index: int) -> list[Event]:
    """Name and position of a process or a thread."""
    place = {"ph": "M", "pid": pid, "tid": tid}
    return [
        {**place, "name": f"{kind}_name", "args": {"name": name}},
        {**place, "name": f"{kind}_sort_index", "args": {"sort_index": sort_index}},
    ]


def _unfinished(target: Path) -> Path:
    return target.with_name(f".expertmesh-trace-{os.getpid()}")


@contextmanager
def _as_trace_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TraceError(f"cannot write a trace to {path}: {error.strerror}") from error
