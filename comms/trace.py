"""Spans of time on the streams of a rank: what it computed, what moved meanwhile, what was hidden.

Streams are "step", "compute", "communication" (a phase that waits for peers), "node" and "network"
(bytes under way inside the node and between nodes); others may be named. `trace_file.py` writes the
file that shows them.
"""

import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from comms.where import Where


class Span(NamedTuple):
    """`start_s` and `end_s` are of time.perf_counter on the rank's host."""

    stream: str
    name: str
    start_s: float
    end_s: float
    args: dict[str, Any]


class Trace:
    """The spans of one rank, the latest `max_spans` of them. Picklable.

    Every span gets the step and layer that `where` says when it is added. `host` and
    `clock_offset_ns` (wall clock minus perf_counter) place it among the spans of other ranks.
    """

    def __init__(
        self, rank: int, *, node: int = 0, where: Where | None = None, max_spans: int = 100_000
    ) -> None:
        self.rank = rank
        self.node = node
        self.where = where if where is not None else Where()
        self.host = _boot_id()
        self.clock_offset_ns = time.time_ns() - time.perf_counter_ns()
        self._spans: deque[Span] = deque(maxlen=max_spans)
        self._num_added = 0

    @property
    def spans(self) -> list[Span]:
        """In the order in which they ended."""
        return list(self._spans)

    @property
    def num_dropped(self) -> int:
        """Spans that are no longer here because there were more than `max_spans`."""
        return self._num_added - len(self._spans)

    def span(self, stream: str, name: str, **args: Any) -> AbstractContextManager[None]:
        """A span from entering to leaving the context, also by an exception."""
        return _OpenSpan(self, stream, name, args)

    def add(self, stream: str, name: str, start_s: float, end_s: float, **args: Any) -> None:
        """A span that is over, in seconds of time.perf_counter. `args` are shown with it."""
        where = self.where
        if where.layer >= 0:
            args.setdefault("layer", where.layer)
        if where.step >= 0:
            args.setdefault("step", where.step)
        self._spans.append(Span(stream, name, start_s, max(start_s, end_s), args))
        self._num_added += 1

    def keep(self, start_s: float, end_s: float) -> None:
        """Forget all spans but those that begin in [start_s, end_s); none of them was dropped."""
        kept = [span for span in self._spans if start_s <= span.start_s < end_s]
        self._spans = deque(kept, maxlen=self._spans.maxlen)
        self._num_added = len(kept)

    def clear(self) -> None:
        """Forget all spans, those of a warm-up for instance."""
        self._spans.clear()
        self._num_added = 0


class _OpenSpan:
    """What Trace.span returns; a class because a generator takes twice as long."""

    __slots__ = ("_args", "_name", "_start_s", "_stream", "_trace")

    def __init__(self, trace: Trace, stream: str, name: str, args: dict[str, Any]) -> None:
        self._trace, self._stream, self._name, self._args = trace, stream, name, args

    def __enter__(self) -> None:
        self._start_s = time.perf_counter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        end_s = time.perf_counter()
        self._trace.add(self._stream, self._name, self._start_s, end_s, **self._args)


class _NoTrace(Trace):
    """Records nothing."""

    def span(self, stream: str, name: str, **args: Any) -> AbstractContextManager[None]:
        return _NOTHING

    def add(self, stream: str, name: str, start_s: float, end_s: float, **args: Any) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Seconds in which a rank had a "network" span, a "compute" span, and both: `hidden_s`."""

    network_s: float
    compute_s: float
    hidden_s: float

    @property
    def hidden_fraction(self) -> float:
        """Share of the network time that was under computation; 0 without network time."""
        return self.hidden_s / self.network_s if self.network_s else 0.0


def overlap(traces: Iterable[Trace]) -> dict[int, Overlap]:
    """How much network time each rank hid under its own computation, by rank."""
    return {trace.rank: _overlap(trace.spans) for trace in traces}


def _overlap(spans: Sequence[Span]) -> Overlap:
    network = _union(span for span in spans if span.stream == "network")
    compute = _union(span for span in spans if span.stream == "compute")
    return Overlap(
        network_s=sum(end - start for start, end in network),
        compute_s=sum(end - start for start, end in compute),
        hidden_s=_common_s(network, compute),
    )


def _union(spans: Iterable[Span]) -> list[tuple[float, float]]:
    """The disjoint intervals, in order, that cover what the spans cover."""
    union: list[tuple[float, float]] = []
    for start, end in sorted((span.start_s, span.end_s) for span in spans):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(end, union[-1][1]))
        else:
            union.append((start, end))
    return union


def _common_s(a: Sequence[tuple[float, float]], b: Sequence[tuple[float, float]]) -> float:
    """Length of what two lists of disjoint, ordered intervals both cover."""
    i, j, common_s = 0, 0, 0.0
    while i < len(a) and j < len(b):
        common_s += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return common_s


def _boot_id() -> str:
    """The same on all ranks that share a perf_counter (CLOCK_MONOTONIC): those of one kernel."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


_NOTHING = nullcontext()
NO_TRACE: Trace = _NoTrace(rank=-1)
