"""How long a token is on the wire, stage by stage: from the production row layout and codecs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from comms.codec import WireFormat
from comms.dispatcher import CombineMode, WireDtype
from comms.fixed import sums_bytes
from comms.reduction import FixedReduction, NodeReduction

IntArray = NDArray[np.int64]
Backend = Literal["hierarchical", "low_latency", "flat"]

ESCAPE_BYTES = sums_bytes(1, 1, torch.bfloat16, 1) - sums_bytes(1, 1, torch.bfloat16)
"""Of an element that 16 bits cannot say, with combine "fixed"; how many there are depends on data."""


@dataclass(frozen=True, kw_only=True)
class WireRows:
    """Bytes of one row in each stage; with the flat dispatcher, whose stages are two, the others
    are 0. A row is a (token, node) in exchanges and a (token, rank) elsewhere and with flat."""

    dispatch_exchange: int
    dispatch_scatter: int
    combine_reduce: int
    combine_exchange: int


@dataclass(frozen=True, kw_only=True)
class Wire:
    """How rows look on the wire: `BaseDispatcher`'s options and the sizes that matter.

    num_slots: of all ranks. dtype: the model's, a name in torch. Raises ValueError for codecs that
    do not exist and sizes below 1.
    """

    hidden: int
    num_topk: int
    num_slots: int
    dtype: str = "bfloat16"
    dispatcher: Backend = "hierarchical"
    dispatch_dtype: WireDtype = "bfloat16"
    combine: CombineMode = "node"
    combine_dtype: WireDtype = "bfloat16"

    def __post_init__(self) -> None:
        if min(self.hidden, self.num_topk, self.num_slots) < 1:
            raise ValueError(
                f"hidden({self.hidden}), num_topk({self.num_topk}) and num_slots({self.num_slots}) "
                "must be >= 1"
            )
        assert self.row_bytes  # what it is made of must exist

    @property
    def is_flat(self) -> bool:
        return self.dispatcher == "flat"

    @cached_property
    def row_bytes(self) -> int:
        """Of a packed token: payload, slots, weights, and what combine and dispatcher add."""
        return WireFormat(
            hidden=self.hidden,
            num_topk=self.num_topk,
            dtype=self._dtype,
            codec=self.dispatch_dtype,
            num_slots=self.num_slots,
            with_range=self.combine == "fixed",
            with_address=not self.is_flat,
        ).row_bytes

    @cached_property
    def partial_bytes(self) -> int:
        """Of a rank's sum for one token, or, with combine "exact", of one (token, k)."""
        if self.combine == "exact":
            return self.hidden * self._dtype.itemsize
        if self.combine == "fixed":
            fixed = FixedReduction(self.hidden, self._dtype)
            return fixed.partial_columns * fixed.partial_dtype.itemsize
        return self.hidden * NodeReduction.partial_dtype.itemsize

    @cached_property
    def sum_bytes(self) -> int:
        """Of a node's sum for one token, or, with combine "exact", of one (token, k); without what a
        message of combine "fixed" has once (see `sums_message_bytes`)."""
        if self.combine == "exact":
            return self.hidden * self._dtype.itemsize
        if self.combine == "fixed":
            two, one = (sums_bytes(2 * n, self.hidden, self._dtype) for n in (2, 1))
            return (two - one) // 2
        reduction = NodeReduction(self.hidden, self._dtype, self.combine_dtype)
        return reduction.encode(torch.zeros(1, self.hidden)).numel()

    @property
    def rows(self) -> WireRows:
        """Raises ValueError for combine "exact", whose way back is counted in (token, k)."""
        if self.combine == "exact":
            raise ValueError('combine "exact" returns a row per (token, k): see `link_bytes`')
        if self.is_flat:
            return WireRows(
                dispatch_exchange=self.row_bytes,
                dispatch_scatter=0,
                combine_reduce=0,
                combine_exchange=self.partial_bytes,
            )
        return WireRows(
            dispatch_exchange=self.row_bytes,
            dispatch_scatter=self.row_bytes,
            combine_reduce=self.partial_bytes,
            combine_exchange=self.sum_bytes,
        )

    def sums_message_bytes(self, rows_RR: IntArray) -> IntArray:
        """Of messages with so many node sums each."""
        if self.combine != "fixed":
            return rows_RR * self.sum_bytes
        counts = rows_RR.ravel().tolist()
        lengths = [sums_bytes(n, self.hidden, self._dtype) if n else 0 for n in counts]
        return np.array(lengths, dtype=np.int64).reshape(rows_RR.shape)

    @property
    def _dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype must be the name of a torch dtype, got {self.dtype!r}")
        return dtype
