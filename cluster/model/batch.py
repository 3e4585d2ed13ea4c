"""The tensors of one forward pass: which tokens, at which positions, with which KV blocks.

Shapes: T tokens of this replica in the step, N sequences, B blocks of the longest block table.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ForwardBatch:
    """One step's input; every rank of a replica builds the same one. T may be 0.

    `kv_slots_T` is where each token's keys go: block * block_size + offset. `sequence_T` names each
    token's row of `block_tables_NB` (padded with 0). `logit_rows` indexes T: the tokens whose
    logits are wanted. All int64. A token may attend to any earlier position of its sequence,
    whether it was computed in this step or in an earlier one.
    """

    token_ids_T: Tensor
    positions_T: Tensor
    kv_slots_T: Tensor
    block_tables_NB: Tensor
    sequence_T: Tensor
    logit_rows: Tensor

    def __post_init__(self) -> None:
        num_tokens = len(self.token_ids_T)
        for name in ("positions_T", "kv_slots_T", "sequence_T"):
            if len(getattr(self, name)) != num_tokens:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries for {num_tokens} tokens"
                )
        for name, tensor in vars(self).items():
            if tensor.dtype != torch.int64:
                raise ValueError(f"{name} is {tensor.dtype}, expected torch.int64")

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids_T)

    def check_token_ids(self, vocab_size: int) -> None:
        """Raise ValueError for ids outside the vocabulary."""
        ids_T = self.token_ids_T
        if bool(((ids_T < 0) | (ids_T >= vocab_size)).any()):
            raise ValueError(f"token ids must be in [0, {vocab_size}), got {ids_T.tolist()}")

    def split(self, parts: int) -> list[ForwardBatch]:
        """As `parts` batches of consecutive tokens, as equal as can be; some may be empty."""
        if parts == 1:
            return [self]
        ends = [self.num_tokens * i // parts for i in range(parts + 1)]
        return [self._tokens(lo, hi) for lo, hi in pairwise(ends)]

    def _tokens(self, lo: int, hi: int) -> ForwardBatch:
        wanted = (self.logit_rows >= lo) & (self.logit_rows < hi)
        return ForwardBatch(
            token_ids_T=self.token_ids_T[lo:hi],
            positions_T=self.positions_T[lo:hi],
            kv_slots_T=self.kv_slots_T[lo:hi],
            block_tables_NB=self.block_tables_NB,
            sequence_T=self.sequence_T[lo:hi],
            logit_rows=self.logit_rows[wanted] - lo,
        )

    @staticmethod
    def empty() -> ForwardBatch:
        """The batch of an idle replica: no tokens, but it still joins the experts' exchanges."""
        none = torch.zeros(0, dtype=torch.int64)
        return ForwardBatch(
            token_ids_T=none,
            positions_T=none,
            kv_slots_T=none,
            block_tables_NB=none.view(0, 0),
            sequence_T=none,
            logit_rows=none,
        )
