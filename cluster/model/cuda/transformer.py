"""The whole model of one rank on a GPU: what `cluster.model.transformer` is on a CPU.

One pass goes over all layers without ever asking the device for a number. Steps of few tokens replay
captured graphs (see `graphs`); others launch their kernels one by one.
Attention and vocabulary are whole on every rank.

Legend: T rows, H hidden, V vocabulary, L logit rows, F rotary frequencies.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from cluster.model.batch import ForwardBatch
from cluster.model.checkpoint import Checkpoint
from cluster.model.config import ModelConfig
from cluster.model.cuda.build import Builder, WeightSource
from cluster.model.cuda.graphs import ROWS, StepGraphs
from cluster.model.cuda.inputs import StepInputs, spare_slot
from cluster.model.cuda.layers import CudaLayer, Stream
from cluster.model.cuda.ops import ExpertLayer, Ops, Step
from cluster.model.cuda.weights import Matrix
from cluster.model.errors import UnsupportedModelError
from cluster.model.kv_cache import KVCache
from cluster.model.loader import Loader
from cluster.model.memory import tensor_bytes
from cluster.model.norm import RmsNorm
from cluster.model.rope import RotaryTable
from comms.base import BaseDispatcher
from comms.group import Group
from comms.groups import ParallelGroups
from comms.make import dispatcher_for
from comms.topology import Topology
from comms.where import Where
from router.placement import Placement

if TYPE_CHECKING:
    from cluster.model.cuda.exchange import SymmetricExchange
    from cluster.model.transformer import CommsOptions

Quantization = Literal["fp8"] | None
"""fp8: products with large matrices in float8, weights by blocks of 128 x 128."""


@dataclass(frozen=True, kw_only=True)
class CudaTransformer:
    """`spare_slot`: a place in the caches that no sequence owns; rows of padding write there."""

    config: ModelConfig
    tp: Group
    embedding: Tensor
    layers: tuple[CudaLayer, ...]
    norm: RmsNorm
    head: Matrix
    rotary: tuple[Tensor, Tensor]
    dispatcher: BaseDispatcher
    where: Where
    ops: Ops
    device: torch.device
    graphs: StepGraphs | None = None
    exchange: Any = None

    @staticmethod
    def load(
        path: str | Path,
        config: ModelConfig,
        groups: ParallelGroups,
        placement: Placement,
        comms: CommsOptions,
        *,
        quantization: Quantization = None,
        device: torch.device | None = None,
    ) -> CudaTransformer:
        """Read a checkpoint directory to the device, in bfloat16 or quantised as it arrives ("fp8").

        Raises CheckpointError naming file and tensor, and UnsupportedModelError for a layout that this
        backend does not have.
        """
        loader = Loader(
            checkpoint=Checkpoint(path),
            config=config,
            topology=groups.topology,
            rank=groups.rank,
            dtype=torch.bfloat16,
        )
        return CudaTransformer.build(
            loader, groups, placement, comms, quantization=quantization, device=device
        )

    @staticmethod
    def build(
        source: WeightSource,
        groups: ParallelGroups,
        placement: Placement,
        comms: CommsOptions,
        *,
        quantization: Quantization = None,
        device: torch.device | None = None,
        ops: Ops | None = None,
        exchange: SymmetricExchange | None = None,
    ) -> CudaTransformer:
        """From any source of weights. `ops`: other functions than the kernels, for tests, and without
        graphs. `exchange`: with the other ranks; each of them then makes the same passes with equally many rows."""
        config = source.config
        if groups.tp.size > 1 or (groups.topology.world_size > 1 and exchange is None):
            raise UnsupportedModelError(
                f"device = cuda has layouts of one rank so far, not {groups.topology.world_size}"
            )
        if device is None:
            if not torch.cuda.is_available():
                raise UnsupportedModelError("device = cuda: this process sees no NVIDIA GPU")
            device = torch.device("cuda", torch.cuda.current_device())
        dispatcher = dispatcher_for(
            comms.all2all_backend,
            groups,
            slots_per_rank=placement.slots_per_rank,
            hidden=config.hidden_size,
            dispatch_dtype=comms.dispatch_dtype,
            combine=comms.combine,
            combine_dtype=comms.combine_dtype,
        )
        functions = ops or kernel_ops()
        builder = Builder(
            source,
            placement,
            groups.world,
            functions,
            float8=quantization == "fp8",
            sums_in_integers=comms.combine == "fixed",
            device=device,
            exchange=exchange,
        )
        embedding = builder.embedding()
        positions = torch.arange(config.max_position_embeddings)
        rotation = RotaryTable(config.rope, config.max_position_embeddings).at(positions)
        return CudaTransformer(
            config=config,
            tp=groups.tp,
            embedding=embedding,
            layers=tuple(builder.layer(idx) for idx in range(config.num_layers)),
            norm=builder.norm("norm"),
            head=Matrix(w_OI=builder.head(embedding)),
            rotary=(rotation.cos_TF.to(device), rotation.sin_TF.to(device)),
            dispatcher=dispatcher,
            where=groups.where,
            ops=functions,
            device=device,
            graphs=StepGraphs(device) if device.type == "cuda" and ops is None else None,
            exchange=exchange,
        )

    @torch.inference_mode()
    def forward(
        self, batch: ForwardBatch, kv: KVCache, max_tokens: int | None = None
    ) -> Tensor | None:
        """Logits [L, V] of the batch's `logit_rows`, fp32 on the device, valid until the next call.

        Writes the tokens' keys and values to `kv`, made by `new_cache`. Raises ValueError for token
        ids outside the vocabulary, CommTimeout if a peer did not come in the pass before.
        """
        batch.check_token_ids(self.config.vocab_size)  # here: the device would stop for good
        if self.exchange is not None:
            self.exchange.check()
        if batch.num_tokens == 0:
            return torch.zeros(0, self.config.vocab_size, device=self.device)
        recording = any(moe.record is not None for moe in self.moe_layers)
        if self.graphs is not None and not recording and self.graphs.fit(batch):
            return self.graphs.run(batch, kv, self.compute)
        inputs = StepInputs.of(batch, spare_slot(kv), self.device)
        return self.compute(inputs, kv)

    def compute(self, inputs: StepInputs, kv: KVCache) -> Tensor:
        """One pass; static shapes, no host synchronisation: what a graph captures."""
        if self.exchange is not None:
            self.exchange.expect(len(inputs.token_ids_T))
        cos_LF, sin_LF = self.rotary
        step = Step(
            inputs=inputs,
            cos_LF=cos_LF,
            sin_LF=sin_LF,
            interleaved=self.config.rope.interleaved,
            plan=self.ops.plan(inputs, kv.block_size),
        )
        stream = Stream(F.embedding(inputs.token_ids_T, self.embedding))
        for layer, cache in zip(self.layers, kv.layers, strict=True):
            stream = layer.forward(stream, step, cache)
        normed_LH, _ = stream.rows(inputs.logit_rows_L).normed(self.norm, self.ops)
        return self.ops.linear(normed_LH, self.head).float()

    def new_cache(self, num_blocks: int, block_size: int) -> KVCache:
        """Of that many blocks, and one more that is the padding's."""
        alone = Topology(num_nodes=1, ranks_per_node=1)
        with self.device:
            cache = KVCache(self.config, alone, num_blocks + 1, block_size, torch.bfloat16)
        cache.num_blocks = num_blocks
        return cache

    @torch.inference_mode()
    def capture(self, kv: KVCache, max_tokens: int) -> None:
        """Make the graphs of steps of up to so many tokens of short sequences now, before they are due."""
        if self.graphs is not None:
            for rows in ROWS[: bisect_left(ROWS, max_tokens) + 1]:
                self.graphs.captured(rows, 1, kv, self.compute)

    def memory(self) -> dict[str, int]:
        """Bytes of weights on this device: experts (routed), attention, and other."""
        total = sum(table.nbytes for table in self.rotary)
        total += tensor_bytes((self.embedding, self.norm))
        total += 0 if self.head.w_OI is self.embedding else self.head.num_bytes
        for layer in self.layers:
            total += tensor_bytes((layer.attention, layer.attention_norm, layer.mlp_norm))
            total += layer.mlp.num_bytes
        attention = sum(tensor_bytes(layer.attention) for layer in self.layers)
        experts = sum(moe.slots.num_bytes for moe in self.moe_layers)
        return {"experts": experts, "attention": attention, "other": total - attention}

    def expert_load(self) -> list[int]:
        """(token, expert) pairs computed so far on this rank, by expert layer."""
        return [int(moe.tokens_per_slot_S.sum()) for moe in self.moe_layers]

    @cached_property
    def moe_layers(self) -> tuple[ExpertLayer, ...]:
        """The expert layers, in order."""
        mlps = [self.layers[idx].mlp for idx in self.config.moe_layers]
        return tuple(cast(ExpertLayer, mlp) for mlp in mlps)


def kernel_ops() -> Ops:
    """The kernels; imported here, so that a test can build a model where Triton is missing."""
    try:
        from cluster.model.cuda.kernel_ops import KernelOps
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise UnsupportedModelError(
            "device = cuda needs Triton: pip install 'expertmesh[gpu]'"
        ) from error
    return KernelOps()
