"""Our attention over the paged cache, latent and grouped-query, of decode steps and of whole prompts.

Legend: T tokens, S sequences, N query heads, D channels of a key, B blocks of a table.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from cluster.model.config import MlaConfig, ModelConfig
from cluster.model.cuda.graphs import ROWS, WIDTHS
from cluster.model.cuda.inputs import StepInputs
from cluster.model.cuda.kernel_ops import KernelOps
from cluster.model.cuda.ops import Step
from cluster.model.kv_cache import KVCache, LayerCache
from comms.topology import Topology
from simulations.hardware.gpu_grid import Grid
from simulations.hardware.gpu_meter import Meter
from simulations.hardware.gpu_timing import Timing
from simulations.hardware.own_products import normal
from simulations.times.attention_times import core_tables

BLOCK_SIZE = 16
MOST_KEYS = 1 << 22  # of all sequences together
ALONE = Topology(num_nodes=1, ranks_per_node=1)


def decode_grid(
    model: ModelConfig,
    sequences: Sequence[int],
    contexts: Sequence[int],
    meter: Meter,
    queries: int = 1,
) -> Grid:
    """The core of decode steps, named as `core_tables` says; `queries` tokens of each sequence."""
    name, _ = core_tables(model)

    def time(number: int, context: int) -> Timing:
        layers = _layers(model, number * context, meter)
        scene = Scene.decode(model, number, context, layers, meter, queries)
        return _seconds(model, scene, meter)

    return Grid(
        name=name if queries == 1 else f"{name}/{queries}_queries",
        axes={"sequences": sequences, "context": contexts},
        time=time,
        fits=lambda number, context: number * context <= MOST_KEYS,
    )


def prefill_grid(model: ModelConfig, prompts: Sequence[int], meter: Meter) -> Grid:
    """The core over one causal prompt; MLA's with absorbed maps, as in decode."""
    _, name = core_tables(model)

    def time(tokens: int) -> Timing:
        scene = Scene.prompt(model, tokens, _layers(model, tokens, meter), meter)
        return _seconds(model, scene, meter)

    return Grid(
        name=name,
        axes={"tokens": prompts},
        time=time,
    )


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A step and layers' caches for it, full of random keys."""

    step: Step
    caches: tuple[LayerCache, ...]

    @staticmethod
    def decode(
        model: ModelConfig,
        sequences: int,
        context: int,
        layers: int,
        meter: Meter,
        queries: int = 1,
    ) -> Scene:
        """Each sequence's last tokens of `context`; tables as wide as a captured step's."""
        blocks = -(-context // BLOCK_SIZE)
        width = WIDTHS[bisect_left(WIDTHS, blocks)] if sequences <= ROWS[-1] else blocks
        sequence_T = torch.arange(sequences).repeat_interleave(queries)
        positions_T = context - queries + torch.arange(queries).repeat(sequences)
        return Scene._of(model, positions_T, sequence_T, blocks, width, layers, meter)

    @staticmethod
    def prompt(model: ModelConfig, tokens: int, layers: int, meter: Meter) -> Scene:
        """All tokens of one sequence."""
        blocks, positions_T = -(-tokens // BLOCK_SIZE), torch.arange(tokens)
        sequence_T = torch.zeros_like(positions_T)
        return Scene._of(model, positions_T, sequence_T, blocks, blocks, layers, meter)

    @staticmethod
    def _of(
        model: ModelConfig,
        positions_T: torch.Tensor,
        sequence_T: torch.Tensor,
        blocks: int,
        width: int,
        layers: int,
        meter: Meter,
    ) -> Scene:
        sequences = int(sequence_T[-1]) + 1
        tables_SB = torch.zeros(sequences, width, dtype=torch.int64)
        tables_SB[:, :blocks] = torch.randperm(sequences * blocks).view(sequences, blocks)
        block_T = tables_SB[sequence_T, positions_T // BLOCK_SIZE]
        inputs = StepInputs.empty(
            len(positions_T), sequences, width, sequences, torch.device("cpu")
        )
        inputs.num_tokens.fill_(len(positions_T))
        inputs.positions_T.copy_(positions_T)
        inputs.sequence_T.copy_(sequence_T)
        inputs.kv_slots_T.copy_(block_T * BLOCK_SIZE + positions_T % BLOCK_SIZE)
        inputs.block_tables_NB.copy_(tables_SB)
        there = StepInputs.empty(len(positions_T), sequences, width, sequences, meter.device)
        there.buffer.copy_(inputs.buffer)
        with meter.device:
            kv = KVCache(
                replace(model, num_layers=layers), ALONE, sequences * blocks, BLOCK_SIZE,
                torch.bfloat16,
            )  # fmt: skip
        for cache in kv.layers:
            cache.keys.normal_()
            cache.values.normal_()
        table_LF = torch.rand(int(positions_T.max()) + 1, model.rope.dim // 2, device=meter.device)
        step = Step(
            inputs=there,
            cos_LF=table_LF,
            sin_LF=table_LF,
            interleaved=model.rope.interleaved,
            plan=KernelOps().plan(there, BLOCK_SIZE),
        )
        return Scene(step=step, caches=kv.layers)


def _layers(model: ModelConfig, keys: int, meter: Meter) -> int:
    """That many layers' caches do not fit the L2 cache together."""
    bytes_of_layers = KVCache.bytes_per_block(model, ALONE, torch.bfloat16, 1)
    return len(meter.copies(lambda: None, keys * bytes_of_layers / model.num_layers))


def _seconds(model: ModelConfig, scene: Scene, meter: Meter) -> Timing:
    attention, tokens = model.attention, len(scene.step.inputs.positions_T)
    is_latent = isinstance(attention, MlaConfig)
    dim = scene.caches[0].keys.shape[-1]
    value_dim = attention.kv_lora_rank if isinstance(attention, MlaConfig) else attention.head_dim
    q_TND = normal(meter, tokens, attention.num_heads, dim) * (dim**0.5 if is_latent else 1.0)
    calls = [
        partial(
            KernelOps().attention, q_TND, cache, scene.step.plan, attention.softmax_scale, value_dim
        )
        for cache in scene.caches
    ]
    return meter.seconds(calls)
