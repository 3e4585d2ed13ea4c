"""Every expert's gain on every rank: what combine "fixed" derives a token's range from.

L expert layers, S slots of a rank, E logical experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from cluster.model.layers import DecoderLayer
from comms.group import Group
from experts.gains import expert_gains
from experts.moe import MoELayer
from router.placement import Placement


def share_gains(layers: Sequence[DecoderLayer], placement: Placement, world: Group) -> None:
    """Set `gains_E` of every expert layer. Collective over the world.

    Each rank measures the experts that it holds. Copies of one expert have one gain, the greatest
    that any host found, so that all ranks agree also where hosts differ.
    """
    moes = [(layer.mlp, layer.mlp_norm) for layer in layers if isinstance(layer.mlp, MoELayer)]
    if not moes:
        return
    local_LS = torch.stack([expert_gains(moe.slots, norm.weight) for moe, norm in moes])
    local_SL = local_LS.T.contiguous()
    gains_SL = world.all_gather(local_SL, [len(local_SL)] * world.size).numpy()
    for idx, (moe, _) in enumerate(moes):
        experts_S = placement.physical_to_logical[idx]
        gains_E = np.zeros(placement.num_experts, dtype=np.float32)
        np.maximum.at(gains_E, experts_S[experts_S >= 0], gains_SL[experts_S >= 0, idx])
        moe.gains_E = torch.from_numpy(gains_E)
