"""Which copy of an expert each token goes to: by a fixed table, or so that ranks come out even.

In large steps the batch's own counts decide. In small ones an exchange of counts would cost more than
it brings: ranks count on, exchange now and then, and deal tokens out as these recent counts say.

T my tokens, K experts per token, N nodes, E logical experts, C copies.
"""

from typing import Protocol

import torch
from torch import Tensor

from experts.balance import Balance
from experts.few_nodes import FewNodesChoice
from experts.prepared import Prepared
from experts.recent_choice import RecentChoice
from router.placement import LayerPlacement
from router.slots import choose_by_share, share_of_rank
from router.split import LayerSplit


class SlotChoice(Protocol):
    """One layer's rule. Collective if any rank's is: all ranks call it in the same order."""

    def choose(self, ids_TK: Tensor, counts_E: Tensor, layer: LayerPlacement) -> Tensor:
        """slots_TK int64 for logical expert ids (-1 = none); counts_E: how often each is in them."""

    def prepare(self, layer: LayerPlacement) -> None:
        """Make what `choose` would make when it first meets this placement. From any thread."""


class StaticChoice:
    """The copy depends on the rank alone: ring 1 holds whatever the combine."""

    def __init__(self, source_rank: int) -> None:
        self._source_rank = source_rank

    def choose(self, ids_TK: Tensor, counts_E: Tensor, layer: LayerPlacement) -> Tensor:
        return layer.choose_slots(ids_TK, self._source_rank)

    def prepare(self, layer: LayerPlacement) -> None:
        layer.choose_slots(torch.empty(0, 1, dtype=torch.int64), self._source_rank)


class BalancedChoice:
    """Counts decide, those of the batch or recent ones: ranks end up as even as the copies allow, in
    tokens or (mode activated) in experts that have any.

    Where no expert has copies on two ranks it is the static choice of `source_rank`; all ranks see
    that alike. The split follows whatever placement it is given.
    """

    def __init__(self, balance: Balance, source_rank: int) -> None:
        self._balance, self._static = balance, StaticChoice(source_rank)
        self._recent = RecentChoice(balance.exchange, source_rank)
        self._splits = Prepared(LayerSplit)

    def choose(self, ids_TK: Tensor, counts_E: Tensor, layer: LayerPlacement) -> Tensor:
        split, balance = self._splits.of(layer), self._balance
        if not split.has_choice:
            return self._static.choose(ids_TK, counts_E, layer)
        mine_E = counts_E.numpy()
        if not balance.applies:
            return self._recent.choose(ids_TK, mine_E, split, balance.due)
        groups = balance.exchange.groups
        ranks_ME, nodes_NE = balance.exchange(mine_E)
        self._recent.remember(nodes_NE)
        by_experts = balance.mode == "activated"
        quotas_NEC = split.divide_experts(nodes_NE) if by_experts else split.divide(nodes_NE)
        share_EC = share_of_rank(
            quotas_NEC[groups.topology.node_of(groups.rank)],
            before_E=ranks_ME[: groups.node.idx].sum(axis=0),
            counts_E=mine_E,
        )
        return torch.from_numpy(choose_by_share(ids_TK.numpy(), share_EC, layer))

    def prepare(self, layer: LayerPlacement) -> None:
        self._static.prepare(layer)
        self._splits.prepare(layer)


def make_choice(balance: Balance | None, source_rank: int) -> SlotChoice:
    """One layer's choice. `source_rank` stands for all ranks of a replica: a static choice must not
    depend on which of them happens to own a token in this batch."""
    if balance is None:
        return StaticChoice(source_rank)
    if balance.mode == "nodes":
        return FewNodesChoice(balance.exchange)
    return BalancedChoice(balance, source_rank)
