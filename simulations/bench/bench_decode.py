"""A whole model on one or two GPUs, with random weights, beside the floor of the memory and transformers."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from cluster.model.cuda.transformer import Quantization
from comms.groups import ParallelGroups
from comms.launch import RankPool
from comms.store import connect_store, host_store
from comms.topology import Topology
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
    timeout_s: float = 120.0,
) -> dict[str, Any]:
    """The same on two GPUs, experts divided over them and each with sequences of its own: results as in
    `run`, where batches, tokens and tokens/s are of both together."""
    topology = Topology(num_nodes=1, ranks_per_node=2, tensor_parallel_size=1)
    compile_kernels(preset, quantizations, batches, context, prefill)
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
) -> None:
    """Triton's cache filled by several processes at once, each with two layers of the model: one alone
    would compile for minutes."""
    shapes = [*((batch, context) for batch in batches), None]
    tasks = [(preset, q, shape, prefill) for q in quantizations for shape in shapes]
    processes = min(len(tasks), os.cpu_count() or 2)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        list(pool.map(_compile, *zip(*tasks, strict=True)))


def _compile(
    preset: str,
    quantization: Quantization,
    decode: tuple[int, int] | None,
    prefill: tuple[int, int],
) -> None:
    config = load_model(preset)
    has_dense = config.dense_intermediate_size > 0
    config = replace(config, num_layers=2, moe_layers=(1,) if has_dense else (0, 1))
    bench = ModelBench(config, quantization, bandwidth=1.0)
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
    from cluster.model.cuda.exchange import SymmetricExchange
    from comms.symmetric_layout import SymmetricLayout

    torch.cuda.set_device(groups.rank)
    device = torch.device("cuda", groups.rank)
    store, address = host_store() if groups.rank == 0 else (None, "")
    address = groups.world.broadcast_bytes(address.encode() or None, 0).decode()
    config, size = load_model(preset), groups.world.size
    warm_up()
    bandwidth = memory_bandwidth()["write"]
    of_models: dict[str, Any] = {}
    for quantization in quantizations:
        layout = SymmetricLayout(
            world_size=size,
            slots_per_rank=config.num_experts // size,
            hidden=config.hidden_size,
            num_topk=config.gate.num_experts_per_token,
            capacity=max(*batches, prefill[0] * prefill[1], PREFILL_ROWS),
            dispatch_dtype="float8" if quantization else "bfloat16",
            combine="fixed",
        )
        exchange = SymmetricExchange.connect(
            layout, store or connect_store(address), groups.rank, device, groups.where
        )
        bench = ModelBench(config, quantization, bandwidth, groups, exchange)
        row = bench.prefill(*prefill)
        row["tokens"], row["tokens_per_s"] = size * row["tokens"], size * row["tokens_per_s"]
        decode: dict[str, Any] = {}
        of_models[quantization or "bfloat16"] = {"prefill": row, "decode": decode}
        for batch in batches:
            found = bench.decode(batch, context, None)
            found["tokens_per_s"] *= size
            decode[str(size * batch)] = found
        del bench, exchange
        gc.collect()
        torch.cuda.empty_cache()
    return {
        "model": preset,
        "device": f"{size} x {torch.cuda.get_device_name()}",
        "copy_bytes_per_s": bandwidth,
        "context": context,
        "results": of_models,
    }
