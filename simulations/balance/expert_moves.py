"""Experts that change ranks: how many, how long they take, and how a plan needs fewer.

L layers, R ranks, P slots of a rank, S slots of all ranks.
"""

from __future__ import annotations

import numpy as np

from router.placement import IntArray, Placement, settle
from router.policy import PolicyOptions


def transfer_seconds(
    present: Placement, layer: int, row_S: IntArray, options: PolicyOptions
) -> float:
    """Until all ranks have what they lack for `row_S`, each from the nearest holder, as
    `experts/supply.py` asks them; no rank sends or receives faster than the bandwidth."""
    sent_R, received_R = np.zeros((2, present.num_ranks), dtype=np.int64)
    per_node = present.ranks_per_node or present.num_ranks
    for move in present.with_layers({layer: row_S}).moves_from(present):
        rank = move.slot // present.slots_per_rank
        slots = np.flatnonzero(present.physical_to_logical[layer] == move.expert)
        holders = np.roll(slots, rank) // present.slots_per_rank
        near = holders[holders // per_node == rank // per_node]
        sent_R[(near if len(near) else holders)[0]] += 1
        received_R[rank] += 1
    most = int(max(sent_R.max(), received_R.max()))
    return most * options.bytes_per_expert / options.bandwidth


def arrivals(row_LS: IntArray, before_LS: IntArray, slots_per_rank: int) -> IntArray:
    """[L, R]: slots whose expert their rank did not hold before."""
    shape = (len(row_LS), -1, slots_per_rank)
    row_LRP, before_LRP = row_LS.reshape(shape), before_LS.reshape(shape)
    held_LRP = (row_LRP[..., :, None] == before_LRP[..., None, :]).any(axis=-1)
    return np.asarray((~held_LRP & (row_LRP >= 0)).sum(axis=-1))


def relabelled(row_S: IntArray, before_S: IntArray, slots_per_rank: int) -> IntArray:
    """The same plan for other ranks: pairs of planned and present ranks with most experts in common
    first, then pairs of pairs exchange partners while more experts stay that way."""
    before_RP, row_RP = (r.reshape(-1, slots_per_rank) for r in (before_S, row_S))
    experts = int(max(before_S.max(), row_S.max())) + 2
    has_before, has_planned = np.zeros((2, len(row_RP), experts), dtype=np.int64)
    each = np.arange(len(row_RP))[:, None]
    has_before[each, before_RP] = has_planned[each, row_RP] = 1
    common_RR = (has_before[:, :-1] @ has_planned[:, :-1].T).astype(np.int64)  # -1 went last
    become_R = _greedy_pairs(common_RR)
    while True:
        kept_RR = common_RR[:, become_R]
        own_R = np.diagonal(kept_RR)
        gain_RR = kept_RR + kept_RR.T - own_R[:, None] - own_R
        first, second = divmod(int(gain_RR.argmax()), len(gain_RR))
        if gain_RR[first, second] <= 0:
            break
        become_R[[first, second]] = become_R[[second, first]]
    return settle(before_S, row_RP[become_R].ravel(), slots_per_rank)


def _greedy_pairs(common_RR: IntArray) -> IntArray:
    """[R]: which planned rank each present rank becomes."""
    left_RR = common_RR.copy()
    become_R = np.empty(len(left_RR), dtype=np.int64)
    for _ in left_RR:
        rank, planned = divmod(int(left_RR.argmax()), len(left_RR))
        become_R[rank] = planned
        left_RR[rank], left_RR[:, planned] = -1, -1
    return become_R
