"""Work beside other work: where rows are few, no kernel fills the GPU, and two run at once.

    aside = Aside(device, on=num_rows < MANY)
    with aside:                   # on a second stream, which begins where the first one is
        one()
        ready = aside.mark()
        two()
    other()                       # on the first, at the same time
    aside.join(ready)             # `one` is done
    aside.join()                  # all of it is

What is made inside is freed later, and its memory used again there only when the second stream has waited
for the first: never too early. A graph that is captured meanwhile has both.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from types import TracebackType

import torch


class Aside:
    """`on` false, or a CPU: all is done in order. There is one second stream to a device, so it is joined before
    the next begins."""

    def __init__(self, device: torch.device, *, on: bool) -> None:
        on = on and device.type == "cuda"
        self._first = torch.cuda.current_stream(device) if on else None
        self._second = _second_stream(device) if on else None
        self._block = torch.cuda.stream(self._second) if on else nullcontext()

    def __enter__(self) -> None:
        if self._first and self._second:
            self._second.wait_stream(self._first)
        self._block.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._block.__exit__(kind, error, trace)

    def mark(self) -> torch.cuda.Event | None:
        """For `join`: what has been launched aside so far."""
        return self._second.record_event() if self._second else None

    def join(self, mark: torch.cuda.Event | None = None) -> None:
        """What comes on the first stream comes after what was done aside, or up to the mark."""
        if self._first and self._second:
            self._first.wait_event(mark or self._second.record_event())


@cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
