"""Which copy of an expert each token goes to: by a fixed table, or so that the batch comes out even.

T my tokens, K experts per token, N nodes, E logical experts, C copies.
"""

from typing import Literal, Protocol

import torch
from torch import Tensor

from comms.base import BaseDispatcher
from comms.counts import CountExchange
from router.placement import LayerPlacement
from router.slots import choose_by_share, share_of_rank
from router.split import LayerSplit

SplitMode = Literal["auto", "static", "balanced", "activated"]

# Of a CPU: two small exchanges and the division; what a rank computes; and the part of that for which
# ranks otherwise wait for the one with the most.
_EXCHANGE_S = 0.7e-3
_FLOP_PER_S = 50e9
_SAVED = 0.2


class Balance:
    """What the balanced choices of all layers share: the exchange of counts, and when to use it.

    auto: in steps in which it takes less time than it saves, by the floating-point operations of a
    token's experts; balanced and activated: in all.
    """

    def __init__(self, exchange: CountExchange, mode: SplitMode, token_flop: float) -> None:
        self.exchange, self.mode = exchange, mode
        links = exchange.groups.links
        cost_s = _EXCHANGE_S + (links.latency_s if links else 0.0)
        self._least_tokens = cost_s / _SAVED * _FLOP_PER_S / max(1.0, token_flop)
        self.expect(None)

    def expect(self, max_tokens: int | None) -> None:
        """No rank has more tokens in the coming step (None: unknown), the same on every rank."""
        is_large = max_tokens is not None and max_tokens >= self._least_tokens
        self.applies = is_large or self.mode != "auto"


def make_balance(mode: SplitMode, dispatcher: BaseDispatcher, token_flop: float) -> Balance | None:
    """None where all layers choose statically: in mode static, and in auto with combine "node".

    Raises ValueError for the other modes with "node", whose sums depend on the choice.
    """
    if mode == "static" or (mode == "auto" and dispatcher.combine_mode == "node"):
        return None
    if dispatcher.combine_mode == "node":
        raise ValueError(
            f'split "{mode}" needs combine "fixed" or "exact": with "node" the batch would decide '
            "where sums are rounded"
        )
    return Balance(CountExchange(dispatcher), mode, token_flop)


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
    """The batch's own counts decide: ranks end up as even as the copies allow, in tokens or (mode
    activated) in experts that have any.

    Where no expert has copies on two ranks, or the step is too small, it is the static choice; all
    ranks see both alike. The split follows whatever placement it is given.
    """

    def __init__(self, balance: Balance, static: StaticChoice) -> None:
        self._balance, self._static = balance, static
        self._split: LayerSplit | None = None
        self._next: LayerSplit | None = None

    def choose(self, ids_TK: Tensor, counts_E: Tensor, layer: LayerPlacement) -> Tensor:
        split = self._split_of(layer)
        if not (self._balance.applies and split.has_choice):
            return self._static.choose(ids_TK, counts_E, layer)
        groups, mine_E = self._balance.exchange.groups, counts_E.numpy()
        ranks_ME, nodes_NE = self._balance.exchange(mine_E)
        by_experts = self._balance.mode == "activated"
        quotas_NEC = split.divide_experts(nodes_NE) if by_experts else split.divide(nodes_NE)
        share_EC = share_of_rank(
            quotas_NEC[groups.topology.node_of(groups.rank)],
            before_E=ranks_ME[: groups.node.idx].sum(axis=0),
            counts_E=mine_E,
        )
        return torch.from_numpy(choose_by_share(ids_TK.numpy(), share_EC, layer))

    def prepare(self, layer: LayerPlacement) -> None:
        self._static.prepare(layer)
        self._next = LayerSplit(layer)

    def _split_of(self, layer: LayerPlacement) -> LayerSplit:
        for split in (self._split, self._next):
            if split is not None and split.layer is layer:
                self._split = split
                return split
        self._split = LayerSplit(layer)
        return self._split
