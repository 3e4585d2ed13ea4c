"""How a token looks on the wire: one uint8 row of payload, slots, weights, and sometimes a range.

Legend: R rows, H hidden, K top-k.

A row is encoded once, where the token lives; whoever forwards it forwards these bytes. How the
channels become bytes is in `comms/codecs.py`.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from comms.codecs import CODECS, Codec, aligned, elements
from comms.sizes import as_bytes


@dataclass(frozen=True, kw_only=True)
class WireFormat:
    """Layout of a row, the same on every rank. `codec` is a name in CODECS.

    Payload (of the codec, a multiple of 4 bytes), then K slots (int16 where all of `num_slots` fit,
    else int32; padded to 4 bytes; -1 = none), then K weights (fp32), then with `with_range` the
    token's range (fp32). Raises ValueError for a codec that does not exist.
    """

    hidden: int
    num_topk: int
    dtype: torch.dtype
    codec: str
    num_slots: int
    with_range: bool = False

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise ValueError(f"codec must be one of {', '.join(CODECS)}, got {self.codec!r}")

    @property
    def slot_dtype(self) -> torch.dtype:
        return torch.int16 if self.num_slots <= 2**15 else torch.int32

    @cached_property
    def payload_bytes(self) -> int:
        return self._codec.row_bytes(self.hidden, self.dtype)

    @cached_property
    def row_bytes(self) -> int:
        return self._range_start + 4 * self.with_range

    def pack(
        self, x_RH: Tensor, slots_RK: Tensor, weights_RK: Tensor, range_R: Tensor | None = None
    ) -> Tensor:
        """Rows [R, row_bytes] uint8. `range_R` exactly where the format has one."""
        if (range_R is not None) != self.with_range:
            raise ValueError(f"with_range is {self.with_range}, range_R {range_R}")
        rows = torch.empty((x_RH.shape[0], self.row_bytes), dtype=torch.uint8)
        rows[:, : self.payload_bytes] = self._codec.encode(x_RH)
        slots = _bytes_of(slots_RK.to(self.slot_dtype))
        slots_end = self.payload_bytes + slots.shape[1]
        rows[:, self.payload_bytes : slots_end] = slots
        rows[:, slots_end : self._weights_start] = 0
        rows[:, self._weights_start : self._range_start] = _bytes_of(weights_RK.float())
        if range_R is not None:
            rows[:, self._range_start :] = _bytes_of(range_R.float()[:, None])
        return rows

    def unpack_x(self, rows: Tensor) -> Tensor:
        """x_RH in the model's dtype."""
        return self._codec.decode(rows[:, : self.payload_bytes], self.hidden, self.dtype)

    def unpack_slots(self, rows: Tensor) -> Tensor:
        """slots_RK, int64."""
        end = self.payload_bytes + self.num_topk * self.slot_dtype.itemsize
        return elements(rows[:, self.payload_bytes : end], self.slot_dtype).long()

    def unpack_weights(self, rows: Tensor) -> Tensor:
        """weights_RK, fp32."""
        return elements(rows[:, self._weights_start : self._range_start], torch.float32)

    def unpack_range(self, rows: Tensor) -> Tensor:
        """range_R, fp32."""
        if not self.with_range:
            raise ValueError("this wire format carries no range")
        return elements(rows[:, self._range_start :], torch.float32)[:, 0]

    @property
    def _codec(self) -> Codec:
        return CODECS[self.codec]

    @cached_property
    def _weights_start(self) -> int:
        return self.payload_bytes + aligned(self.num_topk * self.slot_dtype.itemsize, 4)

    @cached_property
    def _range_start(self) -> int:
        return self._weights_start + 4 * self.num_topk


def _bytes_of(x_RC: Tensor) -> Tensor:
    return as_bytes(x_RC).view(x_RC.shape[0], x_RC.shape[1] * x_RC.element_size())
