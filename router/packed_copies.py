"""One layer's plan where spare slots are too few for the load to be cut exactly: whole copies, packed.

Every spare slot goes to the expert with most load per copy, as in EPLB. Copies then go to ranks, the
heaviest first, each to the rank that is least loaded for its speed and has a slot, and not the expert
already. Afterwards the fullest rank exchanges a copy with another rank, the exchange that leaves the
fuller of the two least full, as long as that helps.

E experts, R ranks, P slots of a rank.
"""

from __future__ import annotations

from heapq import heapify, heapreplace

import numpy as np
from numpy.typing import NDArray

from router.placement import IntArray
from router.ranks import Ranks

FloatArray = NDArray[np.float64]


def packed_copies(load_E: FloatArray, ranks: Ranks) -> list[list[int]]:
    """The experts of each rank; every slot is used if there are ranks enough without the expert."""
    copies_E = _copies(load_E, ranks)
    share_E = load_E / copies_E
    expert_C = np.repeat(np.arange(len(load_E)), copies_E)
    row_RP = np.full((ranks.num_ranks, ranks.slots_per_rank), -1)
    load_R, filled_R = np.zeros(ranks.num_ranks), np.zeros(ranks.num_ranks, dtype=np.int64)
    order = ranks.striped  # so that ties go to other nodes
    for expert in expert_C[np.argsort(-share_E[expert_C], kind="stable")].tolist():
        full_R = (filled_R == ranks.slots_per_rank) | (row_RP == expert).any(axis=1)
        after_R = np.where(full_R, np.inf, (load_R + share_E[expert]) / ranks.speed_R)
        rank = int(order[after_R[order].argmin()])
        if np.isinf(after_R[rank]):
            continue  # only ranks that have it already have room: that slot stays empty
        row_RP[rank, filled_R[rank]] = expert
        filled_R[rank] += 1
        load_R[rank] += share_E[expert]
    share_E = np.append(load_E / np.bincount(row_RP[row_RP >= 0], minlength=len(load_E)), 0.0)
    _exchange(row_RP, share_E[row_RP].sum(axis=1), share_E, ranks.speed_R)
    return [[expert for expert in row if expert >= 0] for row in row_RP.tolist()]


def _copies(load_E: FloatArray, ranks: Ranks) -> IntArray:
    """[E]: at most one for each rank."""
    copies = [1] * len(load_E)
    heap = [(-load, expert) for expert, load in enumerate(load_E.tolist())]
    heapify(heap)
    for _ in range(ranks.num_slots - len(load_E)):
        expert = heap[0][1]
        if copies[expert] == ranks.num_ranks:
            break  # so have all that are hotter, and no other is as hot
        copies[expert] += 1
        full = copies[expert] == ranks.num_ranks
        heapreplace(heap, (0.0 if full else -load_E[expert] / copies[expert], expert))
    return np.array(copies)


def _exchange(
    row_RP: IntArray, load_R: FloatArray, share_E: FloatArray, speed_R: FloatArray
) -> None:
    """Swap copies in place; the last share is that of an empty slot, -1."""
    for _ in range(4 * len(load_R)):
        fullest = int((load_R / speed_R).argmax())
        mine_P = row_RP[fullest]
        less_PRP = share_E[mine_P][:, None, None] - share_E[row_RP][None]
        after_PR = (load_R[fullest] - less_PRP) / speed_R[fullest]
        there_PRP = (load_R[:, None] + less_PRP) / speed_R[:, None]
        # neither may get what it has
        held_PR = (row_RP[None] == mine_P[:, None, None]).any(axis=2) & (mine_P >= 0)[:, None]
        have_RP = (row_RP[:, :, None] == mine_P).any(axis=2) & (row_RP >= 0)
        worse_PRP = np.maximum(after_PR, there_PRP)
        worse_PRP[held_PR] = np.inf
        worse_PRP[:, have_RP] = np.inf
        best = int(worse_PRP.argmin())
        slot, rank, other = np.unravel_index(best, worse_PRP.shape)
        if not worse_PRP.flat[best] < load_R[fullest] / speed_R[fullest] * (1 - 1e-9):
            return
        moved = less_PRP[slot, rank, other]
        load_R[fullest] -= moved
        load_R[rank] += moved
        row_RP[fullest, slot], row_RP[rank, other] = row_RP[rank, other], row_RP[fullest, slot]
