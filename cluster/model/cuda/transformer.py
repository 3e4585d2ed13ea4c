"""The whole model of one rank on a GPU: what `cluster.model.transformer` is on a CPU.

One pass goes over all layers without ever asking the device for a number. Steps of few tokens replay
captured graphs (see `graphs`); others launch their kernels one by one. Attention and vocabulary are divided
over the ranks of a replica (see `replica`), experts over all ranks (see `exchange`). Then every rank makes
every pass, also without tokens of its own, with as many rows as the others.

Legend: T rows, H hidden, V vocabulary, L logit rows, F rotary frequencies.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import torch
from torch import Tensor

from cluster.model.batch import ForwardBatch
from cluster.model.config import ModelConfig
from cluster.model.cuda.build import Builder, WeightSource
from cluster.model.cuda.checkpoint import DeviceCheckpoint
from cluster.model.cuda.graphs import ROWS, StepGraphs, padded
from cluster.model.cuda.inputs import StepInputs, spare_slot
from cluster.model.cuda.layers import CudaLayer
from cluster.model.cuda.ops import ExpertLayer, Ops, Step
from cluster.model.cuda.replica import OneRank, Replica
from cluster.model.cuda.tensor_parallel import connect_replica
from cluster.model.cuda.weights import Matrix, Norm
from cluster.model.errors import UnsupportedModelError
from cluster.model.kv_cache import KVCache
from cluster.model.loader import Loader
from cluster.model.memory import Reports
from cluster.model.rope import RotaryTable
from comms.base import BaseDispatcher
from comms.group import Group
from comms.groups import ParallelGroups
from comms.make import dispatcher_for
from comms.topology import Topology
from comms.where import Where
from router.placement import Placement

if TYPE_CHECKING:
    from cluster.model.cuda.exchange import RankExchange
    from cluster.model.transformer import CommsOptions

Quantization = Literal["fp8", "bfloat16"] | None
"""Of large matrices: float8 by blocks of 128 x 128, or bfloat16; None: as the checkpoint has them."""


class Outputs(NamedTuple):
    """Of a pass: logits [L, V], and the experts of all rows [T, K] by expert layer."""

    logits_LV: Tensor
    choices: list[Tensor]


@dataclass(frozen=True, kw_only=True)
class CudaTransformer(Reports):
    """`spare_slot`: a place in the caches that no sequence owns; rows of padding write there. `passes`:
    numbers of the passes, the same on all ranks."""

    config: ModelConfig
    tp: Group
    embedding: Tensor
    layers: tuple[CudaLayer, ...]
    norm: Norm
    head: Matrix
    rotary: tuple[Tensor, Tensor]
    dispatcher: BaseDispatcher
    where: Where
    ops: Ops
    device: torch.device
    graphs: StepGraphs | None = None
    exchange: RankExchange | None = None
    replica: Replica
    passes: Iterator[int] = field(default_factory=count)

    @staticmethod
    def load(
        path: str | Path,
        config: ModelConfig,
        groups: ParallelGroups,
        placement: Placement,
        comms: CommsOptions,
        *,
        quantization: Quantization = None,
        max_tokens: int = ROWS[-1],
        device: torch.device | None = None,
    ) -> CudaTransformer:
        """Read a checkpoint directory straight to the device.

        max_tokens: of a rank in a pass. Collective where there are several ranks. Raises CheckpointError
        naming file and tensor, and UnsupportedModelError for what this backend does not have.
        """
        device = device or current_gpu()
        keep_float8 = quantization != "bfloat16"
        exchange: RankExchange | None = None
        if groups.topology.world_size > 1:
            from cluster.model.cuda.exchange import connect_exchange

            exchange = connect_exchange(
                config, groups, placement, comms,
                float8=quantization == "fp8" or (keep_float8 and config.float8),
                capacity=padded(max_tokens), device=device,
            )  # fmt: skip
        replica = connect_replica(
            config, groups, kernel_ops(),
            capacity=padded(max_tokens), device=device, timeout_s=comms.timeout_s,
        )  # fmt: skip
        with DeviceCheckpoint(path, device) as checkpoint:
            loader = Loader(
                checkpoint=checkpoint,
                config=config,
                topology=groups.topology,
                rank=groups.rank,
                dtype=torch.bfloat16,
                keep_float8=keep_float8,
            )
            return CudaTransformer.build(
                loader, groups, placement, comms,
                quantization=quantization, device=device, exchange=exchange, replica=replica,
            )  # fmt: skip

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
        exchange: RankExchange | None = None,
        replica: Replica | None = None,
    ) -> CudaTransformer:
        """From any source of weights. `ops`: other functions than the kernels, for tests, and without
        graphs. `exchange`: with the other ranks; each of them then makes the same passes with equally many
        rows. `replica`: with the other ranks of this one's."""
        config = source.config
        world_size, replica_size = groups.topology.world_size, groups.tp.size
        if (world_size > 1 and exchange is None) or (replica_size > 1 and replica is None):
            raise UnsupportedModelError(
                f"{world_size} ranks on GPUs, {replica_size} to a replica, need what moves their rows"
            )
        device = device or current_gpu()
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
        replica = replica or OneRank(ops=functions)
        builder = Builder(
            source,
            placement,
            groups,
            functions,
            replica,
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
            replica=replica,
        )

    @torch.inference_mode()
    def forward(
        self, batch: ForwardBatch, kv: KVCache, max_tokens: int | None = None
    ) -> Tensor | None:
        """Logits [L, V] of the batch's `logit_rows`, fp32 on the device, valid until the next call; None on
        ranks that do not lead their replica.

        Writes the tokens' keys and values to `kv`, made by `new_cache`. With several ranks it is
        collective: `max_tokens` is the most that any of them has (None: as many as here), and their
        block tables are equally wide. Raises ValueError for token ids outside the vocabulary,
        CommTimeout if a peer did not come.
        """
        batch.check_token_ids(self.config.vocab_size)  # here: the device would stop for good
        most = max(batch.num_tokens, max_tokens or 0 if self.exchange else 0)
        if most == 0:
            nothing = torch.zeros(0, self.config.vocab_size, device=self.device)
            return nothing if self.tp.idx == 0 else None
        is_gpu = self.device.type == "cuda"
        with torch.cuda.device(self.device) if is_gpu else nullcontext():
            out = self._pass(batch, kv, padded(most))
            if self.exchange is not None:
                if is_gpu:  # nobody is told a token of a pass that failed
                    torch.cuda.current_stream().synchronize()
                self.replica.check()
                self.exchange.check()
        for moe, ids_TK in zip(self.moe_layers, out.choices, strict=True):
            if moe.record is not None:
                mine = max(0, batch.num_tokens - self.replica.idx * len(ids_TK))
                moe.record.append(ids_TK[:mine])
        return out.logits_LV[: len(batch.logit_rows)] if self.tp.idx == 0 else None

    def _pass(self, batch: ForwardBatch, kv: KVCache, num_rows: int) -> Outputs:
        """The batch's own rows, or as a graph `num_rows` of them, which is what every rank expects."""
        form = next(self.passes) % (self.exchange.forms if self.exchange else 1)
        if self.graphs is not None and self.graphs.fit(batch, num_rows):
            return self.graphs.run(batch, num_rows, form, kv, self.outputs)
        inputs = StepInputs.of(batch, spare_slot(kv), self.device)
        return self.outputs(inputs, kv, num_rows, form)

    def outputs(self, inputs: StepInputs, kv: KVCache, num_rows: int, form: int) -> Outputs:
        """`compute`, and what the gates chose meanwhile."""
        before = [moe.record for moe in self.moe_layers]
        choices: list[list[Tensor]] = [[] for _ in before]
        for moe, chosen in zip(self.moe_layers, choices, strict=True):
            moe.record = chosen
        try:
            logits_LV = self.compute(inputs, kv, num_rows, form)
        finally:
            for moe, record in zip(self.moe_layers, before, strict=True):
                moe.record = record
        return Outputs(logits_LV, [ids_TK for (ids_TK,) in choices])

    def compute(
        self, inputs: StepInputs, kv: KVCache, num_rows: int | None = None, form: int = 0
    ) -> Tensor:
        """One pass; static shapes, no host synchronisation: what a graph captures.

        num_rows: of every rank, at least those of the inputs (None: as many). form: see `exchange`.
        """
        replica, size = self.replica, len(inputs.token_ids_T)
        replica.expect(size)
        if self.exchange is not None:
            self.exchange.expect(replica.num_own(num_rows or size), form)
        stream = replica.embed(inputs.token_ids_T, self.embedding)
        cos_LF, sin_LF = self.rotary
        step = Step(
            inputs=inputs,
            cos_LF=cos_LF,
            sin_LF=sin_LF,
            interleaved=self.config.rope.interleaved,
            plan=self.ops.plan(inputs, kv.block_size),
            own_tokens=replica.own_tokens(inputs.num_tokens, len(stream.x_OH)),
        )
        for layer, cache in zip(self.layers, kv.layers, strict=True):
            stream = layer.forward(stream, step, cache)
        if not len(inputs.logit_rows_L):
            return torch.zeros(0, self.config.vocab_size, device=self.device)
        return replica.logits(stream, self.norm, inputs.logit_rows_L, self.head)

    def new_cache(self, num_blocks: int, block_size: int) -> KVCache:
        """Of that many blocks, and one more that is the padding's."""
        replica = Topology(num_nodes=1, ranks_per_node=self.tp.size)
        with self.device:
            cache = KVCache(self.config, replica, num_blocks + 1, block_size, torch.bfloat16)
        cache.num_blocks = num_blocks
        return cache

    @torch.inference_mode()
    def capture(self, kv: KVCache, max_tokens: int) -> None:
        """Make the graphs of steps of up to so many tokens of short sequences now, before they are due.

        Collective where there are several ranks.
        """
        if self.graphs is None:
            return
        with torch.cuda.device(self.device):
            for rows in ROWS[: bisect_left(ROWS, max_tokens) + 1]:
                for form in range(self.exchange.forms if self.exchange else 1):
                    self.graphs.captured(rows, 1, kv, self.outputs, form)

    def bytes_sent(self) -> dict[str, int]:
        """By this rank since the start, to bring tokens to experts and back, inside nodes and between. Waits for
        the device."""
        sent = {} if self.exchange is None else self.exchange.bytes_sent
        return {"intra_node": 0, "inter_node": 0, **sent}

    def forget_bytes(self) -> None:
        """Count from zero again."""
        if self.exchange is not None:
            self.exchange.forget_bytes()

    def close(self) -> None:
        """There will be no other pass."""
        if self.graphs is not None:
            self.graphs.clear()  # NCCL waits for graphs that hold its kernels
        if self.exchange is not None:
            self.exchange.close()

    @cached_property
    def moe_layers(self) -> tuple[ExpertLayer, ...]:
        """The expert layers, in order."""
        mlps = [self.layers[idx].mlp for idx in self.config.moe_layers]
        return tuple(cast(ExpertLayer, mlp) for mlp in mlps)


def current_gpu() -> torch.device:
    """Raises UnsupportedModelError where there is none."""
    if not torch.cuda.is_available():
        raise UnsupportedModelError("device = cuda: this process sees no NVIDIA GPU")
    return torch.device("cuda", torch.cuda.current_device())


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
