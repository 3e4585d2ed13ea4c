"""From the plan of a step to the tensors of its forward pass.

Shapes: T tokens, N items (sequences), B blocks of the longest block table.
"""

import numpy as np
import torch

from cluster.engine.plan import PlanItem, StepPlan
from cluster.model.batch import ForwardBatch

__all__ = ["ForwardBatch", "PlanItem", "StepPlan", "forward_batch"]


def forward_batch(plan: StepPlan, block_size: int) -> ForwardBatch:
    """The tensors of the plan's forward pass, on the CPU. The same on every rank of a replica."""
    items = plan.items
    num_T = np.fromiter((len(item.token_ids) for item in items), np.int64, len(items))
    num_B = np.fromiter((len(item.block_table) for item in items), np.int64, len(items))
    starts = np.fromiter((item.start for item in items), np.int64, len(items))
    sequence_T = np.repeat(np.arange(len(items)), num_T)
    first_row = np.cumsum(num_T) - num_T
    positions_T = np.arange(len(sequence_T)) + (starts - first_row)[sequence_T]
    blocks = np.frombuffer(b"".join([i.block_table.tobytes() for i in items]), np.int32)
    tables_NB = np.zeros((len(items), int(num_B.max(initial=0))), np.int64)
    tables_NB[np.arange(tables_NB.shape[1]) < num_B[:, None]] = blocks
    block_T = tables_NB[sequence_T, positions_T // block_size]
    wants = np.fromiter((item.wants_logits for item in items), bool, len(items))
    token_ids = np.array([t for item in items for t in item.token_ids], np.int64)
    return ForwardBatch(
        token_ids_T=torch.from_numpy(token_ids),
        positions_T=torch.from_numpy(positions_T),
        kv_slots_T=torch.from_numpy(block_T * block_size + positions_T % block_size),
        block_tables_NB=torch.from_numpy(tables_NB),
        sequence_T=torch.from_numpy(sequence_T),
        logit_rows=torch.from_numpy((first_row + num_T - 1)[wants]),
    )
