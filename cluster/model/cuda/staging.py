"""Bytes of files to the device through two buffers of pinned memory.

Threads read a buffer full from the file (the page cache gives more to several than to one) while the
other one is on its way to the device. However large the model, the host never holds more of it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import torch
from torch import Tensor

BUFFER_BYTES = 32 << 20
_PIECE = 1 << 20  # read by one thread at once
_THREADS = 8
_ALIGNMENT = 512  # of what is read together


class Staging:
    """For one thread. `close` ends it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._buffers = [
            torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=self._on_gpu) for _ in range(2)
        ]
        self._events = [torch.cuda.Event() for _ in range(2)] if self._on_gpu else []
        self._next = 0
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="weights")

    def read(self, file: int, spans: Sequence[tuple[int, int]]) -> list[Tensor]:
        """uint8 tensors on the device of (start, size) in the open file. EOFError if it is shorter.

        They share memory: whoever keeps one of several copies it.
        """
        ends = accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for _, size in spans)
        places = [0, *ends]
        whole = torch.empty(places[-1], dtype=torch.uint8, device=self._device)
        for first in range(0, len(whole), BUFFER_BYTES):
            part = whole[first : first + BUFFER_BYTES]
            self._next = 1 - self._next
            if self._on_gpu:
                self._events[self._next].synchronize()  # what it held before has left
            buffer = self._buffers[self._next][: len(part)]
            view = memoryview(buffer.numpy())  # type: ignore[arg-type]
            self._fill(
                [
                    (file, view[place + at - first :][:length], start + at)
                    for place, (start, size) in zip(places[:-1], spans, strict=True)
                    for at, length in _pieces(first - place, len(part), size)
                ]
            )
            part.copy_(buffer, non_blocking=True)
            if self._on_gpu:
                self._events[self._next].record()
        return [
            whole[place : place + size] for place, (_, size) in zip(places[:-1], spans, strict=True)
        ]

    def close(self) -> None:
        self._pool.shutdown()
        if self._on_gpu:
            torch.cuda.synchronize(self._device)
        self._buffers.clear()

    def _fill(self, pieces: list[tuple[int, memoryview, int]]) -> None:
        tasks = [self._pool.submit(_read, *piece) for piece in pieces[1:]]
        for piece in pieces[:1]:  # here, while the others do theirs
            _read(*piece)
        for task in tasks:
            task.result()


def _pieces(first: int, length: int, size: int) -> list[tuple[int, int]]:
    """(start, length) of the pieces of a span of `size` that lie in [first, first + length) of it."""
    begin, end = max(first, 0), min(first + length, size)
    return [(at, min(_PIECE, end - at)) for at in range(begin, end, _PIECE)]


def _read(file: int, into: memoryview, start: int) -> None:
    while into:
        count = os.preadv(file, [into], start)
        if not count:
            raise EOFError(f"the file ends before byte {start + len(into)}")
        into, start = into[count:], start + count
