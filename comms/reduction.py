"""How the weighted outputs of one token's experts become one row: the arithmetic of combine.

Legend: R received rows, V rows on a rail, T my tokens, H hidden, K top-k, P pairs.

A reduction turns a rank's outputs into *partials*, adds the partials of a node's ranks, writes such
node sums as bytes and reads them, and adds the nodes up. Dispatchers only move what it gives them.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from comms.codecs import CODECS
from comms.fixed import add_rows, fixed_sum, pack_sums, to_floats, unpack_sums
from comms.routes import Indices, Pairs, sum_parts, weighted_sum


class Reduction(Protocol):
    """A partial is a row of `partial_columns` elements of `partial_dtype`."""

    partial_dtype: torch.dtype
    partial_columns: int

    def partial(self, y_PH: Tensor, pairs: Pairs, range_R: Tensor | None) -> Tensor:
        """Partials [R, columns]: what one rank's experts add to each row."""

    def node_sum(self, parts: Sequence[Tensor], rows: Sequence[Indices], num_rows: int) -> Tensor:
        """[V, columns]: the partials of a node's ranks, added in rank order."""

    def encode(self, sum_VH: Tensor) -> Tensor:
        """Node sums as they cross the network: flat uint8."""

    def decode(self, message: Tensor, num_rows: int) -> Tensor:
        """Node sums as they arrive: [V, columns]."""

    def total(
        self, sums: Sequence[Tensor], rows: Sequence[Indices], range_T: Tensor | None, num_rows: int
    ) -> Tensor:
        """out_TH in the model's dtype: decoded node sums, added in node order."""

    def total_of_one(self, sum_TH: Tensor, range_T: Tensor | None) -> Tensor:
        """What `total` makes of the one sum of a single node, encoded and decoded."""


class NodeReduction:
    """fp32 sums in fixed order; each node's sum is rounded once, by the codec that carries it.

    The origin's own node is rounded like the others, so the result does not depend on which rank a
    token lives on. It does depend on which experts share a node.
    """

    partial_dtype = torch.float32

    def __init__(self, hidden: int, dtype: torch.dtype, codec: str) -> None:
        self.partial_columns = hidden
        self._hidden, self._dtype, self._codec = hidden, dtype, CODECS[codec]
        # A lossy codec rounds once, from and to fp32; the plain one rounds to the model's dtype.
        self._wire_dtype = dtype if codec == "bfloat16" else torch.float32

    def partial(self, y_PH: Tensor, pairs: Pairs, range_R: Tensor | None) -> Tensor:
        return weighted_sum(y_PH, pairs)

    def node_sum(self, parts: Sequence[Tensor], rows: Sequence[Indices], num_rows: int) -> Tensor:
        return sum_parts(parts, rows, num_rows, self._hidden)

    def encode(self, sum_VH: Tensor) -> Tensor:
        return self._codec.encode(sum_VH.to(self._wire_dtype)).reshape(-1)

    def decode(self, message: Tensor, num_rows: int) -> Tensor:
        rows = message.view(num_rows, self._codec.row_bytes(self._hidden, self._wire_dtype))
        return self._codec.decode(rows, self._hidden, self._wire_dtype).float()

    def total(
        self, sums: Sequence[Tensor], rows: Sequence[Indices], range_T: Tensor | None, num_rows: int
    ) -> Tensor:
        return sum_parts(sums, rows, num_rows, self._hidden).to(self._dtype)

    def total_of_one(self, sum_TH: Tensor, range_T: Tensor | None) -> Tensor:
        return self.decode(self.encode(sum_TH), len(sum_TH)).to(self._dtype)


class FixedReduction:
    """Integers on each token's grid: the same bits wherever the experts are. See `fixed.py`."""

    partial_dtype = torch.int32

    def __init__(self, hidden: int, dtype: torch.dtype) -> None:
        self.partial_columns = hidden + 1
        self._hidden, self._dtype = hidden, dtype

    def partial(self, y_PH: Tensor, pairs: Pairs, range_R: Tensor | None) -> Tensor:
        assert range_R is not None, "checked when the tokens were dispatched"
        return fixed_sum(y_PH, pairs, range_R)

    def node_sum(self, parts: Sequence[Tensor], rows: Sequence[Indices], num_rows: int) -> Tensor:
        total_VC = torch.zeros((num_rows, self.partial_columns), dtype=torch.int32)
        for part_RC, rows_R in zip(parts, rows, strict=True):
            add_rows(total_VC, part_RC, rows_R)
        return total_VC

    def encode(self, sum_VH: Tensor) -> Tensor:
        return pack_sums(sum_VH, self._dtype) if len(sum_VH) else sum_VH.view(torch.uint8)[:, 0]

    def decode(self, message: Tensor, num_rows: int) -> Tensor:
        if num_rows == 0:
            return torch.zeros((0, self.partial_columns), dtype=torch.int32)
        return unpack_sums(message, num_rows, self._hidden)

    def total(
        self, sums: Sequence[Tensor], rows: Sequence[Indices], range_T: Tensor | None, num_rows: int
    ) -> Tensor:
        assert range_T is not None, "checked when the tokens were dispatched"
        return to_floats(self.node_sum(sums, rows, num_rows), range_T, self._dtype)

    def total_of_one(self, sum_TH: Tensor, range_T: Tensor | None) -> Tensor:
        assert range_T is not None, "checked when the tokens were dispatched"
        return to_floats(sum_TH, range_T, self._dtype)
