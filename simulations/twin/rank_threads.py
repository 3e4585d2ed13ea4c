"""Ranks as threads of this process, so that code which exchanges counts can be run without a cluster.

What a rank brings to an exchange lies on a table that its group shares; all meet, and take theirs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from comms.collectives import ExchangeCollectives, Parts
from comms.groups import ParallelGroups
from comms.links import LinkSpeed
from comms.sizes import check_parts, joined
from comms.solo import FinishedExchange
from comms.topology import Topology

T = TypeVar("T")


class Table:
    """Of one group: what each member brought to the present exchange."""

    def __init__(self, size: int, timeout_s: float) -> None:
        self.brought: list[list[Tensor]] = [[] for _ in range(size)]
        self.meeting = threading.Barrier(size, timeout=timeout_s)


class ThreadGroup(ExchangeCollectives):
    """A Group whose members are threads. Nothing is ever under way: all meet in `start_exchange`."""

    def __init__(self, *, name: str, ranks: Sequence[int], rank: int, table: Table) -> None:
        super().__init__(name=name, ranks=ranks, rank=rank)
        self._table = table

    def _start(
        self,
        chunks: Iterable[Parts],
        stage: str,
        sources: Sequence[int],
        out: Tensor | None = None,
        sizes: Sequence[int] | None = None,
    ) -> _Met:
        mine: list[list[Tensor]] = [[] for _ in range(self.size)]
        for chunk in chunks:
            check_parts(chunk, self.size)
            for parts, part in zip(mine, chunk, strict=True):
                if part is not None:
                    parts.append(part)
        table = self._table
        table.brought[self.idx] = [joined(parts) for parts in mine]
        table.meeting.wait()
        received = [parts[self.idx].clone() for parts in table.brought]
        table.meeting.wait()  # nobody brings the next before all have taken this
        if out is not None and sizes is not None:
            for i, place in enumerate(out.split(list(sizes))):
                if i in sources:
                    place.copy_(received[i])
        return _Met(received)

    def abort(self) -> None:
        self._table.meeting.abort()

    def close(self) -> None:
        return


class _Met(FinishedExchange):
    def wait(self, timeout_s: float | None = None) -> list[Tensor]:
        return self._received


def run_ranks(
    topology: Topology,
    fn: Callable[[ParallelGroups], T],
    *,
    links: LinkSpeed | None = None,
    timeout_s: float = 60.0,
) -> list[T]:
    """fn(groups) in a thread per rank; results in rank order. The first rank's error is raised that
    is more than others' absence; `links`: what the groups say of theirs."""
    tables: dict[tuple[str, tuple[int, ...]], Table] = {}

    def group(name: str, ranks: Sequence[int], rank: int) -> ThreadGroup:
        key = name, tuple(ranks)
        table = tables.setdefault(key, Table(len(ranks), timeout_s))
        return ThreadGroup(name=name, ranks=ranks, rank=rank, table=table)

    def groups_of(rank: int) -> ParallelGroups:
        leaders = topology.leader_ranks
        return ParallelGroups(
            topology=topology,
            rank=rank,
            epoch=0,
            world=group("world", range(topology.world_size), rank),
            node=group("node", topology.node_ranks(topology.node_of(rank)), rank),
            rail=group("rail", topology.rail_ranks(topology.local_rank_of(rank)), rank),
            tp=group("tp", topology.tp_ranks(topology.replica_of(rank)), rank),
            leaders=group("leaders", leaders, rank) if rank in leaders else None,
            links=links,
        )

    def call(groups: ParallelGroups) -> T:
        try:
            torch.set_grad_enabled(False)
            return fn(groups)
        except BaseException:
            for table in tables.values():
                table.meeting.abort()
            raise

    everybody = [groups_of(rank) for rank in range(topology.world_size)]
    with ThreadPoolExecutor(topology.world_size, thread_name_prefix="rank") as pool:
        futures = [pool.submit(call, groups) for groups in everybody]
        errors = [error for error in (future.exception() for future in futures) if error]
    if errors:
        raise min(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError))
    return [future.result() for future in futures]
