"""How large an expert's outputs are: what the range of the associative sum is made of.

The grid of `comms/fixed.py` needs, for each token, a number that its output rarely exceeds, before
any expert has run. An expert's *gain* is the rms of its outputs on random inputs of the kind it
gets, normal values times the weight of the norm before it. It is a property of the weights alone,
fixed at load and the same wherever the expert lives. A token's output is then a sum of about
independent terms weight * gain:

    range = margin * sqrt(sum over k of (weight_k * gain_k)^2)

Real inputs are no noise, and experts answer louder to the tokens that the gate picks for them; the
margin covers that, and outliers among channels. How much it must cover is measured by `expertmesh
bench codecs`. Too small costs bytes, too large precision; neither changes what the sum depends on.

S slots, E experts, T tokens, K experts per token, H hidden, I intermediate.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from experts.mlp import gated_mlp
from experts.weights import ExpertSlots

MARGIN = 16.0
_PROBES = 32
_SEED = 20_241_226
_LEAST_RANGE = 2.0**-60  # keeps the grid's arithmetic in normal numbers
_GREATEST_RANGE = 2.0**100


@torch.inference_mode()
def expert_gains(slots: ExpertSlots, norm_weight_H: Tensor) -> Tensor:
    """gains_S, fp32: rms of each slot's outputs, rounded to a power of two; 0 for an empty slot.

    Rounded, so that hosts whose products differ in the last bits agree; a factor of 1.4 at most is
    little beside the margin.
    """
    rng = np.random.Generator(np.random.Philox(_SEED))
    probe_TH = torch.from_numpy(rng.standard_normal((_PROBES, slots.hidden), dtype=np.float32))
    x_TH = (probe_TH * norm_weight_H.float()).to(slots.dtype)
    gains = [
        _rms(gated_mlp(x_TH, slots[slot].w13, slots[slot].w2)) for slot in range(slots.num_slots)
    ]
    return torch.tensor([_power_of_two(gain) for gain in gains], dtype=torch.float32)


def token_ranges(
    ids_TK: Tensor, weights_TK: Tensor, gains_E: Tensor, margin: float = MARGIN
) -> Tensor:
    """range_T, fp32 and > 0, from each token's experts (ids < 0: none) and their weights.

    NaN for a token with a weight that is NaN. The same bits in any batch: sums go by top-k position.
    """
    weights, ids = weights_TK.numpy(), ids_TK.numpy()  # a few numbers: torch's calls cost more
    with np.errstate(all="ignore"):
        squares_TK = np.square(weights * gains_E.numpy()[np.maximum(ids, 0)])
        squares_TK[ids < 0] = 0.0
        total_T = np.zeros(len(ids), np.float32)
        for squares_T in squares_TK.T:
            total_T += squares_T
    return (torch.from_numpy(total_T).sqrt() * margin).clamp(_LEAST_RANGE, _GREATEST_RANGE)


def _rms(y_TH: Tensor) -> float:
    return float(y_TH.double().square().mean().sqrt())


def _power_of_two(gain: float) -> float:
    """The nearest in ratio; 0 stays 0, and what is not finite stays so: it refuses its tokens."""
    return 2.0 ** round(math.log2(gain)) if 0 < gain < math.inf else gain
