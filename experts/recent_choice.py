"""The choice among copies in small steps: by what recent steps counted together.

E logical experts, N nodes, T my tokens, K experts per token.
"""

import torch
from torch import Tensor

from comms.counts import CountExchange
from router.odds import CopyOdds
from router.placement import IntArray
from router.split import LayerSplit


class RecentChoice:
    """One layer's. Ranks deal tokens out in the proportions in which the division of recent counts
    would; each exchange halves the weight of older counts. Collective where an exchange is due."""

    def __init__(self, exchange: CountExchange, source_rank: int) -> None:
        self._exchange, self._source_rank = exchange, source_rank
        self._uncounted_E: IntArray | int = 0
        self._recent_NE: IntArray | None = None
        self._odds: CopyOdds | None = None
        self._split: LayerSplit | None = None

    def choose(self, ids_TK: Tensor, mine_E: IntArray, split: LayerSplit, due: bool) -> Tensor:
        """slots_TK; mine_E: how often each expert is in ids_TK. Static until anything was counted."""
        self._uncounted_E = self._uncounted_E + mine_E
        if due:
            self.remember(self._exchange(self._uncounted_E).nodes_NE)
        if self._recent_NE is None:
            return split.layer.choose_slots(ids_TK, self._source_rank)
        if self._odds is None or self._split is not split:
            self._odds, self._split = self._odds_of(split, self._recent_NE), split
        return torch.from_numpy(self._odds.choose(ids_TK.numpy()))

    def remember(self, nodes_NE: IntArray) -> None:
        """Counts of all ranks since the last."""
        before = 0 if self._recent_NE is None else self._recent_NE // 2
        self._recent_NE, self._uncounted_E, self._odds = nodes_NE + before, 0, None

    def _odds_of(self, split: LayerSplit, recent_NE: IntArray) -> CopyOdds:
        groups, layer = self._exchange.groups, split.layer
        usual_E = layer.choose_slots(torch.arange(layer.num_experts), self._source_rank).numpy()
        quotas_EC = split.divide(recent_NE)[groups.topology.node_of(groups.rank)]
        return CopyOdds(quotas_EC, usual_E, layer, turn=groups.rank)
