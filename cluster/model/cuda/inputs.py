"""What one forward pass reads besides weights and caches: a few numbers for each token, on the device.

They travel together in one copy from pinned memory, and lie at fixed places, so that a captured graph
finds the next step's numbers where it found the last one's. Rows beyond `num_tokens` are padding:
they write to a spare block of the cache, have no experts, and nobody reads what they compute.

Legend: T rows of the pass (padding among them), N sequences, B blocks of a table, L logit rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.model.batch import ForwardBatch
from cluster.model.kv_cache import KVCache

_ALIGNMENT = 32  # int32s: places begin where kernels can read 16 bytes at once


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """All int32, views of one buffer. `num_tokens` is a tensor of one number; `logit_rows_L` indexes T."""

    num_tokens: Tensor
    token_ids_T: Tensor
    positions_T: Tensor
    kv_slots_T: Tensor
    sequence_T: Tensor
    block_tables_NB: Tensor
    logit_rows_L: Tensor
    buffer: Tensor

    @staticmethod
    def empty(
        num_rows: int,
        num_tables: int,
        width: int,
        num_logits: int,
        device: torch.device,
        *,
        pinned: bool = False,
    ) -> StepInputs:
        """Zeros: no tokens. Shapes as in the legend, `width` being B."""
        sizes = [1, *[num_rows] * 4, num_tables * width, num_logits]
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
        buffer = torch.zeros(starts[-1], dtype=torch.int32, device=device, pin_memory=pinned)
        parts = [
            buffer[start : start + size] for start, size in zip(starts[:-1], sizes, strict=True)
        ]
        return StepInputs(
            num_tokens=parts[0],
            token_ids_T=parts[1],
            positions_T=parts[2],
            kv_slots_T=parts[3],
            sequence_T=parts[4],
            block_tables_NB=parts[5].view(num_tables, width),
            logit_rows_L=parts[6],
            buffer=buffer,
        )

    def fill(self, batch: ForwardBatch, spare_slot: int) -> None:
        """Write the batch (on the CPU) to the first rows, and `spare_slot` to those that are padding."""
        size = batch.num_tokens
        num_tables, width = batch.block_tables_NB.shape
        self.num_tokens.fill_(size)
        for name in ("token_ids_T", "positions_T", "kv_slots_T", "sequence_T"):
            rows_T = getattr(self, name)
            rows_T[:size] = getattr(batch, name)
            rows_T[size:] = spare_slot if name == "kv_slots_T" else 0
        self.block_tables_NB[:num_tables, :width] = batch.block_tables_NB
        self.logit_rows_L[: len(batch.logit_rows)] = batch.logit_rows

    @staticmethod
    def of(batch: ForwardBatch, spare: int, device: torch.device) -> StepInputs:
        """A batch as it is, copied to the device; one row of padding if it has none."""
        num_tables, width = batch.block_tables_NB.shape
        width = -(-max(1, width) // _ALIGNMENT) * _ALIGNMENT  # few widths: kernels compile for each
        sizes = (max(1, batch.num_tokens), max(1, num_tables), width, len(batch.logit_rows))
        staged = StepInputs.empty(*sizes, torch.device("cpu"))
        staged.fill(batch, spare)
        if device.type == "cpu":
            return staged
        inputs = StepInputs.empty(*sizes, device)
        inputs.buffer.copy_(staged.buffer)
        return inputs


def spare_slot(kv: KVCache) -> int:
    """A place of the cache that no sequence owns: in the block after the last."""
    return kv.num_blocks * kv.block_size
