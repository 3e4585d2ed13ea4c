"""Which row goes where, and where it comes back: pure functions of the chosen destinations.

Legend: R rows, K top-k, D destinations (ranks or nodes), P pairs, H hidden, V some of the rows.

Two kinds of traffic: *rows* go once to every destination that any of their K entries names; *pairs*
are single (row, k) entries. Both are ordered by destination first and row-major within it, so every
position is a prefix sum over the entries and nothing depends on arrival.

All of it is numpy's: indices of a few rows, where a call of torch costs more than the work.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Indices = NDArray[np.int64]

_TILE = 512 * 1024  # elements worked on at once, as in `comms/codecs.py`


@dataclass(frozen=True, kw_only=True)
class RowRoute:
    """`parts`: the indices of the rows that each destination gets, ascending, none twice."""

    parts: list[Indices]

    @property
    def counts(self) -> list[int]:
        return [len(rows) for rows in self.parts]

    def messages(self, rows: NDArray[Any]) -> list[Tensor]:
        """The bytes for every destination, flat. `rows` are all that there are."""
        return [message_of(rows, part) for part in self.parts]

    def of_chunks(self, chunks: Iterable[NDArray[Any]]) -> Iterator[list[Tensor]]:
        """All rows, given chunk by chunk: per chunk the bytes for every destination, flat."""
        lo = 0
        for rows in chunks:
            hi = lo + len(rows)
            cuts = [part.searchsorted((lo, hi)) for part in self.parts]
            yield [
                message_of(rows, part[a:b] - lo)
                for part, (a, b) in zip(self.parts, cuts, strict=True)
            ]
            lo = hi


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Which row each pair adds to, and with which weight; of one row's pairs, the first k first."""

    rows_P: Indices
    weights_P: NDArray[np.float32]
    num_rows: int
    num_topk: int

    @classmethod
    def of(
        cls, local_RK: Indices, weights_RK: NDArray[np.float32], rows_R: Indices | None = None
    ) -> "Pairs":
        """The valid (>= 0) entries, row by row, where row r adds to row rows_R[r] (None: to r)."""
        num_rows, num_topk = local_RK.shape
        rows_P, ks_P = (local_RK >= 0).nonzero()
        return cls(
            rows_P=rows_P if rows_R is None else rows_R[rows_P],
            weights_P=weights_RK[rows_P, ks_P],
            num_rows=num_rows,
            num_topk=num_topk,
        )

    def __len__(self) -> int:
        return len(self.rows_P)

    def tiles(self, hidden: int) -> Iterator[slice]:
        """Of the pairs, so many at once that their rows stay in the cache."""
        step = max(1, _TILE // hidden)
        for start in range(0, len(self), step):
            yield slice(start, min(start + step, len(self)))


def route_rows(destinations_RK: Indices, num_destinations: int) -> RowRoute:
    ids_D = np.arange(num_destinations)
    chosen_DR = (destinations_RK == ids_D[:, None, None]).any(axis=2)
    return RowRoute(parts=[chosen_R.nonzero()[0] for chosen_R in chosen_DR])


def pairs_by_row(destinations_RK: Indices) -> Indices:
    """For every pair (entry >= 0), row by row, where it is among them by (destination, row, k)."""
    valid_P = destinations_RK[destinations_RK >= 0]
    return inverse(valid_P.argsort(kind="stable"))


def inverse(order_R: Indices) -> Indices:
    """Where each row goes, of an order that says which row comes where."""
    places_R = np.empty_like(order_R)
    places_R[order_R] = np.arange(len(order_R))
    return places_R


def sums_of_segments(counts_R: Indices, rows_per_segment: Sequence[int]) -> list[int]:
    """The sums of so many counts each, one segment after the other."""
    ends = np.cumsum(rows_per_segment)[:-1]
    return [int(counts.sum()) for counts in np.split(counts_R, ends)]


def joined_rows(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Rows one after the other; the part itself where there is only one."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def message_of(rows: NDArray[Any], indices: Indices) -> Tensor:
    """Some rows, ascending and none twice, as flat bytes; the memory of `rows` where it is all."""
    taken = rows if len(indices) == len(rows) else rows.take(indices, axis=0)
    return torch.from_numpy(taken.reshape(-1).view(np.uint8))


def weighted_sum(y_PH: Tensor, pairs: Pairs) -> Tensor:
    """fp32 sum_RH of weight * y over the pairs of each row, in their order."""
    hidden = y_PH.shape[1]
    total_RH = torch.zeros((pairs.num_rows, hidden))
    rows_P, weights_P = torch.from_numpy(pairs.rows_P), torch.from_numpy(pairs.weights_P)
    for tile in pairs.tiles(hidden):
        terms_VH = y_PH[tile].to(torch.float32, copy=True).mul_(weights_P[tile, None])
        total_RH.index_add_(0, rows_P[tile], terms_VH)
    return total_RH


def sum_parts(
    parts: Sequence[Tensor], rows: Sequence[Indices], num_rows: int, hidden: int
) -> Tensor:
    """sum_RH of one part per destination, added in destination order, in the dtype of the parts.

    parts[d] holds the rows rows[d] of the result.
    """
    total_RH = torch.zeros((num_rows, hidden), dtype=parts[0].dtype)
    for part_VH, rows_V in zip(parts, rows, strict=True):
        total_RH.index_add_(0, torch.from_numpy(rows_V), part_VH)
    return total_RH
