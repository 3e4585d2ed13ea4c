"""Slot buffers: the weights of the physical experts that one rank hosts in one layer.

Weights that are in a slot are never written again. To change the expert of a slot is to put other
weights in their place, one reference, so that it can be done between two steps, and whoever still
reads the old ones (to send them to a peer) reads what they were.

S slots, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from experts.fingerprint import fingerprint
from experts.float8 import FLOAT8, BlockScaled, store
from experts.kernels.types import BLOCK


class ExpertWeights:
    """One expert in one piece of memory: w13 [2I, H] (gate rows, then up rows), w2 [H, I].

    With dtype float8_e4m3fn both are `BlockScaled`, and their scales lie behind them; ValueError for sizes
    that are no multiples of 128 then. The memory holds anything until it is filled, by `fill` or by
    writing `data`, its bytes.
    """

    __slots__ = ("data", "w2", "w13")

    def __init__(self, hidden: int, intermediate: int, dtype: torch.dtype) -> None:
        if dtype == FLOAT8 and (hidden % BLOCK or intermediate % BLOCK):
            raise ValueError(
                f"float8 experts need hidden({hidden}) and intermediate({intermediate}) in multiples "
                f"of {BLOCK}"
            )
        shapes = [(2 * intermediate, hidden), (hidden, intermediate)]
        blocks = [tuple(-(-n // BLOCK) for n in shape) for shape in shapes if dtype == FLOAT8]
        sizes = [2 * intermediate * hidden, hidden * intermediate]
        num_bytes = sum(sizes) * dtype.itemsize + sum(4 * p * q for p, q in blocks)
        memory = torch.empty(num_bytes, dtype=torch.uint8)
        both, rest = memory.split([sum(sizes) * dtype.itemsize, 4 * sum(p * q for p, q in blocks)])
        matrices = [
            part.view(shape)
            for part, shape in zip(both.view(dtype).split(sizes), shapes, strict=True)
        ]
        if dtype == FLOAT8:
            scales = rest.view(torch.float32).split([p * q for p, q in blocks])
            matrices = [
                BlockScaled.of(matrix, scale.view(shape))
                for matrix, scale, shape in zip(matrices, scales, blocks, strict=True)
            ]
        self.w13, self.w2 = matrices
        self.data = memoryview(memory.numpy())  # type: ignore[arg-type]

    def fill(self, gate_IH: Tensor, up_IH: Tensor, down_HI: Tensor) -> None:
        """Write the expert's matrices, cast to our dtype; ValueError if they do not fit."""
        hidden, intermediate = self.w2.shape
        wanted = (intermediate, hidden)
        shapes = [tuple(t.shape) for t in (gate_IH, up_IH, down_HI)]
        if shapes != [wanted, wanted, wanted[::-1]]:
            raise ValueError(
                f"gate, up and down of an expert must be [I, H], [I, H] and [H, I] with "
                f"I={intermediate}, H={hidden}; got {[list(s) for s in shapes]}"
            )
        w13_scale = w2_scale = None
        if isinstance(self.w13, BlockScaled) and isinstance(self.w2, BlockScaled):
            w13_scale, w2_scale = self.w13.scale_PQ, self.w2.scale_PQ
        halves = [None, None] if w13_scale is None else w13_scale.chunk(2)
        store(gate_IH, self.w13[:intermediate], halves[0])
        store(up_IH, self.w13[intermediate:], halves[1])
        store(down_HI, self.w2, w2_scale)

    def fingerprint(self) -> int:
        """64 bits of all bytes: equal for copies, wherever they are."""
        return fingerprint_of(self.w13, self.w2)

    @property
    def num_bytes(self) -> int:
        return self.data.nbytes


def fingerprint_of(w13: Tensor, w2: Tensor) -> int:
    """Of an expert in any memory, contiguous; scales are part of it."""
    scales = [w.scale_PQ for w in (w13, w2) if isinstance(w, BlockScaled)]
    return fingerprint(w13, w2, *scales)


class ExpertSlots:
    """S slots, each with the weights of one expert, zero until loaded.

    Raises ValueError for sizes below one (no slots at all are fine).
    """

    def __init__(self, num_slots: int, hidden: int, intermediate: int, dtype: torch.dtype) -> None:
        if num_slots < 0 or min(hidden, intermediate) < 1:
            raise ValueError(
                f"Invalid expert slots: num_slots({num_slots}) must be >= 0, hidden({hidden}) and "
                f"intermediate({intermediate}) >= 1"
            )
        self.num_slots, self.hidden, self.intermediate = num_slots, hidden, intermediate
        self.dtype = dtype
        self._weights = [self.new_weights() for _ in range(num_slots)]
        for weights in self._weights:
            weights.w13.zero_()
            weights.w2.zero_()

    def __getitem__(self, slot: int) -> ExpertWeights:
        return self._weights[slot]

    def __setitem__(self, slot: int, weights: ExpertWeights) -> None:
        """Put other weights, of our sizes and dtype, in force."""
        self._weights[slot] = weights

    def replace(self, changes: Mapping[int, ExpertWeights]) -> None:
        """The same for several slots at once; their new weights may be those of others now."""
        for slot, weights in changes.items():
            self._weights[slot] = weights

    @property
    def w13(self) -> list[Tensor]:
        """[2I, H] of each slot."""
        return [weights.w13 for weights in self._weights]

    @property
    def w2(self) -> list[Tensor]:
        """[H, I] of each slot."""
        return [weights.w2 for weights in self._weights]

    def new_weights(self) -> ExpertWeights:
        """Memory for an expert of this layer that is in no slot yet."""
        return ExpertWeights(self.hidden, self.intermediate, self.dtype)

    def load(self, slot: int, gate_IH: Tensor, up_IH: Tensor, down_HI: Tensor) -> None:
        """Put one expert in `slot`, cast to the slots' dtype; ValueError if it does not fit.

        Not for a slot in use: it writes into the slot's memory.
        """
        if not 0 <= slot < self.num_slots:
            raise ValueError(f"slot({slot}) is outside [0, num_slots({self.num_slots}))")
        self._weights[slot].fill(gate_IH, up_IH, down_HI)

    @property
    def num_bytes(self) -> int:
        return sum(weights.num_bytes for weights in self._weights)
