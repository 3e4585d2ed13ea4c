"""The whole model of one rank: embed, decoder layers, logits.

Every rank of the world joins every expert exchange, also with no tokens of its own; all other
exchanges stay inside the replica and are skipped together when it has no tokens.

Legend: T tokens of the replica, O own rows of them, H hidden, V vocabulary, L logit rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from cluster.model.batch import ForwardBatch
from cluster.model.checkpoint import Checkpoint
from cluster.model.config import ModelConfig
from cluster.model.gains import share_gains
from cluster.model.kv_cache import KVCache
from cluster.model.layers import DecoderLayer, DenseLayer, Step
from cluster.model.loader import Loader
from cluster.model.memory import Reports
from cluster.model.micro_batches import Pass, interleave
from cluster.model.norm import RmsNorm
from cluster.model.paged import AttentionPlan
from cluster.model.rope import RotaryTable
from cluster.model.shards import TokenRows, shard, shard_sizes
from comms.dispatcher import CombineMode, TokenDispatcher, WireDtype
from comms.group import Group
from comms.groups import ParallelGroups
from comms.make import dispatcher_for
from comms.where import Where
from experts.balance import Balance, SplitMode, make_balance
from experts.linear import stable_linear
from experts.moe import MoELayer, Phase, untimed
from experts.slot_choice import make_choice
from router.placement import Placement


class CommsOptions(Protocol):
    """How tokens travel: the part of the configuration that the model passes on."""

    @property
    def all2all_backend(self) -> str: ...
    @property
    def dispatch_dtype(self) -> WireDtype: ...
    @property
    def combine(self) -> CombineMode: ...
    @property
    def combine_dtype(self) -> WireDtype: ...
    @property
    def timeout_s(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class Transformer(Reports):
    """One rank's part of the model. All its expert layers share `dispatcher`."""

    config: ModelConfig
    tp: Group
    embedding: Tensor
    layers: tuple[DecoderLayer, ...]
    norm: RmsNorm
    head: Tensor
    rotary: RotaryTable
    dispatcher: TokenDispatcher
    balance: Balance | None
    where: Where
    phase: Phase

    @staticmethod
    def load(
        path: str | Path,
        config: ModelConfig,
        groups: ParallelGroups,
        placement: Placement,
        dtype: torch.dtype,
        comms: CommsOptions,
        phase: Phase = untimed,
        split: SplitMode = "auto",
    ) -> Transformer:
        """Read this rank's share of a checkpoint directory. Collective with combine "fixed" only.

        `placement` has one layer for each of `config.moe_layers`; `split` says how tokens choose among
        the copies of an expert. Raises CheckpointError naming file and tensor, and ValueError for a
        layout that the model does not divide into.
        """
        loader = Loader(
            checkpoint=Checkpoint(path),
            config=config,
            topology=groups.topology,
            rank=groups.rank,
            dtype=dtype,
        )
        dispatcher = dispatcher_for(
            comms.all2all_backend,
            groups,
            slots_per_rank=placement.slots_per_rank,
            hidden=config.hidden_size,
            dispatch_dtype=comms.dispatch_dtype,
            combine=comms.combine,
            combine_dtype=comms.combine_dtype,
        )
        balance = make_balance(split, dispatcher, expert_flop(config))
        model = build(loader, groups, placement, dispatcher, balance, phase)
        if comms.combine == "fixed":
            share_gains(model.layers, placement, groups.world)
        return model

    @torch.inference_mode()
    def forward(
        self, batch: ForwardBatch, kv: KVCache, max_tokens: int | None = None
    ) -> Tensor | None:
        """Logits [L, V] in fp32 of the batch's `logit_rows` on TP rank 0, None on the others.

        Collective: over the world for the experts, over the replica for the rest. `max_tokens`, the
        most that any replica has, decides what is overlapped and whether the batch is evened out over
        copies of experts; None: nothing. Writes the tokens' keys and values to `kv`. Raises ValueError
        for token ids outside the vocabulary.
        """
        of_rank = None if max_tokens is None else -(-max_tokens // self.tp.size)
        batches = batch.split(self.dispatcher.expect(of_rank))
        if self.balance is not None:
            self.balance.expect(None if of_rank is None else of_rank // len(batches))
        hidden = interleave([self._layers(part, kv) for part in batches], self.where)
        with self.phase("logits"):
            logits = [self._logits(x, b) for x, b in zip(hidden, batches, strict=True)]
            mine = [rows_LV for rows_LV in logits if rows_LV is not None]
            return torch.cat(mine) if mine else None

    def bytes_sent(self) -> dict[str, int]:
        """By this rank since the start, to bring tokens to experts and back, inside nodes and between."""
        ledger = self.dispatcher.ledger
        return {"intra_node": ledger.intra_node_bytes(), "inter_node": ledger.inter_node_bytes()}

    def forget_bytes(self) -> None:
        """Count from zero again."""
        self.dispatcher.ledger.clear()

    def _layers(self, batch: ForwardBatch, kv: KVCache) -> Pass:
        """From token ids to my rows of the last layer's output."""
        rows = TokenRows(group=self.tp, num_tokens=batch.num_tokens)
        step = Step(
            where=self.where,
            rows=rows,
            rotation=self.rotary.at(batch.positions_T),
            plan=AttentionPlan.build(batch, kv.block_size),
        )
        batch.check_token_ids(self.config.vocab_size)
        x_OH = self._embed(batch.token_ids_T, rows)
        for layer, cache in zip(self.layers, kv.layers, strict=True):
            x_OH = yield from layer.steps(x_OH, step, cache)
        return x_OH

    def _embed(self, token_ids_T: Tensor, rows: TokenRows) -> Tensor:
        """Each rank looks up its part of the vocabulary; the sum over ranks has one term."""
        mine = shard(self.config.vocab_size, self.tp.size, self.tp.idx)
        local_T = token_ids_T - mine.start
        elsewhere_T1 = ((local_T < 0) | (local_T >= len(self.embedding))).unsqueeze(1)
        found_TH = self.embedding[local_T.clamp(0, len(self.embedding) - 1)]
        return rows.scatter_sum(found_TH.masked_fill(elsewhere_T1, 0))

    def _logits(self, x_OH: Tensor, batch: ForwardBatch) -> Tensor | None:
        """Each rank computes its part of the vocabulary; TP rank 0 keeps them all."""
        size = self.config.vocab_size
        if len(batch.logit_rows) == 0:
            return torch.zeros(0, size) if self.tp.idx == 0 else None
        rows = TokenRows(group=self.tp, num_tokens=batch.num_tokens)
        picked_LH = rows.gather(self.norm(x_OH))[batch.logit_rows]
        local_LV = stable_linear(picked_LH, self.head)
        if self.tp.size == 1:
            return local_LV.float()
        logits_VL = self.tp.all_gather(local_LV.T.contiguous(), shard_sizes(size, self.tp.size))
        return logits_VL.T.contiguous().float() if self.tp.idx == 0 else None

    def close(self) -> None:
        """There will be no other pass: nothing to end here, unlike on GPUs."""

    @cached_property
    def moe_layers(self) -> tuple[MoELayer, ...]:
        """The expert layers, in order."""
        return tuple(layer.mlp for layer in self.layers if isinstance(layer.mlp, MoELayer))


def expert_flop(config: ModelConfig) -> float:
    """Floating-point operations of one token's experts in one layer."""
    per_expert = 6.0 * config.hidden_size * config.expert_intermediate_size
    return per_expert * config.gate.num_experts_per_token


def build(
    loader: Loader,
    groups: ParallelGroups,
    placement: Placement,
    dispatcher: TokenDispatcher,
    balance: Balance | None = None,
    phase: Phase = untimed,
) -> Transformer:
    """Assemble this rank's modules; all expert layers share one dispatcher, and `balance`."""
    config = loader.config
    if placement.num_layers != config.num_moe_layers:
        raise ValueError(
            f"the placement has {placement.num_layers} layers, the model {config.num_moe_layers} "
            "expert layers"
        )
    embedding = loader.embedding()
    layers = tuple(
        _layer(idx, loader, groups, placement, dispatcher, balance, phase)
        for idx in range(config.num_layers)
    )
    return Transformer(
        config=config,
        tp=groups.tp,
        embedding=embedding,
        layers=layers,
        norm=loader.norm("norm"),
        head=loader.head(embedding),
        rotary=RotaryTable(config.rope, config.max_position_embeddings),
        dispatcher=dispatcher,
        balance=balance,
        where=groups.where,
        phase=phase,
    )


def _layer(
    idx: int,
    loader: Loader,
    groups: ParallelGroups,
    placement: Placement,
    dispatcher: TokenDispatcher,
    balance: Balance | None,
    phase: Phase,
) -> DecoderLayer:
    mlp: MoELayer | DenseLayer
    if idx in loader.config.moe_layers:
        moe_idx = loader.config.moe_layers.index(idx)
        leader = groups.tp.ranks[0]
        mlp = MoELayer(
            gate=loader.gate(idx),
            slots=loader.experts(moe_idx, placement),
            dispatcher=dispatcher,
            layer_placement=placement.layer(moe_idx),
            rank=leader,
            choice=make_choice(balance, leader),
            shared_expert=loader.shared_expert(idx),
            phase=phase,
        )
    else:
        mlp = DenseLayer(local=loader.dense_mlp(idx))
    return DecoderLayer(
        index=idx,
        attention_norm=loader.norm(f"layers.{idx}.input_layernorm"),
        attention=loader.attention(idx),
        mlp_norm=loader.norm(f"layers.{idx}.post_attention_layernorm"),
        mlp=mlp,
        phase=phase,
    )
