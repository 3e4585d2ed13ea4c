"""How a token looks on the wire: one record of payload, slots, weights, and sometimes more.

Legend: R rows, H hidden, K top-k.

A row is encoded once, where the token lives; whoever forwards it forwards these bytes. How the
channels become bytes is in `comms/codecs.py`. Records are numpy's: it reads and writes fields of
bytes as they arrived, aligned or not, and for the few tokens of a decode step at a fraction of what
torch's calls cost.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comms.codecs import CODECS, Codec, aligned

Records = np.ndarray[Any, np.dtype[np.void]]
"""Packed rows, one element each, whose fields are those of `WireFormat.record`."""


@dataclass(frozen=True, kw_only=True)
class WireFormat:
    """Layout of a row, the same on every rank. `codec` is a name in CODECS.

    Payload (of the codec, a multiple of 4 bytes), then K slots (int16 where all of `num_slots` fit,
    else int32; padded to 4 bytes; -1 = none), then K weights (fp32), then with `with_range` the
    token's range (fp32), then with `with_address` its address (int32, see `hierarchical.py`).
    Raises ValueError for a codec that does not exist.
    """

    hidden: int
    num_topk: int
    dtype: torch.dtype
    codec: str
    num_slots: int
    with_range: bool = False
    with_address: bool = False

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise ValueError(f"codec must be one of {', '.join(CODECS)}, got {self.codec!r}")

    @cached_property
    def record(self) -> np.dtype[np.void]:
        """Fields "payload" [B] and "tail", which has all the others."""
        slot = np.dtype(np.int16 if self.num_slots <= 2**15 else np.int32)
        slot_bytes = self.num_topk * slot.itemsize
        fields: list[Any] = [
            ("slots", slot, (self.num_topk,)),
            ("padding", np.uint8, (aligned(slot_bytes, 4) - slot_bytes,)),
            ("weights", np.float32, (self.num_topk,)),
        ]
        if self.with_range:
            fields.append(("range", np.float32))
        if self.with_address:
            fields.append(("address", np.int32))
        payload_bytes = self._codec.row_bytes(self.hidden, self.dtype)
        return np.dtype([("payload", np.uint8, (payload_bytes,)), ("tail", fields)])

    @property
    def row_bytes(self) -> int:
        return self.record.itemsize

    def pack(
        self,
        x_RH: Tensor,
        slots_RK: Tensor,
        weights_RK: Tensor,
        range_R: Tensor | None = None,
        first_address: int | None = None,
    ) -> Records:
        """`range_R` and the address of the first row exactly where the format has them."""
        if (range_R is not None) != self.with_range:
            raise ValueError(f"with_range is {self.with_range}, range_R {range_R}")
        if (first_address is not None) != self.with_address:
            raise ValueError(f"with_address is {self.with_address}, address {first_address}")
        records = np.empty(len(x_RH), self.record)
        records["payload"] = self._codec.encode(x_RH).numpy()
        tail = records["tail"]
        tail["slots"] = slots_RK.numpy()
        tail["padding"] = 0
        tail["weights"] = weights_RK.numpy()
        if range_R is not None:
            tail["range"] = range_R.numpy()
        if first_address is not None:
            tail["address"] = np.arange(first_address, first_address + len(records))
        return records

    def records(self, message: Tensor) -> Records:
        """The records of a flat uint8 message; they share its memory."""
        return message.numpy().view(self.record)

    def encode(self, x_RH: Tensor) -> Tensor:
        """Payloads [R, B] uint8."""
        return self._codec.encode(x_RH)

    def decode(self, payload_RB: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
        """x_RH in the model's dtype."""
        return self._codec.decode(torch.from_numpy(payload_RB), self.hidden, self.dtype)

    @property
    def _codec(self) -> Codec:
        return CODECS[self.codec]
