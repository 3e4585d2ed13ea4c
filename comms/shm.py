"""Collectives between the ranks of one host, over shared memory.

Every collective is the same move: expose my bytes in my segment, wait until the peers have exposed
theirs, read the parts that are mine. Bytes beyond a segment's capacity go in further rounds. See
`segments.py` for why one wait per round is enough. A call costs tens of microseconds.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from comms.diagnosis import Diagnosis
from comms.segments import Segments
from comms.shm_exchange import ShmExchange
from comms.sizes import (
    as_bytes,
    check_counts,
    check_parts,
    check_sizes,
    empty_rows,
    even_sizes,
    joined,
    offsets_of,
    row_bytes,
    sum_in_order,
)
from comms.store import Store

_ONE_SHOT_BYTES = 32 * 1024  # beyond this an all-reduce is a reduce-scatter and an all-gather


class ShmGroup:
    """A Group over shared memory; collective constructor."""

    def __init__(
        self,
        *,
        name: str,
        ranks: Sequence[int],
        rank: int,
        store: Store,
        diagnosis: Diagnosis,
        timeout_s: float = 60.0,
        capacity: int = 1 << 20,
    ) -> None:
        if capacity <= len(ranks) or capacity % 64:
            raise ValueError(
                "capacity must be more than a byte per rank and a multiple of 64 bytes, "
                f"got {capacity}"
            )
        self.name = name
        self.ranks = tuple(ranks)
        self.size = len(self.ranks)
        self.idx = self.ranks.index(rank)
        self._capacity = capacity
        self._pending: ShmExchange | None = None
        self._typed: dict[tuple[int, int, torch.dtype], Tensor] = {}
        self._segments = Segments(
            name=name,
            ranks=self.ranks,
            idx=self.idx,
            store=store,
            diagnosis=diagnosis,
            timeout_s=timeout_s,
            capacity=capacity,
        )

    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        check_sizes(x, sizes, self.size, self.idx)
        out = empty_rows(x, sum(sizes))
        self._gather_bytes(as_bytes(x), as_bytes(out), offsets_of(sizes, row_bytes(x)))
        return out

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        check_sizes(x, sizes, self.size)
        starts = offsets_of(sizes, row_bytes(x) // x.element_size())
        shape = (sizes[self.idx], *x.shape[1:])
        return self._reduce_flat(x.reshape(-1), starts, "reduce_scatter").view(shape)

    def all_reduce(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1)
        if x.numel() * x.element_size() <= min(_ONE_SHOT_BYTES, self._capacity):
            return self._all_reduce_once(flat).view(x.shape)
        sizes = even_sizes(flat.shape[0], self.size)
        mine = self._reduce_flat(flat, offsets_of(sizes), "all_reduce")
        return self.all_gather(mine, sizes).view(x.shape)

    def all_to_all(self, x: Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int]) -> Tensor:
        check_sizes(x, send_sizes, self.size)
        check_counts(recv_sizes, self.size)
        if send_sizes[self.idx] != recv_sizes[self.idx]:
            raise ValueError(
                f"expected {send_sizes[self.idx]} rows from myself, got {recv_sizes[self.idx]}"
            )
        unit = row_bytes(x)
        sent = as_bytes(x).split([n * unit for n in send_sizes])
        out = empty_rows(x, sum(recv_sizes))
        received = as_bytes(out).split([n * unit for n in recv_sizes])
        received[self.idx].copy_(sent[self.idx])
        self._begin("all_to_all")
        ShmExchange(self._segments, sent, "all_to_all", into=received).finish()
        return out

    def exchange(self, parts: Sequence[Tensor], stage: str) -> list[Tensor]:
        check_parts(parts, self.size)
        self._begin(stage)
        return ShmExchange(self._segments, parts, stage).wait()

    def start_exchange(self, chunks: Iterable[Sequence[Tensor]], stage: str) -> ShmExchange:
        """Copying into shared memory is the whole journey: chunks wait for the last one.

        What does not fit into a segment at once goes on only while members wait: then ranks must
        wait in the same order as they started.
        """
        everything = list(chunks)
        for chunk in everything:
            check_parts(chunk, self.size)
        parts = everything[0] if len(everything) == 1 else self._join(everything)
        self._begin(stage)
        self._pending = ShmExchange(self._segments, parts, stage)
        return self._pending

    def _join(self, chunks: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        return [joined([chunk[j] for chunk in chunks]) for j in range(self.size)]

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        if source == self.idx:
            data = as_bytes(x)
            for lo in range(0, data.shape[0], self._capacity):
                self._expose("broadcast", data, lo)
            return x
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        data = as_bytes(out)
        for lo in range(0, data.shape[0], self._capacity):
            self._expose("broadcast", data[:0], lo)
            self._wait_for(source, "broadcast", data.shape[0])
            last = min(lo + self._capacity, data.shape[0])
            data[lo:last] = self._window(source, lo, lo, last)
        return out

    def broadcast_bytes(
        self, data: bytes | None, source: int, timeout_s: float | None = None
    ) -> bytes:
        if source == self.idx:
            if data is None:
                raise ValueError("the source of broadcast_bytes needs data, got None")
            self._send_bytes(data, timeout_s)
            return data
        segments, parts, lo, end = self._segments, [], 0, 1
        while lo < end:
            half = self._begin("broadcast_bytes", timeout_s)
            segments.set_header(half, "broadcast_bytes", 0)
            segments.post()
            segments.wait((source,), "broadcast_bytes", timeout_s)
            end = self._segments.checked_total(source, "broadcast_bytes")
            start = segments.data_range(half)
            parts.append(
                segments.maps[source][start : start + max(0, min(end - lo, self._capacity))]
            )
            lo += self._capacity
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def barrier(self, timeout_s: float | None = None) -> None:
        segments = self._segments
        segments.set_header(self._begin("barrier", timeout_s), "barrier", 0)
        segments.post()
        self._wait_all("barrier", timeout_s)

    def abort(self) -> None:
        self._segments.abort()

    def close(self) -> None:
        self._typed.clear()
        self._segments.close()

    # -- the one move ------------------------------------------------------------------------

    def _begin(self, operation: str, timeout_s: float | None = None) -> int:
        """The half to write for the next round; an exchange under way is finished first."""
        if self._pending is not None:
            self._pending.finish()
            self._pending = None
        return self._segments.begin(operation, timeout_s)

    def _expose(self, operation: str, data: Tensor, lo: int) -> None:
        """Post the window of `data` that starts at byte lo."""
        segments = self._segments
        half = self._begin(operation)
        num_bytes = min(data.shape[0] - lo, self._capacity)
        if num_bytes > 0:
            start = segments.data_range(half)
            segments.memory[self.idx][start : start + num_bytes] = data[lo : lo + num_bytes]
        segments.set_header(half, operation, data.shape[0])
        segments.post()

    def _window(self, peer: int, lo: int, first: int, last: int) -> Tensor:
        """Bytes [first, last) of what `peer` exposes, of which the current round shows lo on."""
        start = self._segments.data_range(self._segments.half) - lo
        return self._segments.memory[peer][start + first : start + last]

    def _wait_all(self, operation: str, timeout_s: float | None = None) -> None:
        self._segments.wait(self._segments.peers, operation, timeout_s)
        for peer in self._segments.peers:
            self._segments.checked_total(peer, operation)

    def _wait_for(self, peer: int, operation: str, num_bytes: int) -> None:
        self._segments.wait((peer,), operation)
        self._check_total(peer, operation, num_bytes)

    def _check_total(self, peer: int, operation: str, num_bytes: int) -> None:
        total = self._segments.checked_total(peer, operation)
        if total != num_bytes:
            raise self._segments.fail(
                f"rank {self.ranks[peer]} brings {total} bytes to {operation} "
                f"but rank {self.ranks[self.idx]} expects {num_bytes}"
            )

    def _send_bytes(self, data: bytes, timeout_s: float | None) -> None:
        segments = self._segments
        for lo in range(0, max(1, len(data)), self._capacity):
            half = self._begin("broadcast_bytes", timeout_s)
            part = data[lo : lo + self._capacity]
            start = segments.data_range(half)
            segments.maps[self.idx][start : start + len(part)] = part
            segments.set_header(half, "broadcast_bytes", len(data))
            segments.post()

    # -- gathers and sums --------------------------------------------------------------------

    def _gather_bytes(self, mine: Tensor, out: Tensor, starts: Sequence[int]) -> None:
        longest = max(starts[j + 1] - starts[j] for j in range(self.size))
        for lo in range(0, longest, self._capacity):
            self._expose("all_gather", mine, lo)
            self._wait_all("all_gather")
            for j in range(self.size):
                total = starts[j + 1] - starts[j]
                self._check_total(j, "all_gather", total)
                last = min(total, lo + self._capacity)
                if lo < last:
                    out[starts[j] + lo : starts[j] + last] = self._window(j, lo, lo, last)

    def _reduce_flat(self, flat: Tensor, starts: Sequence[int], operation: str) -> Tensor:
        """Sum over the members of elements [starts[idx], starts[idx + 1]) of their `flat`."""
        mine, itemsize = as_bytes(flat), flat.element_size()
        begin, end = starts[self.idx], starts[self.idx + 1]
        total = torch.empty(end - begin, dtype=flat.dtype)
        step = self._capacity // itemsize
        for lo in range(0, flat.shape[0], step):
            self._expose(operation, mine, lo * itemsize)
            self._wait_all(operation)
            first, last = max(begin, lo), min(end, lo + step)
            parts = []
            for j in range(self.size):
                self._check_total(j, operation, mine.shape[0])
                parts.append(self._elements(j, flat.dtype)[max(0, first - lo) : max(0, last - lo)])
            if first < last:
                sum_in_order(total[first - begin : last - begin], parts)
        return total

    def _all_reduce_once(self, flat: Tensor) -> Tensor:
        self._expose("all_reduce", as_bytes(flat), 0)
        self._wait_all("all_reduce")
        parts = []
        for j in range(self.size):
            self._check_total(j, "all_reduce", flat.shape[0] * flat.element_size())
            parts.append(self._elements(j, flat.dtype)[: flat.shape[0]])
        total = torch.empty(flat.shape[0], dtype=flat.dtype)
        sum_in_order(total, parts)
        return total

    def _elements(self, peer: int, dtype: torch.dtype) -> Tensor:
        """The data of `peer`'s current half as elements of `dtype`; the views are kept."""
        half = self._segments.half
        view = self._typed.get((peer, half, dtype))
        if view is None:
            start = self._segments.data_range(half)
            view = self._segments.memory[peer][start : start + self._capacity].view(dtype)
            self._typed[peer, half, dtype] = view
        return view
