"""Kernels of a model compiled by several processes at once into Triton's cache: one alone takes minutes.

Each has two layers of the model. For two GPUs it is rank 0 of two, whose kernels wait for nobody: numbers
are wrong, kernels are those of the pair.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import torch
from torch import Tensor

from cluster.config import CommsConfig
from cluster.model.config import ModelConfig
from cluster.model.cuda.tensor_parallel import DividedReplica, rows_layout
from cluster.model.cuda.transformer import Quantization, kernel_ops
from comms.groups import ParallelGroups
from comms.solo import SoloGroup
from comms.topology import Topology
from router.placement import Placement
from simulations.bench.model_on_gpu import ALONE, PREFILL_ROWS, ModelBench
from simulations.presets import load_model


def compile_kernels(
    preset: str,
    quantizations: Sequence[Quantization],
    batches: Sequence[int],
    context: int,
    prefill: tuple[int, int],
    topology: Topology = ALONE,
) -> None:
    """Those of decode steps of every batch, and of prompts."""
    shapes = [*((batch, context) for batch in batches), None]
    capacity = most_rows(batches, prefill)
    tasks = [
        (preset, q, topology, capacity, shape, prefill) for q in quantizations for shape in shapes
    ]
    processes = min(len(tasks), os.cpu_count() or 2)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        list(pool.map(_compile, *zip(*tasks, strict=True)))


def most_rows(batches: Sequence[int], prefill: tuple[int, int]) -> int:
    """Of a rank in a pass."""
    return max(*batches, prefill[0] * prefill[1], PREFILL_ROWS)


def _compile(
    preset: str,
    quantization: Quantization,
    topology: Topology,
    capacity: int,
    decode: tuple[int, int] | None,
    prefill: tuple[int, int],
) -> None:
    config = load_model(preset)
    has_dense = config.dense_intermediate_size > 0
    config = replace(config, num_layers=2, moe_layers=(1,) if has_dense else (0, 1))
    if topology.world_size == 1:
        bench = ModelBench(config, quantization, bandwidth=1.0)
    else:
        bench = _rank_alone(config, quantization, topology, capacity)
    if decode is None:
        bench.prefill(*prefill)
    else:
        bench.decode(*decode, None)


def _rank_alone(
    config: ModelConfig, quantization: Quantization, topology: Topology, capacity: int
) -> ModelBench:
    """Rank 0, to which nobody ever comes."""
    from cluster.model.cuda.exchange import ExpertExchange, exchange_layout
    from comms.symmetric import SymmetricDispatcher
    from comms.symmetric_memory import SymmetricMemory
    from comms.symmetric_rows import SymmetricRows
    from experts.kernels.early import early

    device = torch.device("cuda", torch.cuda.current_device())
    size = topology.world_size
    placement = Placement.contiguous(config.num_moe_layers, config.num_experts, size)
    of_experts = exchange_layout(
        config, size, placement, CommsConfig(), float8=quantization == "fp8", capacity=capacity
    )
    memory = SymmetricMemory.in_one_process(size, of_experts.num_bytes, device)[0]
    dispatcher = SymmetricDispatcher(of_experts, memory)
    dispatcher.report.failed.fill_(1)  # then kernels do not wait
    replica, tp_size = None, topology.tensor_parallel_size
    if tp_size > 1:
        of_rows = rows_layout(config, tp_size, capacity)
        memory = SymmetricMemory.in_one_process(tp_size, of_rows.num_bytes, device)[0]
        rows = SymmetricRows(of_rows, memory, early=early(device)["EARLY"])
        rows.report.failed.fill_(1)
        replica = DividedReplica(
            rows=rows, size=tp_size, idx=0, vocab_size=config.vocab_size, ops=kernel_ops()
        )
    world, node, rail, tp, leaders = (
        Alone(name=name, size=number)
        for name, number in zip(
            ("world", "node", "rail", "tp", "leaders"),
            (size, size, 1, tp_size, size // tp_size),
            strict=True,
        )
    )
    groups = ParallelGroups(
        topology=topology,
        rank=0,
        epoch=0,
        world=world,
        node=node,
        rail=rail,
        tp=tp,
        leaders=leaders,
    )
    exchange = ExpertExchange(dispatcher, config.num_moe_layers)
    return ModelBench(config, quantization, 1.0, groups, exchange, replica)


class Alone(SoloGroup):
    """A group of which only the first member came: the others say what it says."""

    def __init__(self, *, name: str, size: int) -> None:
        super().__init__(name=name, rank=0)
        self.ranks, self.size = tuple(range(size)), size

    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        return torch.cat([x] * self.size)
