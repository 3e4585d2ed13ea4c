"""Which copies a token's experts should be, so that it visits few nodes and ranks stay even.

A token crosses to each node once, whatever it needs there. So every token first prefers copies on
its own node, then on nodes it must visit anyway, then on the node that has most of what is missing.
What all prefer can be too much for some ranks. Ranks therefore tell each other how many tokens they
would send to each slot; from that, every rank finds the same quotas, for which few tokens have to
use another copy than they prefer, and lets those change that lose least by it.

T my tokens, K experts per token, P pairs of them, N nodes, E logical experts, C copies of an expert,
S slots of all ranks, X sources: nodes, or the ranks of one node.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from router.placement import IntArray, LayerPlacement

_MAX_NODES = 62  # sets of nodes are bits of an int64
_OWN = 1 << 20  # visits to its own node that a token never loses


class NodeChoice:
    """One layer's copies, prepared for many batches. Pure and in integers: ranks agree on results.

    `prefer` my tokens -> exchange how many go to each slot -> `relieve` the ranks that get too many
    -> `share` what my node, then my rank has to change -> `change` some of my tokens' slots.
    Raises ValueError for more nodes than it can name.
    """

    def __init__(self, layer: LayerPlacement) -> None:
        if layer.num_nodes > _MAX_NODES:
            raise ValueError(f"num_nodes({layer.num_nodes}) must be at most {_MAX_NODES}")
        self.layer = layer
        slots_EC = layer.logical_to_physical
        self._node_EC = np.where(slots_EC >= 0, slots_EC // layer.slots_per_node, layer.num_nodes)
        self._bits_EC = np.append(1 << np.arange(layer.num_nodes), 0)[self._node_EC]
        # The last row is what id -1 finds.
        self._nodes_E = np.append(np.bitwise_or.reduce(self._bits_EC, axis=1), 0)
        alone_E = self._nodes_E & (self._nodes_E - 1) == 0
        self._alone_E = np.where(alone_E, self._nodes_E, 0)
        self._first_E = np.append(slots_EC[:, 0], -1)
        self._several_E = np.append((slots_EC >= 0).sum(axis=1) > 1, False)
        self._expert_S = np.full(layer.num_slots, -1, dtype=np.int64)
        experts, copies = np.nonzero(slots_EC >= 0)
        self._expert_S[slots_EC[experts, copies]] = experts
        self._others: dict[int, list[int]] = {
            int(slot): [int(s) for s in slots_EC[e] if s >= 0 and s != slot]
            for e in np.flatnonzero(self._several_E)
            for slot in slots_EC[e][slots_EC[e] >= 0]
        }

    @property
    def has_choice(self) -> bool:
        """Whether any expert has several copies."""
        return bool(self._several_E.any())

    def prefer(self, ids_TK: IntArray, node: int) -> IntArray:
        """slots_TK of tokens that start on `node`, -1 for id -1.

        Each token visits the fewest nodes it can where there are up to four (after the nodes that
        it must visit, one or two are left to choose from, or any two do); with more, greedily few.
        """
        visited_T = self._visited(ids_TK, node)
        slots_P, ids_P = self._first_E[ids_TK.ravel()], ids_TK.ravel()
        pairs = np.flatnonzero(self._several_E[ids_P])
        bits_PC = self._bits_EC[ids_P[pairs]]
        reached_PC = (bits_PC & visited_T[pairs // ids_TK.shape[1], None]) != 0
        best_P = (2 * (bits_PC == 1 << node) + reached_PC).argmax(axis=1)
        slots_P[pairs] = self.layer.logical_to_physical[ids_P[pairs], best_P]
        return slots_P.reshape(ids_TK.shape)

    def _visited(self, ids_TK: IntArray, node: int) -> IntArray:
        """[T] bits of the nodes that each token visits, its own among them."""
        visited_T: IntArray = np.bitwise_or.reduce(self._alone_E[ids_TK], axis=1) | 1 << node
        nodes_TK = self._nodes_E[ids_TK]
        each_N = np.arange(self.layer.num_nodes)
        missing_TK = np.where(nodes_TK & visited_T[:, None], 0, nodes_TK)
        tokens = np.flatnonzero(missing_TK.any(axis=1))
        while len(tokens):
            missing_UK = missing_TK[tokens]
            useful_UN = (missing_UK[:, :, None] >> each_N & 1).sum(axis=1)
            visited_T[tokens] |= 1 << useful_UN.argmax(axis=1)
            missing_TK[tokens] = np.where(missing_UK & visited_T[tokens, None], 0, missing_UK)
            tokens = tokens[missing_TK[tokens].any(axis=1)]
        return visited_T

    def relieve(self, preferred_S: IntArray, slack: float = 0.0) -> IntArray:
        """How many tokens each slot gets instead: no rank more than `level`, each expert as before.

        level: the mean over ranks * (1 + slack), or what the copies allow at best where that is
        more. Tokens move along shortest chains of copies, so that few have to.
        """
        counts, num_ranks = preferred_S.tolist(), self.layer.num_ranks
        load = preferred_S.reshape(num_ranks, -1).sum(axis=1).tolist()
        level = max(-(-sum(load) // num_ranks), int(sum(load) / num_ranks * (1.0 + slack)))
        for rank in range(num_ranks):
            while load[rank] > level:
                chain, reached = self._chain(rank, counts, load, level)
                if not chain:  # what these ranks have, only they can have
                    level = -(-sum([load[r] for r in reached]) // len(reached))
                    continue
                end = chain[0][1] // self.layer.slots_per_rank
                amount = min(
                    load[rank] - level, level - load[end], *[counts[slot] for slot, _ in chain]
                )
                for slot, other in chain:
                    counts[slot] -= amount
                    counts[other] += amount
                load[rank] -= amount
                load[end] += amount
        return np.array(counts, dtype=np.int64)

    def _chain(
        self, start: int, counts: list[int], load: list[int], level: int
    ) -> tuple[list[tuple[int, int]], list[int]]:
        """Changes (from slot, to slot) that lead to the nearest rank with room, last one first;
        and the ranks that were reached."""
        per_rank = self.layer.slots_per_rank
        entered: dict[int, tuple[int, int]] = {}
        reached = [start]
        for rank in reached:
            for slot in range(rank * per_rank, (rank + 1) * per_rank):
                if not counts[slot]:
                    continue
                for other in self._others.get(slot, ()):
                    end = other // per_rank
                    if end == start or end in entered:
                        continue
                    entered[end] = (slot, other)
                    reached.append(end)
                    if load[end] < level:
                        chain = [entered[end]]
                        while (before := chain[-1][0] // per_rank) != start:
                            chain.append(entered[before])
                        return chain, reached
        return [], reached

    def share(self, preferred_XS: IntArray, quota_S: IntArray) -> IntArray:
        """[X, S]: what each source sends to each slot, so that together they send the quota.

        Each gives up a part in proportion to what it prefers there, and takes its part of what is
        open elsewhere. preferred and quota have the same number of tokens for each expert.
        """
        preferred_S = preferred_XS.sum(axis=0)
        leaving_S = np.maximum(preferred_S - quota_S, 0)
        until_XS = np.cumsum(preferred_XS, axis=0)
        gone_XS = until_XS * leaving_S // np.maximum(preferred_S, 1)
        share_XS: IntArray = preferred_XS - np.diff(gone_XS, axis=0, prepend=0)
        arriving_S = np.maximum(quota_S - preferred_S, 0)
        for expert in np.unique(self._expert_S[arriving_S > 0]):
            slots = np.flatnonzero(self._expert_S == expert)
            left_X = preferred_XS[:, slots].sum(axis=1) - share_XS[:, slots].sum(axis=1)
            share_XS[:, slots] += _overlaps(left_X, arriving_S[slots])
        return share_XS

    def change(
        self, ids_TK: IntArray, slots_TK: IntArray, share_S: IntArray, node: int
    ) -> IntArray:
        """slots_TK again, where as many tokens as share_S says use each slot.

        Those change that visit the other node anyway, or the one they leave for nothing else.
        """
        slots_TK = slots_TK.copy()
        visits_TN = np.zeros((len(ids_TK), self.layer.num_nodes), dtype=np.int64)
        tokens, places = np.nonzero(slots_TK >= 0)
        np.add.at(visits_TN, (tokens, slots_TK[tokens, places] // self.layer.slots_per_node), 1)
        visits_TN[:, node] += _OWN
        for slot, other, amount in self._changes(slots_TK, share_S):
            here, there = slot // self.layer.slots_per_node, other // self.layer.slots_per_node
            tokens, places = np.nonzero(slots_TK == slot)
            loss_P = (visits_TN[tokens, there] == 0) * 1 - (visits_TN[tokens, here] == 1)
            chosen = np.argsort(loss_P, kind="stable")[:amount]
            slots_TK[tokens[chosen], places[chosen]] = other
            visits_TN[tokens[chosen], here] -= 1
            visits_TN[tokens[chosen], there] += 1
        return slots_TK

    def _changes(self, slots_TK: IntArray, share_S: IntArray) -> Iterator[tuple[int, int, int]]:
        """(slot, other slot of its expert, tokens that change from one to the other)."""
        mine_S = np.bincount(slots_TK[slots_TK >= 0], minlength=len(share_S))
        over_S = mine_S - share_S
        for expert in np.unique(self._expert_S[over_S > 0]):
            slots = np.flatnonzero(self._expert_S == expert)
            amounts = _overlaps(np.maximum(over_S[slots], 0), np.maximum(-over_S[slots], 0))
            for i, j in np.argwhere(amounts):
                yield int(slots[i]), int(slots[j]), int(amounts[i, j])


def _overlaps(from_A: IntArray, to_B: IntArray) -> IntArray:
    """[A, B]: two ways to cut the same tokens into consecutive parts, and what each two share."""
    until_A1, until_B = np.cumsum(from_A)[:, None], np.cumsum(to_B)
    since = np.maximum(until_A1 - from_A[:, None], until_B - to_B)
    return np.asarray(np.maximum(np.minimum(until_A1, until_B) - since, 0))


def node_sends(layer: LayerPlacement, slots_TK: IntArray, origin_T: IntArray) -> int:
    """To how many nodes other than their own, origin_T, all tokens are sent; slots -1 are none."""
    nodes_TK = np.where(slots_TK >= 0, slots_TK // layer.slots_per_node, origin_T[:, None])
    remote_TK = nodes_TK != origin_T[:, None]
    bits_T = np.bitwise_or.reduce(np.where(remote_TK, 1 << nodes_TK, 0), axis=1)
    return int(np.bitwise_count(bits_T).sum())
