"""The dispatcher of GPUs that suits where they are: memory that those of a node share, NCCL between nodes."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from comms.meeting import meet
from comms.nccl import NcclRail
from comms.nodes import NodesDispatcher
from comms.rail_watch import Progress, RailWatch
from comms.store import PrefixStore, Store, patience
from comms.symmetric import SymmetricDispatcher
from comms.symmetric_layout import SymmetricLayout
from comms.symmetric_memory import SymmetricMemory
from comms.topology import Topology
from comms.where import Where

_log = logging.getLogger(__name__)


GpuDispatcher = SymmetricDispatcher | NodesDispatcher


def connect_dispatcher(
    topology: Topology,
    layout: SymmetricLayout,
    store: Store,
    rank: int,
    device: torch.device,
    *,
    where: Where | None = None,
    timeout_s: float = 60.0,
    programs: int | None = None,
    exact_above: int | None = None,
) -> GpuDispatcher:
    """Collective over the world, each rank with a GPU of its own. layout: as if all were one node.

    `store` is for this dispatcher alone. Where GPUs of a node cannot reach each other's memory, each rank
    counts as a node: NCCL alone; combine "fixed" gives the same bits either way. exact_above: see
    `comms/nodes.py`. Raises CommTimeout for ranks that do not come, RuntimeError without NCCL where it is
    needed.
    """
    where, memory = where or Where(), None
    if topology.ranks_per_node > 1:
        memory = _shared_memory(topology, layout, store, rank, device, timeout_s)
        if memory is None:
            topology = Topology(num_nodes=topology.world_size, ranks_per_node=1)
    of_node = _of_node(layout, topology)
    if memory is None:
        (memory,) = SymmetricMemory.in_one_process(1, of_node.num_bytes, device)
    node_idx, local_rank = topology.node_of(rank), topology.local_rank_of(rank)
    node = SymmetricDispatcher(
        of_node, memory, where=where, timeout_s=timeout_s, programs=programs,
        ranks=topology.node_ranks(node_idx),
    )  # fmt: skip
    if topology.num_nodes == 1:
        return node
    ranks, name = topology.rail_ranks(local_rank), f"rail{local_rank}"
    rail = NcclRail(store, node_idx, ranks, device, name=name, timeout_s=timeout_s)
    progress = Progress(device)
    watch = RailWatch(
        progress, store, node_idx, ranks, where, name=name, timeout_s=timeout_s, abort=rail.abort
    )
    return NodesDispatcher(node, rail, progress, watch, exact_above=exact_above)


def _of_node(layout: SymmetricLayout, topology: Topology) -> SymmetricLayout:
    """What the ranks of one node agree on."""
    return replace(
        layout,
        world_size=topology.ranks_per_node,
        capacity=topology.num_nodes * layout.capacity,
        of_several=topology.num_nodes > 1,
    )


def _shared_memory(
    topology: Topology,
    layout: SymmetricLayout,
    store: Store,
    rank: int,
    device: torch.device,
    timeout_s: float,
) -> SymmetricMemory | None:
    """My node's, if every node has it: all ranks must take the same way."""
    node, local_rank = topology.node_of(rank), topology.local_rank_of(rank)
    of_node = _of_node(layout, topology)
    memory, reason, ranks = None, "", range(topology.world_size)
    meet(store, rank, ranks, name="before shared memory", timeout_s=timeout_s)
    try:
        # Who cannot share does not come: the others learn it while they are still waited for below.
        with patience(store, timeout_s / 2):
            memory = SymmetricMemory.connect(
                PrefixStore(f"node{node}", store), local_rank, topology.ranks_per_node,
                of_node.num_bytes, device,
            )  # fmt: skip
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
    words = meet(store, rank, ranks, reason, name="shared memory", timeout_s=timeout_s)
    reasons = [(member, word) for member, word in zip(ranks, words, strict=True) if word]
    if not reasons:
        return memory
    if rank == 0:
        _log.warning("no memory shared inside nodes (rank %d: %s): NCCL alone", *reasons[0])
    return None
