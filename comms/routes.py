"""Which row goes where, and where it comes back: pure functions of the chosen destinations.

Legend: R rows, K top-k, D destinations (ranks or nodes), P pairs, H hidden.

Two kinds of traffic: *rows* go once to every destination that any of their K entries names; *pairs*
are single (row, k) entries. Both are ordered by destination first and row-major within it, so every
position is a prefix sum over the entries and nothing depends on arrival.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from comms.sizes import offsets_of

_FEW_ELEMENTS = 1 << 18  # up to here a handful of operations on all entries beats many on the valid


@dataclass(frozen=True, kw_only=True)
class RowRoute:
    """Rows ordered by (destination, row): `rows` are their indices, `counts` how many each gets."""

    rows: Tensor
    counts: list[int]

    @cached_property
    def parts(self) -> list[Tensor]:
        """Row indices per destination, ascending; no index twice in one part."""
        return list(torch.split(self.rows, self.counts))

    def of_chunks(self, chunks: Iterable[Tensor]) -> Iterator[list[Tensor]]:
        """All rows, given chunk by chunk: per chunk the bytes for every destination, flat."""
        lo = 0
        for rows in chunks:
            ends = torch.tensor([lo, lo + len(rows)])
            cuts = [torch.searchsorted(part, ends).tolist() for part in self.parts]
            yield [
                rows[part[a:b] - lo].reshape(-1)
                for part, (a, b) in zip(self.parts, cuts, strict=True)
            ]
            lo += len(rows)


@dataclass(frozen=True, kw_only=True)
class PairRoute:
    """Pairs ordered by (destination, row, k): their position (-1 = no pair) and their counts."""

    positions_RK: Tensor
    counts: list[int]


def route_rows(destinations_RK: Tensor, num_destinations: int) -> RowRoute:
    ids_D = torch.arange(num_destinations)
    chosen_DR = (destinations_RK[None] == ids_D[:, None, None]).any(dim=2)
    return RowRoute(rows=chosen_DR.nonzero()[:, 1], counts=chosen_DR.sum(dim=1).tolist())


def route_pairs(destinations_RK: Tensor, num_destinations: int) -> PairRoute:
    flat = destinations_RK.reshape(-1)
    valid = (flat >= 0).nonzero()[:, 0]
    order = torch.sort(flat[valid], stable=True).indices
    positions = torch.full_like(flat, -1)
    positions[valid[order]] = torch.arange(valid.shape[0])
    counts = torch.bincount(flat[valid], minlength=num_destinations).tolist()
    return PairRoute(positions_RK=positions.view(destinations_RK.shape), counts=counts)


def pair_positions(local_RK: Tensor) -> Tensor:
    """The position of each valid (>= 0) entry among all valid ones, row-major; -1 elsewhere."""
    valid = local_RK.reshape(-1) >= 0
    return torch.where(valid, valid.cumsum(0) - 1, -1).view(local_RK.shape)


def pairs_in_row_order(positions_RK: Tensor) -> Tensor:
    """The positions of all pairs, row-major."""
    flat = positions_RK.reshape(-1)
    return flat[flat >= 0]


def pairs_per_segment(local_RK: Tensor, rows_per_segment: Sequence[int]) -> list[int]:
    """How many valid entries each of the consecutive segments of rows has."""
    per_row = (local_RK >= 0).sum(dim=1)
    ends = torch.cat([per_row.new_zeros(1), per_row.cumsum(0)])
    cuts = ends[torch.tensor(offsets_of(rows_per_segment))]
    counts: list[int] = (cuts[1:] - cuts[:-1]).tolist()
    return counts


def weighted_sum(y_PH: Tensor, positions_RK: Tensor, weights_RK: Tensor) -> Tensor:
    """fp32 sum_RH of weight * y over the K entries of each row, added in top-k order."""
    rows, num_topk = positions_RK.shape
    total_RH = torch.zeros((rows, y_PH.shape[1]), dtype=torch.float32)
    if positions_RK.numel() * y_PH.shape[1] <= _FEW_ELEMENTS and len(y_PH):
        missing_RK1 = (positions_RK < 0)[:, :, None]
        terms_RKH = y_PH[positions_RK.clamp(min=0)].float().mul_(weights_RK[:, :, None])
        for term_RH in terms_RKH.masked_fill_(missing_RK1, 0).unbind(1):
            total_RH += term_RH
        return total_RH
    for k in range(num_topk):
        valid = (positions_RK[:, k] >= 0).nonzero()[:, 0]
        part_VH = y_PH[positions_RK[valid, k]].float() * weights_RK[valid, k, None]
        total_RH.index_add_(0, valid, part_VH)
    return total_RH


def sum_parts(
    parts: Sequence[Tensor], rows: Sequence[Tensor], num_rows: int, hidden: int
) -> Tensor:
    """sum_RH of one part per destination, added in destination order, in the dtype of the parts.

    parts[d] holds the rows rows[d] of the result.
    """
    total_RH = torch.zeros((num_rows, hidden), dtype=parts[0].dtype)
    for part_VH, rows_V in zip(parts, rows, strict=True):
        total_RH.index_add_(0, rows_V, part_VH)
    return total_RH
