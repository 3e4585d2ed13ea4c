"""Collectives between hosts, over TCP, by gloo.

gloo only moves bytes here (one uneven all-to-all or one broadcast); every sum is ours, in rank order
in fp32, so results have the same bits as over shared memory. The process group is built explicitly
over a prefix of the store: no default group, nothing lazy. When a call fails, the members leave a
note in the store, so that the error can name the peers that never arrived.
"""

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import (
    AllToAllOptions,
    BroadcastOptions,
    ProcessGroupGloo,
)

from comms.group import CommError, CommTimeout
from comms.sizes import (
    as_bytes,
    check_counts,
    check_sizes,
    empty_rows,
    even_sizes,
    row_bytes,
    sum_in_order,
)
from comms.store import PrefixStore, Store

_ONE_SHOT_BYTES = 64 * 1024  # beyond this an all-reduce is a reduce-scatter and an all-gather
_NOTE_S = 0.4  # how long the late may be behind the first to time out
_SLICE_S = 0.2
_TIMEOUT_WORDS = ("timed out", "timeout", "timedout")


class GlooGroup:
    """A Group over TCP; collective constructor. `host` is the local address to bind."""

    def __init__(
        self,
        *,
        name: str,
        ranks: Sequence[int],
        rank: int,
        store: Store,
        timeout_s: float = 60.0,
        host: str = "127.0.0.1",
    ) -> None:
        self.name = name
        self.ranks = tuple(ranks)
        self.size = len(self.ranks)
        self.idx = self.ranks.index(rank)
        self._timeout_s = timeout_s
        self._store = store
        self._calls = 0
        self._error: str | None = None
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timedelta(seconds=timeout_s)
        options._threads = 1
        options._devices = [ProcessGroupGloo.create_device(hostname=host)]
        prefix = PrefixStore(name, store)
        self._pg: Any = None
        self._pg = self._guard(
            "connect", None, lambda: ProcessGroupGloo(prefix, self.idx, self.size, options)
        )

    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        check_sizes(x, sizes, self.size, self.idx)
        out = empty_rows(x, sum(sizes))
        unit = row_bytes(x)
        copies = as_bytes(x).repeat(self.size)  # gloo's own all-gather wants equal sizes
        mine = [sizes[self.idx] * unit] * self.size
        self._exchange("all_gather", copies, as_bytes(out), mine, [n * unit for n in sizes])
        return out

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        check_sizes(x, sizes, self.size)
        unit, mine = row_bytes(x), sizes[self.idx]
        parts = torch.empty((self.size, mine, *x.shape[1:]), dtype=x.dtype)
        self._exchange(
            "reduce_scatter",
            as_bytes(x),
            as_bytes(parts),
            [n * unit for n in sizes],
            [mine * unit] * self.size,
        )
        return _sum(parts)

    def all_reduce(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1)
        if flat.shape[0] * flat.element_size() <= _ONE_SHOT_BYTES:
            sizes = [flat.shape[0]] * self.size
            return _sum(self.all_gather(flat, sizes).view(self.size, -1)).view(x.shape)
        sizes = even_sizes(flat.shape[0], self.size)
        return self.all_gather(self.reduce_scatter(flat, sizes), sizes).view(x.shape)

    def all_to_all(self, x: Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int]) -> Tensor:
        check_sizes(x, send_sizes, self.size)
        check_counts(recv_sizes, self.size)
        out = empty_rows(x, sum(recv_sizes))
        unit = row_bytes(x)
        self._exchange(
            "all_to_all",
            as_bytes(x),
            as_bytes(out),
            [n * unit for n in send_sizes],
            [n * unit for n in recv_sizes],
        )
        return out

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        out = x if source == self.idx else torch.empty_like(x)
        data = as_bytes(out)
        self._broadcast("broadcast", data, source, None)
        return out

    def broadcast_bytes(
        self, data: bytes | None, source: int, timeout_s: float | None = None
    ) -> bytes:
        if source == self.idx and data is None:
            raise ValueError("the source of broadcast_bytes needs data, got None")
        num_bytes = torch.tensor([len(data or b"")], dtype=torch.int64)
        self._broadcast("broadcast_bytes", as_bytes(num_bytes), source, timeout_s)
        if data is not None and source == self.idx:
            payload = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)[: len(data)]
        else:
            payload = torch.empty(int(num_bytes), dtype=torch.uint8)
        self._broadcast("broadcast_bytes", payload, source, timeout_s)
        return bytes(payload.numpy())

    def barrier(self, timeout_s: float | None = None) -> None:
        ones = torch.ones(self.size, dtype=torch.uint8)
        sizes = [1] * self.size
        self._exchange("barrier", ones, torch.empty_like(ones), sizes, sizes, timeout_s)

    def abort(self) -> None:
        if self._error is None:
            self._error = f"group {self.name!r}: aborted by rank {self.ranks[self.idx]}"
        if self._pg is not None:
            self._pg.abort()

    def close(self) -> None:
        self._error = self._error or f"group {self.name!r} is closed"
        self._pg = None

    # -- moving bytes ------------------------------------------------------------------------

    def _exchange(
        self,
        operation: str,
        data: Tensor,
        out: Tensor,
        send_bytes: list[int],
        recv_bytes: list[int],
        timeout_s: float | None = None,
    ) -> None:
        def call() -> None:
            options = AllToAllOptions()
            options.timeout = timedelta(seconds=timeout_s or self._timeout_s)
            self._wait(self._pg.alltoall_base(out, data, recv_bytes, send_bytes, options))

        self._guard(operation, timeout_s, call)

    def _broadcast(
        self, operation: str, data: Tensor, source: int, timeout_s: float | None
    ) -> None:
        if data.shape[0] == 0:
            return

        def call() -> None:
            options = BroadcastOptions()
            options.rootRank = source
            options.timeout = timedelta(seconds=timeout_s or self._timeout_s)
            self._wait(self._pg.broadcast([data], options))

        self._guard(operation, timeout_s, call)

    def _wait(self, work: Any) -> None:
        """In slices, so that an abort from another thread is seen; gloo keeps the deadline."""
        while True:
            try:
                work.wait(timedelta(seconds=_SLICE_S))
                return
            except RuntimeError:
                if self._error is not None:
                    raise
                if work.is_completed():  # by itself, not because the slice is over
                    work.wait()
                    return

    # -- failure -----------------------------------------------------------------------------

    def _guard(self, operation: str, timeout_s: float | None, call: Callable[[], Any]) -> Any:
        if self._error is not None:
            raise CommError(self._error)
        self._calls += 1
        deadline_s = timeout_s or self._timeout_s
        try:
            return call()
        except RuntimeError as error:
            rank, text = self.ranks[self.idx], str(error)
            if self._error is not None:
                raise CommError(self._error) from error
            self._error = f"group {self.name!r}: unusable after an error in {operation}"
            if any(words in text.lower() for words in _TIMEOUT_WORDS):
                raise CommTimeout(
                    group=self.name,
                    operation=operation,
                    rank=rank,
                    silent=self._silent_peers(),
                    deadline_s=deadline_s,
                ) from error
            raise CommError(
                f"group {self.name!r}: rank {rank} lost a peer in {operation}: {text}"
            ) from error

    def _silent_peers(self) -> list[int]:
        """World ranks that have not noted this call as failed: they are not in it."""
        key = f"{self.name}/late/{self._calls}"
        try:
            self._store.set(f"{key}/{self.idx}", "1")
            time.sleep(_NOTE_S)
            return [
                rank for i, rank in enumerate(self.ranks) if not self._store.check([f"{key}/{i}"])
            ]
        except RuntimeError:  # the store is gone too
            return []


def _sum(parts: Tensor) -> Tensor:
    total = torch.empty_like(parts[0])
    sum_in_order(total.view(-1), [part.view(-1) for part in parts])
    return total
