"""One model with random weights on this GPU, and what is measured of it: decode steps and prefill.

Tokens are chosen greedily on the device and fed back there, so that a step's time is the model's alone;
`served_ms` is a step as the engine asks for it: inputs from the host, the chosen tokens back to it.
The floor is what a step must read from memory at the bandwidth of a copy: all weights but those of experts
that no token chose, and the keys of every sequence.

T tokens.
"""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import torch

from cluster.config import CommsConfig
from cluster.model.batch import ForwardBatch
from cluster.model.config import ModelConfig
from cluster.model.cuda.build import WeightSource
from cluster.model.cuda.divided_weights import DividedWeights
from cluster.model.cuda.random_weights import RandomWeights
from cluster.model.cuda.tensor_parallel import DividedReplica
from cluster.model.cuda.transformer import CudaTransformer, Quantization
from cluster.model.kv_cache import KVCache
from comms.groups import ParallelGroups
from comms.solo import SoloGroup
from comms.topology import Topology
from router.placement import Placement
from simulations.hardware.gpu_timing import replay_seconds

if TYPE_CHECKING:
    from cluster.model.cuda.exchange import RankExchange

BLOCK_SIZE = 16
STEPS = 24
PREFILL_ROWS = 8192
ALONE = Topology(num_nodes=1, ranks_per_node=1)


class ModelBench:
    """One model with random weights, and what is measured of it."""

    def __init__(
        self,
        config: ModelConfig,
        quantization: Quantization,
        bandwidth: float,
        groups: ParallelGroups | None = None,
        exchange: RankExchange | None = None,
        replica: DividedReplica | None = None,
    ) -> None:
        """bandwidth: bytes/s of a copy, for the floor; may be set later. `exchange`: expert parallel over
        `groups`; each rank then measures the same. `replica`: tensor parallel over `groups.tp`; weights are
        then this rank's part."""
        self._config, self.bandwidth = config, bandwidth
        groups = groups or solo_groups()
        self._seed = groups.topology.replica_of(groups.rank)
        self._ranks_of_replica = 1 if replica is None else replica.size
        device = torch.device("cuda", torch.cuda.current_device())
        placement = Placement.contiguous(
            config.num_moe_layers, config.num_experts, groups.world.size
        )
        source: WeightSource = RandomWeights(config, device)
        if replica is not None:
            source = DividedWeights(whole=source, size=replica.size, idx=replica.idx)
        self._model = CudaTransformer.build(
            source,
            groups,
            placement,
            CommsConfig(),
            quantization=quantization,
            device=device,
            exchange=exchange,
            replica=replica,
        )

    def memory(self) -> dict[str, int]:
        return self._model.memory()

    def bytes_read(self) -> int:
        """Of weights that every step reads, whatever its tokens."""
        memory, embedding = self._model.memory(), self._model.embedding
        looked_up = 0 if self._model.head.w_OI is embedding else embedding.nbytes
        rotary = sum(table.nbytes for table in self._model.rotary)
        return memory["attention"] + memory["other"] - looked_up - rotary

    @torch.inference_mode()
    def prefill(self, num_sequences: int, length: int) -> dict[str, float]:
        """Prompts at once, from nothing to the logits of their last tokens."""
        kv = self._model.new_cache(num_sequences * -(-length // BLOCK_SIZE), BLOCK_SIZE)
        batch = prompts(self._config, self._seed, num_sequences, 0, length)
        times = []
        for _ in range(5):
            torch.cuda.synchronize()
            start = perf_counter()
            self._model.forward(batch, kv)
            torch.cuda.synchronize()
            times.append(perf_counter() - start)
        tokens, seconds = num_sequences * length, float(np.median(times[1:]))
        return {
            "tokens": tokens,
            "ms": 1000 * seconds,
            "first_ms": 1000 * times[0],
            "tokens_per_s": tokens / seconds,
        }

    @torch.inference_mode()
    def decode(self, num_sequences: int, context: int, table: Path | None) -> dict[str, float]:
        """Steps of that many sequences, each with `context` tokens before the first."""
        model = self._model
        blocks = -(-(context + STEPS + 8) // BLOCK_SIZE)
        kv = model.new_cache(num_sequences * blocks, BLOCK_SIZE)
        per_pass = max(1, PREFILL_ROWS // context)
        for first in range(0, num_sequences, per_pass):
            number = min(per_pass, num_sequences - first)
            model.forward(prompts(self._config, self._seed, number, 0, context, first, blocks), kv)
        batch = prompts(self._config, self._seed, num_sequences, context, 1, 0, blocks)
        served_s = self._served(batch, kv)
        experts = self._read_experts(batch, kv)
        step_s = self._greedy_steps(batch, kv, table)
        floor_s = self._floor(num_sequences, context, experts)
        return {
            "step_ms": 1000 * step_s,
            "tokens_per_s": num_sequences / step_s,
            "floor_ms": 1000 * floor_s,
            "over_floor": step_s / floor_s,
            "served_ms": 1000 * served_s,
            "experts": experts,
        }

    def _served(self, batch: ForwardBatch, kv: KVCache) -> float:
        times = []
        for _ in range(12):
            start = perf_counter()
            logits = self._model.forward(batch, kv)
            if logits is not None:
                logits.argmax(dim=1).tolist()
            times.append(perf_counter() - start)
        return float(np.median(times[2:]))

    def _read_experts(self, batch: ForwardBatch, kv: KVCache) -> float:
        """That a step reads on this rank, in the mean of the layers."""
        moes = self._model.moe_layers
        before = [moe.tokens_per_slot_S for moe in moes]
        self._model.forward(batch, kv)
        after = [moe.tokens_per_slot_S for moe in moes]
        return float(np.mean([int((b > a).sum()) for a, b in zip(before, after, strict=True)]))

    def _greedy_steps(self, batch: ForwardBatch, kv: KVCache, table: Path | None) -> float:
        """Seconds of a step: a graph in which each step's choice is the next one's input."""
        model, graphs = self._model, self._model.graphs
        assert graphs is not None
        width = batch.block_tables_NB.shape[1]
        inputs = graphs.captured(batch.num_tokens, width, kv, model.outputs).inputs
        size = batch.num_tokens

        def begin() -> None:
            inputs.token_ids_T[:size] = batch.token_ids_T.to(inputs.buffer)
            inputs.positions_T[:size] = batch.positions_T.to(inputs.buffer)
            inputs.kv_slots_T[:size] = batch.kv_slots_T.to(inputs.buffer)

        def step() -> None:
            inputs.token_ids_T.copy_(greatest(model.compute(inputs, kv)))
            inputs.positions_T[:size] += 1
            inputs.kv_slots_T[:size] += 1  # a sequence's blocks follow each other here

        begin()
        graph = graphs.capture(step)
        times = []
        for _ in range(3):
            begin()
            times += replay_seconds(graph, STEPS - 1)
        if table is not None:
            begin()
            table.write_text(kernel_table(graph), encoding="utf-8")
        return float(np.median(times))

    def _floor(self, num_sequences: int, context: int, read: float) -> float:
        model, config = self._model, self._config
        experts = model.memory()["experts"] * read / model.moe_layers[0].slots.num_slots
        replica = Topology(num_nodes=1, ranks_per_node=self._ranks_of_replica)
        per_token = KVCache.bytes_per_block(config, replica, torch.bfloat16, 1)
        keys = per_token * num_sequences * (context + STEPS / 2)
        return float((self.bytes_read() + experts + keys) / self.bandwidth)


def greatest(logits_TV: torch.Tensor) -> torch.Tensor:
    """argmax of each row, in two steps: one alone has a row on a single multiprocessor."""
    parts = next(n for n in (512, 256, 128, 64, 1) if logits_TV.shape[1] % n == 0)
    peak_TP, at_TP = logits_TV.unflatten(1, (parts, -1)).max(dim=2)
    best_T1 = peak_TP.argmax(dim=1, keepdim=True)
    best_T: torch.Tensor = (best_T1 * (logits_TV.shape[1] // parts) + at_TP.gather(1, best_T1))[
        :, 0
    ]
    return best_T


def solo_groups() -> ParallelGroups:
    """Of a world of one rank, in this process."""
    world, node, rail, tp, leaders = (
        SoloGroup(name=name, rank=0) for name in ("world", "node", "rail", "tp", "leaders")
    )
    return ParallelGroups(
        topology=ALONE, rank=0, epoch=0, world=world, node=node, rail=rail, tp=tp, leaders=leaders
    )


def prompts(
    config: ModelConfig,
    seed: int,
    num_sequences: int,
    start: int,
    length: int,
    first: int = 0,
    blocks: int | None = None,
) -> ForwardBatch:
    """Random tokens start .. start + length of sequences first, first + 1, ..., each in `blocks` blocks
    of its own, one after the other; the logits of the last ones are wanted."""
    blocks = blocks or -(-(start + length) // BLOCK_SIZE)
    generator = torch.Generator().manual_seed(7919 * start + first + 104_729 * seed)
    ids = torch.randint(0, config.vocab_size, (num_sequences * length,), generator=generator)
    sequence_T = torch.arange(num_sequences).repeat_interleave(length)
    positions_T = start + torch.arange(length).repeat(num_sequences)
    tables = torch.arange(first * blocks, (first + num_sequences) * blocks).view(-1, blocks)
    block_T = tables[sequence_T, positions_T // BLOCK_SIZE]
    return ForwardBatch(
        token_ids_T=ids,
        positions_T=positions_T,
        kv_slots_T=block_T * BLOCK_SIZE + positions_T % BLOCK_SIZE,
        block_tables_NB=tables,
        sequence_T=sequence_T,
        logit_rows=torch.arange(num_sequences) * length + length - 1,
    )


def kernel_table(graph: torch.cuda.CUDAGraph, replays: int = 3) -> str:
    """Kernels of a replay by the time they take together."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(replays):
            graph.replay()
        torch.cuda.synchronize()
    rows = []
    for event in profiler.key_averages():
        total = event.device_time_total / replays
        rows.append((total, event.count / replays, event.key[:90]))
    rows.sort(reverse=True)
    whole = sum(row[0] for row in rows)
    lines = [f"{whole:10.1f} us in kernels of a step"]
    lines += [f"{t:10.1f} us {t / whole:6.1%} {n:7.1f} x  {key}" for t, n, key in rows]
    return "\n".join(lines) + "\n"
