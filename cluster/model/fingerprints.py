"""Every expert's fingerprint on every rank: by it a rank knows weights that a peer sends.

L expert layers, S slots of a rank, E logical experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.model.errors import CheckpointError
from comms.group import Group
from experts.weights import ExpertSlots
from router.placement import Placement


def share_fingerprints(
    layers: Sequence[ExpertSlots], placement: Placement, world: Group, directory: str | Path
) -> NDArray[np.uint64]:
    """`ExpertWeights.fingerprint` of every expert, [L, E]. Collective over the world.

    Each rank takes those of what it has read. Raises CheckpointError naming an expert, and the ranks
    that hold it, if they read different weights.
    """
    if not layers:
        return np.zeros((0, placement.num_experts), np.uint64)
    mine_SL = np.array(
        [[slots[s].fingerprint() for slots in layers] for s in range(placement.slots_per_rank)],
        np.uint64,
    )
    sizes = [placement.slots_per_rank] * world.size
    all_SL = world.all_gather(torch.from_numpy(mine_SL.view(np.int64)), sizes)
    fingerprints_LS = all_SL.numpy().view(np.uint64).T
    shared_LE = np.zeros((len(layers), placement.num_experts), np.uint64)
    for layer, experts_S in enumerate(placement.physical_to_logical):
        held = np.flatnonzero(experts_S >= 0)
        shared_LE[layer, experts_S[held]] = fingerprints_LS[layer, held]
        differs = held[shared_LE[layer, experts_S[held]] != fingerprints_LS[layer, held]]
        if len(differs):
            expert = experts_S[differs[0]]
            ranks = np.flatnonzero(experts_S == expert) // placement.slots_per_rank
            raise CheckpointError(
                Path(directory),
                f"ranks {ranks.tolist()} have read different weights for expert {expert} of expert "
                f"layer {layer}; all hosts need the same checkpoint",
            )
    return shared_LE
