"""Where a step's time goes: wall-clock seconds per named phase, summed over steps."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter


class StepTimer:
    """Adds up the phases of a step; phases do not nest, so their sum is at most the step's time.

    Phases of a decode step, in order: schedule, broadcast, attention, gate, dispatch, experts,
    combine, sample.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - start

    def reset(self) -> None:
        self.seconds.clear()
