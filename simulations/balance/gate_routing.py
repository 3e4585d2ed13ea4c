"""Tokens routed by the production gate from random logits: what a model's group rule makes of them.

Logits are independent standard normals plus a popularity of each expert, normal with standard
deviation `popularity`. So all choices follow the gate's own arithmetic (DeepSeek-V3 scores a group by
its best two experts), which drawing experts from their shares only comes near.

T tokens, L layers, K experts per token, E experts.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from router.gate import Gate, GateConfig

_AT_ONCE = 8192  # tokens: 8 MB of logits for 256 experts


def routed(
    config: GateConfig, *, num_layers: int, num_tokens: int, popularity: float, seed: int
) -> NDArray[np.int16]:
    """ids [T, L, K]; layers differ in which experts are popular."""
    gate = Gate(config, torch.zeros(config.num_experts, 1))
    ids_TLK = np.empty((num_tokens, num_layers, config.num_experts_per_token), dtype=np.int16)
    for layer in range(num_layers):
        rng = np.random.default_rng([seed, layer])
        popular_E = popularity * rng.standard_normal(config.num_experts)
        for start in range(0, num_tokens, _AT_ONCE):
            size = (min(_AT_ONCE, num_tokens - start), config.num_experts)
            logits_TE = torch.from_numpy(rng.standard_normal(size) + popular_E)
            ids_TLK[start : start + size[0], layer] = gate.choose(logits_TE)[0].numpy()
    return ids_TLK
