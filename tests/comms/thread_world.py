"""A world of ranks in one process: one thread per rank, plain torch for the collectives.

It lets hypothesis try hundreds of topologies a second on the real dispatchers, without processes.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from comms.groups import ParallelGroups
from comms.solo import FinishedExchange
from comms.topology import Topology
from comms.where import Where


class Board:
    """Where the threads of one group lay what they bring."""

    def __init__(self, size: int) -> None:
        self.values: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=30)


class ThreadGroup:
    """The Group protocol over a Board, every operation as its definition says."""

    def __init__(self, name: str, ranks: tuple[int, ...], rank: int, board: Board) -> None:
        self.name, self.ranks, self.idx, self.size = name, ranks, ranks.index(rank), len(ranks)
        self._board = board

    def _share(self, value: Any) -> list[Any]:
        self._board.values[self.idx] = value
        self._board.barrier.wait()
        values = list(self._board.values)
        self._board.barrier.wait()
        return values

    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        return torch.cat(self._share(x))

    def all_reduce(self, x: Tensor) -> Tensor:
        return sum(y.float() for y in self._share(x)).to(x.dtype)

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        return torch.split(self.all_reduce(x), list(sizes))[self.idx]

    def all_to_all(self, x: Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int]) -> Tensor:
        parts = [part[self.idx] for part in self._share(torch.split(x, list(send_sizes)))]
        assert [len(part) for part in parts] == list(recv_sizes)
        return torch.cat(parts)

    def exchange(self, parts: Sequence[Tensor], stage: str) -> list[Tensor]:
        return self.start_exchange([parts], stage).wait()

    def start_exchange(self, chunks: Iterable[Sequence[Tensor]], stage: str) -> FinishedExchange:
        """Not one byte is late here: all members meet, and the exchange is over."""
        mine = [torch.cat(parts) for parts in zip(*chunks, strict=True)]
        assert all(part.dtype == torch.uint8 and part.dim() == 1 for part in mine)
        everybody = self._share((stage, mine))
        assert [name for name, _ in everybody] == [stage] * self.size
        return FinishedExchange([parts[self.idx] for _, parts in everybody])

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        return self._share(x)[source]

    def broadcast_bytes(self, data: bytes | None, source: int, timeout_s: Any = None) -> bytes:
        return self._share(data)[source]

    def barrier(self, timeout_s: float | None = None) -> None:
        self._share(None)

    def abort(self) -> None:
        self._board.barrier.abort()

    def close(self) -> None:
        return


def run_threads(fn: Callable[..., Any], topology: Topology, per_rank: Sequence[Any]) -> list[Any]:
    """fn(groups, per_rank[rank]) in a thread per rank; results in rank order."""
    boards: dict[tuple[str, tuple[int, ...]], Board] = {}

    def groups_of(rank: int) -> ParallelGroups:
        def group(name: str, ranks: Sequence[int]) -> ThreadGroup:
            key = (name, tuple(ranks))
            board = boards.setdefault(key, Board(len(key[1])))
            return ThreadGroup(name, key[1], rank, board)

        return ParallelGroups._build(topology, rank, 0, group, Where())

    all_groups = [groups_of(rank) for rank in range(topology.world_size)]

    def call(rank: int) -> Any:
        try:
            return fn(all_groups[rank], per_rank[rank])
        except BaseException:
            all_groups[rank].abort()
            raise

    with ThreadPoolExecutor(topology.world_size) as pool:
        futures = [pool.submit(call, rank) for rank in range(topology.world_size)]
        errors = [future.exception() for future in futures]
    own = [e for e in errors if e and not isinstance(e, threading.BrokenBarrierError)]
    for error in own or [e for e in errors if e]:
        raise error
    return [future.result() for future in futures]
