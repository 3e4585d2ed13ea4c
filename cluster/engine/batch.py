"""From the plan of a step to the tensors of its forward pass.

Shapes: T tokens, N sequences (rows of the plan), B blocks of the longest block table.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.engine.plan import Logits, StepPlan
from cluster.model.batch import ForwardBatch

__all__ = ["ForwardBatch", "StepPlan", "forward_batch"]

Ints = NDArray[np.int64]


def forward_batch(plan: StepPlan, block_size: int, width: int = 0) -> ForwardBatch:
    """The tensors of the plan's forward pass, on the CPU. The same on every rank of a replica.

    `width`: of the block tables at least.
    """
    num_T, num_B = _column(plan.counts), _column(plan.num_blocks)
    sequence_T = np.repeat(np.arange(len(plan)), num_T)
    first_row = np.cumsum(num_T) - num_T
    positions_T = np.arange(len(sequence_T)) + (_column(plan.starts) - first_row)[sequence_T]
    tables_NB = np.zeros((len(plan), int(num_B.max(initial=width))), np.int64)
    tables_NB[np.arange(tables_NB.shape[1]) < num_B[:, None]] = plan.blocks
    block_T = tables_NB[sequence_T, positions_T // block_size]
    logits = _column(plan.logits)
    wants_T = np.repeat(logits == Logits.ALL, num_T)
    wants_T[(first_row + num_T - 1)[logits == Logits.LAST]] = True
    return ForwardBatch(
        token_ids_T=torch.from_numpy(_column(plan.token_ids)),
        positions_T=torch.from_numpy(positions_T),
        kv_slots_T=torch.from_numpy(block_T * block_size + positions_T % block_size),
        block_tables_NB=torch.from_numpy(tables_NB),
        sequence_T=torch.from_numpy(sequence_T),
        logit_rows=torch.from_numpy(np.flatnonzero(wants_T)),
    )


def _column(values: object) -> Ints:
    return np.array(values, np.int64)
