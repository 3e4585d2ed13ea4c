"""An expert's gain, measured on the device: the number that `experts.gains` measures on a CPU.

Gains are rounded to powers of two, so that products which differ in the last bits give the same one.

Legend: T probes, H hidden, I intermediate.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

_PROBES, _SEED = 32, 20_241_226  # those of `experts.gains`: a test holds the two together


@torch.inference_mode()
def expert_gain(w13: Tensor, w2: Tensor, norm_weight_H: Tensor) -> float:
    """rms of the expert's outputs for normal inputs behind a norm of these weights; 0 for zeros.

    w13 [2I, H] and w2 [H, I] of any float dtype, computed in fp32 after rounding inputs to bfloat16.
    """
    x_TH = (
        (_probe(w13.shape[1], w13.device) * norm_weight_H.float().to(w13.device))
        .to(torch.bfloat16)
        .float()
    )
    gate_TI, up_TI = (x_TH @ w13.float().T).chunk(2, dim=1)
    y_TH = (torch.nn.functional.silu(gate_TI) * up_TI) @ w2.float().T
    rms = float(y_TH.double().square().mean().sqrt())
    return 2.0 ** round(math.log2(rms)) if 0 < rms < math.inf else rms


@cache
def _probe(hidden: int, device: torch.device) -> Tensor:
    rng = np.random.Generator(np.random.Philox(_SEED))
    return torch.from_numpy(rng.standard_normal((_PROBES, hidden), dtype=np.float32)).to(device)
