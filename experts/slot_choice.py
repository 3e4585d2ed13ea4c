"""Which copy of an expert each token goes to: by a fixed table, or so that the batch comes out even.

T my tokens, K experts per token, E logical experts.
"""

from typing import Literal, Protocol

import torch
from torch import Tensor

from comms.base import BaseDispatcher
from comms.counts import CountExchange
from router.placement import LayerPlacement
from router.slots import choose_by_share, share_of_rank
from router.split import LayerSplit

SplitMode = Literal["auto", "static", "balanced"]

_SLACK = 0.02  # of the least maximum, spent on tokens that stay on their node


def count_exchange(mode: SplitMode, dispatcher: BaseDispatcher) -> CountExchange | None:
    """What balanced choices need; None: all layers choose statically.

    auto: balanced in steps large enough, where the combine's bits do not depend on the copies;
    balanced: in all steps. Raises ValueError for "balanced" with combine "node".
    """
    if mode == "balanced" and dispatcher.combine_mode == "node":
        raise ValueError(
            'split "balanced" needs combine "fixed" or "exact": with "node" the batch would decide '
            "where sums are rounded"
        )
    if mode == "static" or dispatcher.combine_mode == "node":
        return None
    return CountExchange(dispatcher, always=mode == "balanced")


class SlotChoice(Protocol):
    """One layer's rule. Collective if any rank's is: all ranks call it in the same order."""

    def choose(self, ids_TK: Tensor, counts_E: Tensor, layer: LayerPlacement) -> Tensor:
        """slots_TK int64 for logical expert ids (-1 = none); counts_E: how often each is in them."""


class StaticChoice:
    """The copy depends on the rank alone: ring 1 holds whatever the combine."""

    def __init__(self, source_rank: int) -> None:
        self._source_rank = source_rank

    def choose(self, ids_TK: Tensor, counts_E: Tensor, layer: LayerPlacement) -> Tensor:
        return layer.choose_slots(ids_TK, self._source_rank)


class BalancedChoice:
    """The batch's own counts decide: ranks end up as even as the copies allow.

    Where no expert has copies on two ranks, or the step is too small to be worth the exchange, it is
    the static choice; every rank sees both alike. The split follows the placement it is given.
    """

    def __init__(self, exchange: CountExchange, static: StaticChoice) -> None:
        self._exchange, self._static = exchange, static
        self._split: LayerSplit | None = None

    def choose(self, ids_TK: Tensor, counts_E: Tensor, layer: LayerPlacement) -> Tensor:
        if self._split is None or self._split.layer is not layer:
            self._split = LayerSplit(layer)
        if not self._exchange.pays or not self._split.has_choice:
            return self._static.choose(ids_TK, counts_E, layer)
        groups, mine_E = self._exchange.groups, counts_E.numpy()
        counts = self._exchange(mine_E)
        node = groups.topology.node_of(groups.rank)
        quotas_NEC = self._split.divide(counts.nodes_NE, _SLACK)
        before_E = counts.ranks_ME[: groups.node.idx].sum(axis=0)
        share_EC = share_of_rank(quotas_NEC[node], before_E, mine_E)
        return torch.from_numpy(choose_by_share(ids_TK.numpy(), share_EC, layer))
