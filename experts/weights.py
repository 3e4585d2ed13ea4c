"""Slot buffers: the weights of the physical experts that one rank hosts in one layer.

S slots, H hidden, I intermediate.
"""

from __future__ import annotations

import torch
from torch import Tensor


class ExpertSlots:
    """w13 [S, 2I, H] (gate rows, then up rows) and w2 [S, H, I], zero until loaded.

    The memory is taken once; putting another expert in a slot is a copy. Raises ValueError for
    sizes below one (no slots at all are fine) and for tensors that do not fit a slot.
    """

    def __init__(self, num_slots: int, hidden: int, intermediate: int, dtype: torch.dtype) -> None:
        if num_slots < 0 or min(hidden, intermediate) < 1:
            raise ValueError(
                f"Invalid expert slots: num_slots({num_slots}) must be >= 0, hidden({hidden}) and "
                f"intermediate({intermediate}) >= 1"
            )
        self.num_slots, self.hidden, self.intermediate = num_slots, hidden, intermediate
        self.w13 = torch.zeros(num_slots, 2 * intermediate, hidden, dtype=dtype)
        self.w2 = torch.zeros(num_slots, hidden, intermediate, dtype=dtype)

    def load(self, slot: int, gate_IH: Tensor, up_IH: Tensor, down_HI: Tensor) -> None:
        """Put one expert in `slot`, cast to the slots' dtype."""
        if not 0 <= slot < self.num_slots:
            raise ValueError(f"slot({slot}) is outside [0, num_slots({self.num_slots}))")
        wanted = (self.intermediate, self.hidden)
        shapes = [tuple(t.shape) for t in (gate_IH, up_IH, down_HI)]
        if shapes != [wanted, wanted, wanted[::-1]]:
            raise ValueError(
                f"gate, up and down of an expert must be [I, H], [I, H] and [H, I] with "
                f"I={self.intermediate}, H={self.hidden}; got {[list(s) for s in shapes]}"
            )
        self.w13[slot, : self.intermediate] = gate_IH
        self.w13[slot, self.intermediate :] = up_IH
        self.w2[slot] = down_HI

    @property
    def num_bytes(self) -> int:
        return self.w13.nbytes + self.w2.nbytes
