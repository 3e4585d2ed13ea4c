"""The tensors of one forward pass: which tokens, at which positions, with which KV blocks.

Shapes: T tokens of this replica in the step, N sequences, B blocks of the longest block table.
"""

from __future__ import annotations

from dataclasses import dataclass

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
