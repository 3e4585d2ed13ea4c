"""Two small kernels at once: where rows are few, neither fills the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch

MOST_ROWS = 256


@contextmanager
def beside(work: Callable[[], object], device: torch.device, num_rows: int) -> Iterator[None]:
    """What `work` launches is done at the end of the block, and at any time while the block runs.

    It may not allocate memory that outlives it, and neither may read what the other one writes.
    """
    if device.type != "cuda" or num_rows > MOST_ROWS:
        work()
        yield
        return
    first, second = torch.cuda.current_stream(device), _second_stream(device)
    second.wait_stream(first)
    with torch.cuda.stream(second):
        work()
    yield
    first.wait_stream(second)


@cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
