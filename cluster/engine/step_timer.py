"""Where a step's time goes: wall-clock seconds per named phase, summed over steps."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

from comms.trace import NO_TRACE, Trace

_WAITING_PHASES = frozenset({"broadcast", "dispatch", "combine"})


class StepTimer:
    """Adds up the phases of a step; phases do not nest, so their sum is at most the step's time.

    Phases of a decode step, in order: schedule, broadcast, attention, gate, dispatch, experts,
    combine, sample. Each is also a span of `trace`, which may be set at any time: on the stream
    "compute", or "communication" if the phase is mostly one of waiting for peers, since what moves
    then is not hidden under computation.
    """

    def __init__(self, trace: Trace = NO_TRACE) -> None:
        self.seconds: dict[str, float] = {}
        self.trace = trace

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = perf_counter()
        try:
            yield
        finally:
            end = perf_counter()
            self.seconds[name] = self.seconds.get(name, 0.0) + end - start
            stream = "communication" if name in _WAITING_PHASES else "compute"
            self.trace.add(stream, name, start, end)

    def reset(self) -> None:
        self.seconds.clear()
