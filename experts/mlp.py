"""The gated MLP (SwiGLU, Shazeer 2020): one routed expert, a shared expert, or a dense layer.

T tokens, H hidden, I intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from experts.activation import silu_and_multiply
from experts.linear import stable_linear


def gated_mlp(x_TH: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """w2 @ (silu(gate @ x) * (up @ x)) for each row: [T, H] in x's dtype, rows batch-independent.

    w13 [2I, H] holds the gate rows, then the up rows; w2 is [H, I].
    """
    return stable_linear(silu_and_multiply(stable_linear(x_TH, w13)), w2)


@dataclass(frozen=True)
class GatedMLP:
    """Weights of one MLP that every token passes: w13 [2I, H] (gate rows, then up rows), w2 [H, I].

    With a shard of I per rank the outputs are partial sums, and adding them is the caller's.
    """

    w13: Tensor
    w2: Tensor

    def __post_init__(self) -> None:
        if self.w13.dim() != 2 or tuple(self.w13.shape) != (2 * self.w2.shape[1], self.w2.shape[0]):
            raise ValueError(
                f"GatedMLP needs w13 [2I, H] and w2 [H, I]; got w13 {list(self.w13.shape)} and "
                f"w2 {list(self.w2.shape)}"
            )

    def __call__(self, x_TH: Tensor) -> Tensor:
        return gated_mlp(x_TH, self.w13, self.w2)

    @property
    def num_bytes(self) -> int:
        return self.w13.nbytes + self.w2.nbytes
