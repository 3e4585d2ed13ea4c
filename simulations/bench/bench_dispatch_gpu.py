"""Exchange between the GPUs of one node: microseconds of each way, beside the link's floor and NCCL.

Figures are of the slower rank (`simulations/bench/exchange_times.py` says how they are taken). A dispatch
ends when the rows of all peers are here, quantisation included; a combine when the sums are added.
The floor of a way is the bytes that leave a rank over the link's 450 GB/s each way.

    dispatch_float8, dispatch_bfloat16
    combine_sums      of sums that are there already, one per row: what DeepEP's combine does
    combine_pairs     weights and adds the pairs' outputs on the way, in fp32
    combine_fixed     the same in integers, which no placement changes
    round_trip        float8 dispatch and combine_pairs, with nothing between
    peer_copy         the same bytes as bfloat16 dispatch, by the copy engine's kernel of torch
    nccl              the same, by its sends and receives

With `rail` each GPU is a node of its own, and the same ways, named nodes_*, go over NCCL (`comms/nodes.py`):
all rows to all nodes, needed or not, and combine_fixed in 32 bits. Here NCCL takes NVLink too.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from comms.groups import ParallelGroups
from comms.launch import RankPool
from comms.store import connect_store, host_store
from comms.topology import Topology
from simulations.bench import exchange_times, exchange_ways
from simulations.bench.exchange_check import check
from simulations.bench.exchange_peers import Peers
from simulations.bench.exchange_workload import GpuWorkload, RankTensors

DEEPEP_US = {  # V1.2.1, intranode kernels on two H200, 24 multiprocessors, best of its tuning
    "dispatch_float8": {128: 45, 1024: 75, 4096: 243},
    "dispatch_bfloat16": {128: 33, 1024: 105, 4096: 323},
    "combine_sums": {128: 42, 1024: 119, 4096: 413},
}
Results = dict[str, dict[int, exchange_times.Figures]]


def run(workload: GpuWorkload, *, peers: bool = True, timeout_s: float = 300.0) -> dict[str, Any]:
    """{"config", "device", "results": {name: {tokens: {"us", "floor_us", "bytes", ...}}}, "checks"}.

    Raises ValueError where there are fewer GPUs than ranks, RankError where a rank failed or found
    other bits than the reference.
    """
    if torch.cuda.device_count() < workload.ranks:
        raise ValueError(f"need {workload.ranks} GPUs, there are {torch.cuda.device_count()}")
    store, address = host_store()
    with RankPool(workload.ranks) as pool:
        answers = pool.run(
            _measure,
            Topology(num_nodes=1, ranks_per_node=workload.ranks),
            address,
            workload,
            peers,
            timeout_s=timeout_s,
        )
    del store
    return {
        "config": asdict(workload),
        "device": answers[0]["device"],
        "checks": answers[0]["checks"],
        "results": _slowest(workload, [answer["results"] for answer in answers]),
    }


def _slowest(workload: GpuWorkload, of_ranks: list[Results]) -> dict[str, dict[str, Any]]:
    """Of the slowest rank each, with DeepEP's for the workload that they are of."""
    is_deepeps = (
        workload.ranks, workload.hidden, workload.num_experts, workload.num_topk
    ) == (2, 7168, 256, 8)  # fmt: skip
    found: dict[str, dict[str, Any]] = {}
    for name, of_sizes in of_ranks[0].items():
        found[name] = {}
        for tokens in of_sizes:
            slowest = max(
                (results[name][tokens] for results in of_ranks), key=lambda row: row["us"]
            )
            if is_deepeps and tokens in DEEPEP_US.get(name, {}):
                slowest["deepep_us"] = DEEPEP_US[name][tokens]
            found[name][str(tokens)] = slowest
    return found


def _measure(
    groups: ParallelGroups, address: str, workload: GpuWorkload, peers: bool
) -> dict[str, Any]:
    """What each rank does."""
    rank, world = groups.rank, groups.world
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    store = connect_store(address)
    tensors = RankTensors(workload=workload, rank=rank, device=device)
    inside = exchange_ways.of_one_node(workload, store, rank, device)
    nodes = exchange_ways.of_nodes(workload, store, rank, device) if workload.rail else None
    all_ways = (inside, nodes) if nodes else (inside,)
    others = Peers.connect(tensors, store) if peers else None
    checks = check(tensors, inside, nodes)
    results: Results = {}
    for tokens in workload.tokens:
        found = [exchange_times.figures(tensors, world, ways, tokens) for ways in all_ways]
        if others:
            found.append(others.figures(world, tokens))
        for name, row in (item for part in found for item in part.items()):
            results.setdefault(name, {})[tokens] = row
    world.barrier()
    for dispatcher in nodes.all if nodes else ():
        dispatcher.close()
    if others:
        others.close()
    return {
        "device": f"{workload.ranks} x {torch.cuda.get_device_name()}",
        "checks": checks,
        "results": results,
    }
