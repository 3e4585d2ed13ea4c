"""A whole model on one or two GPUs, with random weights, beside the floor of the memory and transformers."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.config import CommsConfig
from cluster.model.cuda.tensor_parallel import DividedReplica, connect_replica
from cluster.model.cuda.transformer import Quantization, kernel_ops
from comms.groups import ParallelGroups
from comms.launch import RankPool
from comms.store import PrefixStore
from comms.topology import Topology
from router.placement import Placement
from simulations.bench.model_on_gpu import PREFILL_ROWS, ModelBench
from simulations.hardware.gpu_rows import memory_bandwidth
from simulations.hardware.gpu_timing import ClockLog, warm_up
from simulations.presets import load_model


def run(
    preset: str = "deepseek-v2-lite",
    *,
    quantizations: Sequence[Quantization] = (None, "fp8"),
    batches: Sequence[int] = (1, 16, 128, 512),
    context: int = 128,
    prefill: tuple[int, int] = (4, 2048),
    profile: Path | None = None,
    stock: Callable[[], dict[str, Any]] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """{"device", "copy_bytes_per_s", "results": {"bfloat16" | "fp8": {"decode": {batch: ...}, ...}}}.

    decode: step_ms, tokens_per_s, floor_ms, over_floor, served_ms, experts (that are read, mean of layers);
    prefill: tokens, ms, tokens_per_s. `profile`: a folder for tables of kernels by time. `stock` measures
    another library on the same device and shapes, after our memory is free.
    """
    say("compiling kernels")
    compile_kernels(preset, quantizations, batches, context, prefill)
    config = load_model(preset)
    warm_up()
    bandwidth = memory_bandwidth()["write"]
    of_models: dict[str, Any] = {}
    report: dict[str, Any] = {
        "model": preset,
        "device": torch.cuda.get_device_name(),
        "copy_bytes_per_s": bandwidth,
        "context": context,
        "results": of_models,
    }
    torch.cuda.empty_cache()
    with ClockLog() as clock:
        for quantization in quantizations:
            name = quantization or "bfloat16"
            bench = ModelBench(config, quantization, bandwidth)
            say(f"{name}: {bench.bytes_read() / 1e9:.2f} GB of weights besides experts")
            decode: dict[str, Any] = {}
            results = {"decode": decode, "prefill": bench.prefill(*prefill)}
            say(f"{name} prefill: {results['prefill']}")
            of_models[name] = {**results, "memory": bench.memory()}
            for batch in batches:
                table = profile and profile / f"decode_{name}_{batch}.txt"
                decode[str(batch)] = row = bench.decode(batch, context, table)
                say(f"{name} decode {batch}: {row}")
            del bench
            gc.collect()
            torch.cuda.empty_cache()
    report["clock"] = clock.summary()
    if stock is not None:
        of_models["stock"] = stock()
    return report


def run_pair(
    preset: str = "deepseek-v2-lite",
    *,
    quantizations: Sequence[Quantization] = (None, "fp8"),
    batches: Sequence[int] = (1, 8, 64, 256),
    context: int = 128,
    prefill: tuple[int, int] = (2, 2048),
    tensor_parallel: bool = False,
    timeout_s: float = 120.0,
) -> dict[str, Any]:
    """The same on two GPUs, experts divided over them: results as in `run`, where batches, tokens and
    tokens/s are of both together. Each has sequences of its own, of `batches` of them; `tensor_parallel`:
    both have the same, and half of the heads."""
    size = 2 if tensor_parallel else 1
    topology = Topology(num_nodes=1, ranks_per_node=2, tensor_parallel_size=size)
    compile_kernels(preset, quantizations, batches, context, prefill, size)
    with RankPool(2) as pool:
        ranks = pool.run(
            _measure_rank, topology, preset, quantizations, batches, context, prefill,
            timeout_s=timeout_s, comm_timeout_s=timeout_s,
        )  # fmt: skip
    report: dict[str, Any] = ranks[0]
    return report


def compile_kernels(
    preset: str,
    quantizations: Sequence[Quantization],
    batches: Sequence[int],
    context: int,
    prefill: tuple[int, int],
    ranks_of_replica: int = 1,
) -> None:
    """Triton's cache filled by several processes at once, each with two layers of the model: one alone
    would compile for minutes."""
    shapes = [*((batch, context) for batch in batches), None]
    tasks = [
        (preset, q, shape, prefill, ranks_of_replica) for q in quantizations for shape in shapes
    ]
    processes = min(len(tasks), os.cpu_count() or 2)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        list(pool.map(_compile, *zip(*tasks, strict=True)))


def _compile(
    preset: str,
    quantization: Quantization,
    decode: tuple[int, int] | None,
    prefill: tuple[int, int],
    ranks_of_replica: int,
) -> None:
    config = load_model(preset)
    has_dense = config.dense_intermediate_size > 0
    config = replace(config, num_layers=2, moe_layers=(1,) if has_dense else (0, 1))
    replica = None
    if ranks_of_replica > 1:
        rows = RowsOfOne(ranks_of_replica)
        replica = DividedReplica(
            rows=rows, size=rows.size, idx=0, vocab_size=config.vocab_size, ops=kernel_ops()
        )
    bench = ModelBench(config, quantization, bandwidth=1.0, replica=replica)
    if decode is None:
        bench.prefill(*prefill)
    else:
        bench.decode(*decode, None)


def _measure_rank(
    groups: ParallelGroups,
    preset: str,
    quantizations: Sequence[Quantization],
    batches: Sequence[int],
    context: int,
    prefill: tuple[int, int],
) -> dict[str, Any]:
    from cluster.model.cuda.exchange import connect_exchange

    capacity = max(*batches, prefill[0] * prefill[1], PREFILL_ROWS)
    torch.cuda.set_device(groups.rank)
    device = torch.device("cuda", groups.rank)
    config, size = load_model(preset), groups.world.size
    warm_up()
    bandwidth = memory_bandwidth()["write"]
    of_models: dict[str, Any] = {}
    for quantization in quantizations:
        name = quantization or "bfloat16"
        assert groups.store is not None
        own = replace(groups, store=PrefixStore(name, groups.store))
        placement = Placement.contiguous(config.num_moe_layers, config.num_experts, size)
        exchange = connect_exchange(
            config, own, placement, CommsConfig(),
            float8=quantization == "fp8", capacity=capacity, device=device,
        )  # fmt: skip
        replica = connect_replica(config, own, kernel_ops(), capacity=capacity, device=device)
        divided = replica if isinstance(replica, DividedReplica) else None
        bench = ModelBench(config, quantization, bandwidth, groups, exchange, divided)
        row = bench.prefill(*prefill)
        different = groups.topology.num_replicas
        row["tokens"] *= different
        row["tokens_per_s"] *= different
        decode: dict[str, Any] = {}
        of_models[name] = {"prefill": row, "decode": decode}
        for batch in batches:
            found = bench.decode(batch, context, None)
            found["tokens_per_s"] *= different
            decode[str(different * batch)] = found
        del bench, exchange, replica, divided
        gc.collect()
        torch.cuda.empty_cache()
    return {
        "model": preset,
        "device": f"{size} x {torch.cuda.get_device_name()}",
        "copy_bytes_per_s": bandwidth,
        "context": context,
        "results": of_models,
    }


@dataclass
class RowsOfOne:
    """Moves of a replica of `size` without the others: shapes are right, numbers are not. To compile by."""

    size: int
    num_rows: int = 1

    def expect(self, num_rows: int) -> None:
        self.num_rows = num_rows

    def gather(
        self, x_OH: Tensor, added_OH: Tensor | None = None, norm: Any = None
    ) -> tuple[Tensor, Tensor]:
        return x_OH.repeat(self.size, 1)[: self.num_rows], x_OH

    def scatter(
        self, parts_TH: Tensor, residual_OH: Tensor | None = None, norm: Any = None
    ) -> tuple[Tensor, Tensor]:
        own_OH = parts_TH[: -(-self.num_rows // self.size)]
        return own_OH, own_OH

    def gather_logits(self, logits_LW: Tensor, first: int, out_LV: Tensor) -> None:
        out_LV.zero_()

    def check(self) -> None:
        pass
