"""SwiGLU's activation, computed the same way for every element of a batch.

torch's own fp32 `silu` and `sigmoid` run a vector formula and, for the last few elements of a
tensor, a scalar one that rounds differently: a row's bits would depend on where it stands.
`torch.exp` does not do that, and division, product and sum are exact to the last bit anywhere.

T rows, I intermediate.
"""

from __future__ import annotations

import torch
from torch import Tensor


def silu_and_multiply(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for `gate_up` [T, 2I], gate first: [T, I], in fp32, cast back once at the end."""
    gate_TI, up_TI = gate_up.float().chunk(2, dim=1)
    return (gate_TI / (1 + torch.exp(-gate_TI)) * up_TI).to(gate_up.dtype)
