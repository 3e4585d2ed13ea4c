"""The experts of one layer on the device: a pool of buffers, and which of them each slot reads.

Two slots with one expert share its buffer. To change the expert of a slot is to write one number
between two steps; weights that are new here are then copied to a buffer that no slot reads any more.

Legend: S slots, B buffers, H hidden, I intermediate, N = 2I.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from cluster.model.errors import UnsupportedModelError
from experts.float8 import FLOAT8, BlockScaled, plain, store
from experts.kernels.types import BLOCK, DeviceExperts
from experts.weights import ExpertWeights, fingerprint_of


class TwoMatrices(Protocol):
    """One expert: w13 [2I, H], gate rows, then up rows; w2 [H, I]. On any device, `BlockScaled` or not."""

    @property
    def w13(self) -> Tensor: ...
    @property
    def w2(self) -> Tensor: ...


class DeviceExpert:
    """One expert in a buffer of the pool, as long as a slot reads it."""

    def __init__(self, slots: DeviceSlots, buffer: int) -> None:
        self.buffer = buffer
        self._slots = slots
        self._fingerprint: int | None = None

    def fingerprint(self) -> int:
        """That of `ExpertWeights` with the same bytes."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint_of(*self._slots.views(self.buffer))
        return self._fingerprint

    @property
    def data(self) -> memoryview:
        """Its bytes as `ExpertWeights` has them, scales and all, copied to the host."""
        host = self._slots.new_weights()
        for there, here in zip(self._slots.views(self.buffer), (host.w13, host.w2), strict=True):
            store(there, here, here.scale_PQ if isinstance(here, BlockScaled) else None)
        return host.data


class DeviceSlots:
    """What `ExpertSlots` is to the CPU's layers, for migration and reports; kernels read `experts`."""

    def __init__(
        self,
        held: Mapping[int, int],
        read: Callable[[int], TwoMatrices],
        *,
        num_slots: int,
        hidden: int,
        intermediate: int,
        float8: bool,
        device: torch.device,
    ) -> None:
        """`held`: the expert of each slot that has one; `read` gives an expert, to be copied.

        Experts are read one after the other, so the host never holds more than one. Raises
        UnsupportedModelError for float8 with sizes that are no multiples of 128.
        """
        if float8 and (hidden % BLOCK or intermediate % BLOCK):
            raise UnsupportedModelError(
                f"float8 experts need hidden and intermediate sizes in multiples of {BLOCK}, got "
                f"{hidden} and {intermediate}: set quantization to bfloat16"
            )
        self.num_slots, self.hidden, self.intermediate = num_slots, hidden, intermediate
        buffers = {expert: i for i, expert in enumerate(dict.fromkeys(held.values()))}
        self.experts = _pool(max(1, num_slots), num_slots, hidden, intermediate, float8, device)
        for expert, buffer in buffers.items():
            self._fill(buffer, read(expert))
        shared = {expert: DeviceExpert(self, buffer) for expert, buffer in buffers.items()}
        empty = DeviceExpert(self, 0)
        self._slots = [empty] * num_slots
        for slot, expert in held.items():
            self._slots[slot] = shared[expert]
        self._tell()

    def __getitem__(self, slot: int) -> DeviceExpert:
        return self._slots[slot]

    def __setitem__(self, slot: int, weights: DeviceExpert | ExpertWeights) -> None:
        self.replace({slot: weights})

    def replace(self, changes: Mapping[int, DeviceExpert | ExpertWeights]) -> None:
        """Other experts in some slots, from the next step on. New ones are copied to buffers that no slot
        reads any more, so this waits for the steps before."""
        after = [changes.get(slot, held) for slot, held in enumerate(self._slots)]
        in_use = {held.buffer for held in after if isinstance(held, DeviceExpert)}
        free = [i for i in range(len(self.experts.w13_BNH)) if i not in in_use]
        for slot, weights in changes.items():
            if isinstance(weights, ExpertWeights):
                buffer = free.pop()
                self._fill(buffer, weights)
                weights = DeviceExpert(self, buffer)
            self._slots[slot] = weights
        self._tell()

    def new_weights(self) -> ExpertWeights:
        """Memory on the host for an expert of this layer that is in no slot yet, in the pool's form."""
        return ExpertWeights(self.hidden, self.intermediate, self.experts.w13_BNH.dtype)

    @property
    def num_bytes(self) -> int:
        scales = (self.experts.w13_scale, self.experts.w2_scale)
        whole = self.experts.w13_BNH.nbytes + self.experts.w2_BHI.nbytes
        return whole + sum(scale.nbytes for scale in scales if scale is not None)

    def views(self, buffer: int) -> tuple[Tensor, Tensor]:
        """(w13, w2) in a buffer: `BlockScaled` in a pool of float8."""
        experts = self.experts
        w13, w2 = experts.w13_BNH[buffer], experts.w2_BHI[buffer]
        if experts.w13_scale is None or experts.w2_scale is None:
            return w13, w2
        return (
            BlockScaled.of(w13, experts.w13_scale[buffer]),
            BlockScaled.of(w2, experts.w2_scale[buffer]),
        )

    def matrices(self, slot: int) -> tuple[Tensor, Tensor]:
        """(w13, w2) of a slot in fp32, dequantised: for oracles and gains."""
        w13, w2 = self.views(self._slots[slot].buffer)
        return plain(w13).float(), plain(w2).float()

    def _fill(self, buffer: int, weights: TwoMatrices) -> None:
        experts = self.experts
        for whole, scales, matrix in (
            (experts.w13_BNH, experts.w13_scale, weights.w13),
            (experts.w2_BHI, experts.w2_scale, weights.w2),
        ):
            store(matrix, whole[buffer], None if scales is None else scales[buffer])

    def _tell(self) -> None:
        buffers = torch.tensor([kept.buffer for kept in self._slots], dtype=torch.int32)
        self.experts.buffer_S.copy_(buffers)


def _pool(
    num_buffers: int,
    num_slots: int,
    hidden: int,
    intermediate: int,
    float8: bool,
    device: torch.device,
) -> DeviceExperts:
    dtype = FLOAT8 if float8 else torch.bfloat16

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.empty(num_buffers, rows, columns, dtype=dtype, device=device)

    def scale(rows: int, columns: int) -> Tensor | None:
        if not float8:
            return None
        return torch.empty(num_buffers, -(-rows // BLOCK), -(-columns // BLOCK), device=device)

    return DeviceExperts(
        w13_BNH=matrix(2 * intermediate, hidden),
        w2_BHI=matrix(hidden, intermediate),
        buffer_S=torch.zeros(num_slots, dtype=torch.int32, device=device),
        w13_scale=scale(2 * intermediate, hidden),
        w2_scale=scale(hidden, intermediate),
    )
