"""Which row goes where, and where it comes back: pure functions of the chosen destinations.

Legend: R rows, K top-k, D destinations (ranks or nodes), P pairs, H hidden.

Two kinds of traffic: *rows* go once to every destination that any of their K entries names; *pairs*
are single (row, k) entries. Both are ordered by destination first and row-major within it, so every
position is a prefix sum over the entries and nothing depends on arrival.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from comms.sizes import offsets_of


@dataclass(frozen=True, kw_only=True)
class RowRoute:
    """Rows ordered by (destination, row): `rows` are their indices, `counts` how many each gets."""

    rows: Tensor
    counts: list[int]

    @cached_property
    def parts(self) -> list[Tensor]:
        """Row indices per destination; no index twice in one part."""
        return list(torch.split(self.rows, self.counts))


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


def pairs_in_row_order(positions_RK: Tensor) -> Tensor:
    """The positions of all pairs, row-major."""
    flat = positions_RK.reshape(-1)
    return flat[flat >= 0]


def pairs_per_source(local_RK: Tensor, rows_per_source: list[int]) -> list[int]:
    """How many valid entries the rows of each source have."""
    per_row = (local_RK >= 0).sum(dim=1)
    ends = torch.cat([per_row.new_zeros(1), per_row.cumsum(0)])
    cuts = ends[torch.tensor(offsets_of(rows_per_source))]
    counts: list[int] = (cuts[1:] - cuts[:-1]).tolist()
    return counts


def weighted_sum(y_PH: Tensor, positions_RK: Tensor, weights_RK: Tensor) -> Tensor:
    """fp32 sum_RH of weight * y over the K entries of each row, added in top-k order."""
    rows, num_topk = positions_RK.shape
    total_RH = torch.zeros((rows, y_PH.shape[1]), dtype=torch.float32)
    for k in range(num_topk):
        valid = (positions_RK[:, k] >= 0).nonzero()[:, 0]
        part_VH = y_PH[positions_RK[valid, k]].float() * weights_RK[valid, k, None]
        total_RH.index_add_(0, valid, part_VH)
    return total_RH


def sum_parts(parts: list[Tensor], rows: list[Tensor], num_rows: int, hidden: int) -> Tensor:
    """fp32 sum_RH of one part per destination, added in destination order.

    parts[d] holds the rows rows[d] of the result.
    """
    total_RH = torch.zeros((num_rows, hidden), dtype=torch.float32)
    for part_VH, rows_V in zip(parts, rows, strict=True):
        total_RH.index_add_(0, rows_V, part_VH.float())
    return total_RH
