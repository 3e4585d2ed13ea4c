"""A replica whose attention, dense MLPs and vocabulary are divided over several GPUs of a node.

As `cluster.model.layers` has it on CPUs: between the blocks of a layer every rank keeps T / W rows; attention
and dense MLPs gather all rows, compute local heads or channels, and scatter the sums back. Here each move
is one kernel with the norm beside it, so a layer costs no launch more than on one rank.

Legend: T rows of the replica, W ranks, O = ceil(T / W) own rows, H hidden, L logit rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from cluster.model.config import ModelConfig
from cluster.model.cuda.ops import Ops
from cluster.model.cuda.replica import Mlp, OneRank, Replica, Stream
from cluster.model.cuda.weights import Matrix, Norm
from cluster.model.shards import shard
from comms.groups import ParallelGroups
from comms.store import PrefixStore
from comms.symmetric_rows_layout import RowsLayout
from experts.kernels.types import NormedRows


class Rows(Protocol):
    """The moves themselves: `comms.symmetric_rows.SymmetricRows`. A norm has `weight` and `eps`."""

    def expect(self, num_rows: int) -> None: ...
    def gather(
        self, x_OH: Tensor, added_OH: Tensor | None = None, norm: Any = None
    ) -> tuple[Tensor, Tensor]: ...
    def scatter(
        self, parts_TH: Tensor, residual_OH: Tensor | None = None, norm: Any = None
    ) -> tuple[Tensor, Tensor]: ...
    def gather_logits(self, logits_LW: Tensor, first: int, out_LV: Tensor) -> None: ...
    def check(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class DividedReplica:
    """Rank `idx` of `size`. Words are divided as `shards.shard` does it."""

    rows: Rows
    size: int
    idx: int
    vocab_size: int
    ops: Ops

    def expect(self, num_rows: int) -> None:
        self.rows.expect(num_rows)

    def num_own(self, num: int) -> int:
        return -(-num // self.size)

    def own_tokens(self, num_tokens: Tensor, num_own: int) -> Tensor:
        return (num_tokens - self.idx * num_own).clamp(0, num_own)

    def embed(self, ids_T: Tensor, embedding: Tensor) -> Stream:
        """Each rank looks up its part of the vocabulary; the sum over ranks has one term."""
        local_T = ids_T - self._words.start
        elsewhere_T1 = ((local_T < 0) | (local_T >= len(embedding))).unsqueeze(1)
        found_TH = F.embedding(local_T.clamp(0, len(embedding) - 1), embedding)
        return Stream(self.rows.scatter(found_TH.masked_fill_(elsewhere_T1, 0))[1])

    def gather(self, stream: Stream, norm: Norm) -> tuple[NormedRows, Tensor]:
        rows_TH, sum_OH = self.rows.gather(stream.x_OH, stream.summed_OH, norm)
        return NormedRows(rows_TH), sum_OH

    def scatter(self, parts_TH: Tensor, x_OH: Tensor, norm: Norm) -> tuple[NormedRows, Tensor]:
        normed_OH, sum_OH = self.rows.scatter(parts_TH, x_OH, norm)
        return NormedRows(normed_OH), sum_OH

    def divided(self, mlp: Mlp) -> Mlp:
        return DividedMlp(local=mlp, rows=self.rows)

    def logits(self, stream: Stream, norm: Norm, rows_L: Tensor, head: Matrix) -> Tensor:
        """Each rank computes its part of the vocabulary; all get them all."""
        rows, _ = self.gather(stream, norm)
        part_LW = self.ops.linear(rows.x_RH.index_select(0, rows_L), head)
        out_LV = torch.empty(len(rows_L), self.vocab_size, device=part_LW.device)
        self.rows.gather_logits(part_LW, self._words.start, out_LV)
        return out_LV

    def check(self) -> None:
        self.rows.check()

    @property
    def _words(self) -> slice:
        return shard(self.vocab_size, self.size, self.idx)


@dataclass(frozen=True, kw_only=True)
class DividedMlp:
    """`local`: my channels of a dense MLP."""

    local: Mlp
    rows: Rows

    def forward(self, rows: NormedRows, num_tokens: Tensor | None = None) -> Tensor:
        rows_TH, _ = self.rows.gather(rows.x_RH)
        return self.rows.scatter(self.local.forward(NormedRows(rows_TH)))[1]

    @property
    def reads_float8(self) -> bool:
        return False  # what is exchanged is not quantised

    @property
    def num_bytes(self) -> int:
        return self.local.num_bytes


def connect_replica(
    config: ModelConfig,
    groups: ParallelGroups,
    ops: Ops,
    *,
    capacity: int,
    device: torch.device,
    timeout_s: float = 60.0,
) -> Replica:
    """With the other ranks of my replica, for passes of at most `capacity` rows of it. Collective over them;
    needs nobody for a replica of one. Raises what `SymmetricMemory.connect` does."""
    size = groups.tp.size
    if size == 1:
        return OneRank(ops=ops)
    from comms.symmetric_rows import SymmetricRows
    from experts.kernels.early import early

    assert groups.store is not None, "ranks that meet have a store"
    rows = SymmetricRows.connect(
        rows_layout(config, size, capacity),
        PrefixStore(f"replica{groups.tp.ranks[0]}", groups.store),
        groups.tp.idx,
        device,
        ranks=groups.tp.ranks,
        where=groups.where,
        timeout_s=timeout_s,
        early=early(device)["EARLY"],
    )
    return DividedReplica(
        rows=rows, size=size, idx=groups.tp.idx, vocab_size=config.vocab_size, ops=ops
    )


def rows_layout(config: ModelConfig, size: int, capacity: int) -> RowsLayout:
    """What `size` ranks that share this model's replica agree on."""
    return RowsLayout(
        world_size=size,
        hidden=config.hidden_size,
        vocab_size=config.vocab_size,
        capacity=capacity,
    )
