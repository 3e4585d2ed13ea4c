"""From quotas to the slot of each token: the part of one rank in what its node divides.

Quotas say how many of the node's tokens of an expert go to each of its copies. The node's tokens are
in the order of its ranks, and copies take them in the order of slots, so each rank's share is an
interval: ranks find theirs alone, and together exactly what the quotas say.

T my tokens, K experts per token, E logical experts, C copies.
"""

import numpy as np

from router.placement import IntArray, LayerPlacement


def share_of_rank(quotas_EC: IntArray, before_E: IntArray, counts_E: IntArray) -> IntArray:
    """[E, C]: of counts_E tokens of mine, after before_E of the node's ranks before me."""
    until_EC = np.cumsum(quotas_EC, axis=1)
    first_E1, last_E1 = before_E[:, None], (before_E + counts_E)[:, None]
    since = np.maximum(until_EC - quotas_EC, first_E1)
    return np.asarray(np.maximum(np.minimum(until_EC, last_E1) - since, 0))


def choose_by_share(ids_TK: IntArray, share_EC: IntArray, layer: LayerPlacement) -> IntArray:
    """slots_TK: global slot ids, -1 for id -1; share_EC[e, c] of e's tokens, the first ones to the
    first copy. The shares of an expert add up to its tokens in ids_TK."""
    slots_EC = layer.logical_to_physical
    first_E = slots_EC[np.arange(len(slots_EC)), (share_EC > 0).argmax(axis=1)]
    slot_of_id = np.append(first_E, -1)
    slots_P = slot_of_id[ids_TK.ravel()]
    divided_E = (share_EC > 0).sum(axis=1) > 1
    if divided_E.any():
        pairs = np.flatnonzero(np.append(divided_E, False)[ids_TK.ravel()])
        by_expert = np.argsort(ids_TK.ravel()[pairs], kind="stable")
        slots_P[pairs[by_expert]] = np.repeat(slots_EC[divided_E], share_EC[divided_E].ravel())
    return slots_P.reshape(ids_TK.shape)
