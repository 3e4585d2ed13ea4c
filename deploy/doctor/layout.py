"""Where the nodes of a layout would go, and what a rank of it takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from cluster.config import ServeConfig
from deploy.doctor.situation import Host
from simulations.deployment import Deployment
from simulations.hardware.calibration import NAMES, Calibration
from simulations.memory import rank_memory
from simulations.presets import load_model

PROCESS_BYTES = 640 << 20
"""Of a rank's Python, torch and Ray: what ranks of mosaic, with 30 MiB of weights and cache, reach."""
_GIB = 1 << 30


def cpus_per_node(config: ServeConfig) -> float:
    return config.parallel.ranks_per_node * config.ray.cpus_per_rank


def nodes_by_host(config: ServeConfig, hosts: Sequence[Host]) -> dict[str, int] | None:
    """How many nodes each host would hold, by address, where there are free CPUs for all of them.

    PACK fills the largest hosts first; Ray may choose others of the same size. None: no room.
    """
    left, placed = config.parallel.num_nodes, {}
    need = cpus_per_node(config)
    for host in sorted(hosts, key=lambda host: (-host.free_cpus, not host.is_head, host.address)):
        fitting = left if need == 0 else int(host.free_cpus // need)
        most = 1 if config.ray.placement_strategy == "STRICT_SPREAD" else left
        if number := min(left, fitting, most):
            placed[host.address] = number
            left -= number
    return None if left else placed


def rank_bytes(config: ServeConfig) -> int:
    """Of the fullest rank: process, weights, cache, activations and messages.

    Raises ValueError for a layout that the model cannot have, CheckpointError or UnsupportedModelError
    for a model that cannot be served.
    """
    deployment = Deployment(
        model=load_model(config.model),
        topology=config.parallel.topology,
        num_redundant_experts=config.experts.num_redundant_experts,
        weights="bfloat16",
        dispatch_dtype=config.comms.dispatch_dtype,
        combine_dtype=config.comms.combine_dtype,
        dispatcher=config.comms.all2all_backend,
    )
    boundless = replace(Calibration.named(NAMES[0]), memory_bytes=math.inf)
    plan = rank_memory(
        deployment, boundless, max_tokens=config.scheduler.max_num_batched_tokens, kv_tokens=0
    )
    wide = 2 if config.dtype == "float32" else 1
    return (
        PROCESS_BYTES
        + wide * plan.total
        + _cache_bytes(config, wide * deployment.kv_bytes_per_token)
    )


def _cache_bytes(config: ServeConfig, bytes_per_token: int) -> int:
    cache = config.cache
    if cache.num_blocks is None:
        return int(cache.memory_gib * _GIB)
    return cache.num_blocks * cache.block_size * bytes_per_token
