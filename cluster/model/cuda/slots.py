"""The experts of one layer on the device: a pool of buffers, and which of them each slot reads.

Two slots with one expert share its buffer. To change the expert of a slot is to write one number
between two steps; weights that are new here are first written to a buffer that no slot reads.

Legend: S slots, B buffers, H hidden, I intermediate, N = 2I.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from cluster.model.cuda.weights import dequantized, quantize_blocks
from cluster.model.errors import UnsupportedModelError
from experts.kernels.types import BLOCK, DeviceExperts
from experts.weights import ExpertWeights


class TwoMatrices(Protocol):
    """One expert: w13 [2I, H], gate rows, then up rows; w2 [H, I]. On any device."""

    @property
    def w13(self) -> Tensor: ...
    @property
    def w2(self) -> Tensor: ...


class DeviceExpert:
    """One expert in a buffer of the pool. `fingerprint` is that of the weights as they were read."""

    def __init__(self, slots: DeviceSlots, buffer: int, fingerprint: int) -> None:
        self.buffer = buffer
        self._slots, self._fingerprint = slots, fingerprint

    def fingerprint(self) -> int:
        return self._fingerprint

    @property
    def data(self) -> memoryview:
        """Its bytes as `ExpertWeights` has them, copied to the host. ValueError for float8."""
        slots = self._slots
        if slots.experts.is_float8:
            raise ValueError("quantised experts are not sent: peers would hold other weights")
        host = ExpertWeights(slots.hidden, slots.intermediate, torch.bfloat16)
        host.w13.copy_(slots.experts.w13_BNH[self.buffer])
        host.w2.copy_(slots.experts.w2_BHI[self.buffer])
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
        num_spares: int = 0,
    ) -> None:
        """`held`: the expert of each slot that has one; `read` gives an expert, to be copied.

        Experts are read one after the other, so the host never holds more than one. Raises
        UnsupportedModelError for float8 with sizes that are no multiples of 128.
        """
        if float8 and (hidden % BLOCK or intermediate % BLOCK):
            raise UnsupportedModelError(
                f"float8 experts need hidden and intermediate sizes in multiples of {BLOCK}, got "
                f"{hidden} and {intermediate}: leave quantization unset"
            )
        self.num_slots, self.hidden, self.intermediate = num_slots, hidden, intermediate
        buffers = {expert: i for i, expert in enumerate(dict.fromkeys(held.values()))}
        num_buffers = max(1, len(buffers) + num_spares)
        self.experts = _pool(num_buffers, num_slots, hidden, intermediate, float8, device)
        self._spares = list(range(len(buffers), num_buffers))
        fingerprints = {}
        for expert, buffer in buffers.items():
            weights: TwoMatrices = read(expert)
            self._fill(buffer, weights)
            fingerprints[expert] = expert  # of random weights, which no peer can send
            if isinstance(weights, ExpertWeights):
                fingerprints[expert] = weights.fingerprint()
        shared = {e: DeviceExpert(self, b, fingerprints[e]) for e, b in buffers.items()}
        empty = DeviceExpert(self, 0, 0)
        self._slots = [empty] * num_slots
        for slot, expert in held.items():
            self._slots[slot] = shared[expert]
        self._tell()

    def __getitem__(self, slot: int) -> DeviceExpert:
        return self._slots[slot]

    def __setitem__(self, slot: int, weights: DeviceExpert | ExpertWeights) -> None:
        """In force from the next step on. RuntimeError for new weights if no buffer is spare."""
        if isinstance(weights, ExpertWeights):
            if not self._spares:
                raise RuntimeError("no spare buffer for another expert on this device")
            buffer = self._spares.pop()
            self._fill(buffer, weights)
            weights = DeviceExpert(self, buffer, weights.fingerprint())
        before = self._slots[slot].buffer
        self._slots[slot] = weights
        if all(kept.buffer != before for kept in self._slots):
            self._spares.append(before)
        self._tell()

    def new_weights(self) -> ExpertWeights:
        """Memory on the host for an expert of this layer that is in no slot yet."""
        return ExpertWeights(self.hidden, self.intermediate, torch.bfloat16)

    @property
    def num_bytes(self) -> int:
        scales = (self.experts.w13_scale, self.experts.w2_scale)
        whole = self.experts.w13_BNH.nbytes + self.experts.w2_BHI.nbytes
        return whole + sum(scale.nbytes for scale in scales if scale is not None)

    def matrices(self, slot: int) -> tuple[Tensor, Tensor]:
        """(w13, w2) of a slot in fp32, dequantised: for oracles and gains."""
        experts, buffer = self.experts, self._slots[slot].buffer
        w13, w2 = experts.w13_BNH[buffer], experts.w2_BHI[buffer]
        if experts.w13_scale is None or experts.w2_scale is None:
            return w13.float(), w2.float()
        scales = experts.w13_scale[buffer], experts.w2_scale[buffer]
        return dequantized(w13, scales[0]), dequantized(w2, scales[1])

    def _fill(self, buffer: int, weights: TwoMatrices) -> None:
        experts = self.experts
        for whole, scales, matrix in (
            (experts.w13_BNH, experts.w13_scale, weights.w13),
            (experts.w2_BHI, experts.w2_scale, weights.w2),
        ):
            there = matrix.to(whole.device)
            if scales is None:
                whole[buffer].copy_(there)
            else:
                quantized, scale = quantize_blocks(there)
                whole[buffer].copy_(quantized)
                scales[buffer].copy_(scale)

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
    dtype = torch.float8_e4m3fn if float8 else torch.bfloat16

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
