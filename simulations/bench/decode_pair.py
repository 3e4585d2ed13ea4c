"""A whole model on two GPUs, with random weights: experts divided over them, heads too if asked to."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from cluster.config import CommsConfig
from cluster.model.config import ModelConfig
from cluster.model.cuda.tensor_parallel import DividedReplica, connect_replica
from cluster.model.cuda.transformer import Quantization, kernel_ops
from comms.groups import ParallelGroups
from comms.launch import RankPool
from comms.store import PrefixStore, connect_store, host_store
from comms.topology import Topology
from router.placement import Placement
from simulations.bench.decode_compile import compile_kernels, most_rows
from simulations.bench.model_on_gpu import ModelBench
from simulations.hardware.gpu_rows import memory_bandwidth
from simulations.hardware.gpu_timing import warm_up
from simulations.presets import load_model

_COMPILED = "compiled"
_PATIENCE_S = 300.0  # with few cores kernels compile for minutes


def run_pair(
    preset: str = "deepseek-v2-lite",
    *,
    quantizations: Sequence[Quantization] = (None, "fp8"),
    batches: Sequence[int] = (1, 8, 64, 256),
    context: int = 128,
    prefill: tuple[int, int] = (2, 2048),
    tensor_parallel: bool = False,
    timeout_s: float = _PATIENCE_S,
) -> dict[str, Any]:
    """As `bench_decode.run`, but batches, tokens and tokens/s are of both GPUs together. Each has sequences of
    its own, of `batches` of them; `tensor_parallel`: both have the same, and half of the heads.

    Kernels compile while the ranks make their weights.
    """
    size = 2 if tensor_parallel else 1
    topology = Topology(num_nodes=1, ranks_per_node=2, tensor_parallel_size=size)
    store, address = host_store()

    def compile_for_ranks() -> None:
        try:
            compile_kernels(preset, quantizations, batches, context, prefill, topology)
        finally:
            store.set(_COMPILED, "1")

    with RankPool(2) as pool, ThreadPoolExecutor(1) as thread:
        compiling = thread.submit(compile_for_ranks)
        ranks = pool.run(
            _measure_rank, topology, address, preset, quantizations, batches, context, prefill,
            timeout_s=timeout_s, comm_timeout_s=timeout_s,
        )  # fmt: skip
        compiling.result()
    report: dict[str, Any] = ranks[0]
    return report


def _measure_rank(
    groups: ParallelGroups,
    address: str,
    preset: str,
    quantizations: Sequence[Quantization],
    batches: Sequence[int],
    context: int,
    prefill: tuple[int, int],
) -> dict[str, Any]:
    torch.cuda.set_device(groups.rank)
    config, capacity = load_model(preset), most_rows(batches, prefill)
    bandwidth, of_models = 0.0, {}
    for quantization in quantizations:
        bench = _bench(groups, config, quantization, capacity)
        if not bandwidth:
            connect_store(address, _PATIENCE_S).wait([_COMPILED])
            warm_up()
            bandwidth = memory_bandwidth()["write"]
        bench.bandwidth = bandwidth
        of_models[quantization or "bfloat16"] = _figures(
            bench, groups.topology.num_replicas, batches, context, prefill
        )
        del bench
        gc.collect()
        torch.cuda.empty_cache()
    return {
        "model": preset,
        "device": f"{groups.world.size} x {torch.cuda.get_device_name()}",
        "copy_bytes_per_s": bandwidth,
        "context": context,
        "results": of_models,
    }


def _bench(
    groups: ParallelGroups, config: ModelConfig, quantization: Quantization, capacity: int
) -> ModelBench:
    """Collective."""
    from cluster.model.cuda.exchange import connect_exchange

    assert groups.store is not None
    device = torch.device("cuda", groups.rank)
    own = replace(groups, store=PrefixStore(quantization or "bfloat16", groups.store))
    placement = Placement.contiguous(config.num_moe_layers, config.num_experts, groups.world.size)
    exchange = connect_exchange(
        config, own, placement, CommsConfig(),
        float8=quantization == "fp8", capacity=capacity, device=device,
    )  # fmt: skip
    replica = connect_replica(config, own, kernel_ops(), capacity=capacity, device=device)
    divided = replica if isinstance(replica, DividedReplica) else None
    return ModelBench(config, quantization, 0.0, groups, exchange, divided)


def _figures(
    bench: ModelBench,
    different: int,
    batches: Sequence[int],
    context: int,
    prefill: tuple[int, int],
) -> dict[str, Any]:
    """Of so many replicas that each do this."""
    prompts = bench.prefill(*prefill)
    prompts["tokens"] *= different
    prompts["tokens_per_s"] *= different
    decode: dict[str, Any] = {}
    for batch in batches:
        found = bench.decode(batch, context, None)
        found["tokens_per_s"] *= different
        decode[str(different * batch)] = found
    return {"prefill": prompts, "decode": decode}
