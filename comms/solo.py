"""A group of one rank: every collective is the identity and costs nothing."""

import time
from collections.abc import Iterable, Sequence

from torch import Tensor

from comms.sizes import check_parts, check_sizes, joined


class SoloGroup:
    """A Group with one member. Operations return their argument itself, not a copy."""

    def __init__(self, *, name: str, rank: int) -> None:
        self.name = name
        self.ranks: tuple[int, ...] = (rank,)
        self.idx = 0
        self.size = 1

    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        check_sizes(x, sizes, 1)
        return x

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        check_sizes(x, sizes, 1)
        return x

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_to_all(self, x: Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int]) -> Tensor:
        check_sizes(x, send_sizes, 1)
        check_sizes(x, recv_sizes, 1)
        return x

    def exchange(self, parts: Sequence[Tensor], stage: str) -> list[Tensor]:
        check_parts(parts, 1)
        return [parts[0]]

    def start_exchange(self, chunks: Iterable[Sequence[Tensor]], stage: str) -> "FinishedExchange":
        parts = []
        for chunk in chunks:
            check_parts(chunk, 1)
            parts.append(chunk[0])
        return FinishedExchange([joined(parts)])

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        return x

    def broadcast_bytes(
        self, data: bytes | None, source: int, timeout_s: float | None = None
    ) -> bytes:
        if data is None:
            raise ValueError("the source of broadcast_bytes needs data, got None")
        return data

    def barrier(self, timeout_s: float | None = None) -> None:
        return

    def abort(self) -> None:
        return

    def close(self) -> None:
        return


class FinishedExchange:
    """A PendingExchange that never was: what it brings is here."""

    def __init__(self, received: list[Tensor]) -> None:
        self._received = received
        self.waits = [0.0] * len(received)
        self.finished = time.perf_counter()

    def wait(self) -> list[Tensor]:
        return self._received
