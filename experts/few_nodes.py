"""The choice among copies for which tokens visit few nodes, with ranks even.

S slots of all ranks, T my tokens, K experts per token.
"""

import numpy as np
import torch
from torch import Tensor

from comms.counts import CountExchange
from experts.prepared import Prepared
from router.placement import LayerPlacement
from router.visits import NodeChoice

_SLACK = 0.02  # of the mean over ranks, spent on tokens that visit one node less


class FewNodesChoice:
    """One layer's SlotChoice: collective over the world wherever an expert has several copies."""

    def __init__(self, exchange: CountExchange) -> None:
        self._exchange = exchange
        self._copies = Prepared(NodeChoice)

    def choose(self, ids_TK: Tensor, counts_E: Tensor, layer: LayerPlacement) -> Tensor:
        copies, groups = self._copies.of(layer), self._exchange.groups
        node = groups.topology.node_of(groups.rank)
        ids = ids_TK.numpy()
        slots_TK = copies.prefer(ids, node)
        if copies.has_choice:
            mine_S = np.bincount(slots_TK[slots_TK >= 0], minlength=layer.num_slots)
            ranks_MS, nodes_NS = self._exchange(mine_S)
            quota_S = copies.relieve(nodes_NS.sum(axis=0), _SLACK)
            of_node_S = copies.share(nodes_NS, quota_S)[node]
            mine_S = copies.share(ranks_MS, of_node_S)[groups.node.idx]
            slots_TK = copies.change(ids, slots_TK, mine_S, node)
        return torch.from_numpy(slots_TK)

    def prepare(self, layer: LayerPlacement) -> None:
        self._copies.prepare(layer)
