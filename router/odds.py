"""Copies by their shares of the recent load: for steps too small to be counted on their own.

A batch of a few tokens is not worth an exchange of counts, but many such batches together load a rank
just as one large batch would. So a rank deals the tokens of each expert out to its copies in the
proportions that a division of recent counts found. Turns follow the golden ratio: any number of
consecutive tokens comes within a fraction of a token of its proportions (Weyl's sequence).

T tokens, K experts per token, E logical experts, C copies, P (token, expert) pairs.
"""

from __future__ import annotations

import numpy as np

from router.placement import IntArray, LayerPlacement

_GOLDEN = (5**0.5 - 1) / 2


class CopyOdds:
    """quotas_EC: tokens of each expert for each copy, in any unit. usual_E: the slot for an expert
    with none. turn: where to begin, so that ranks do not deal alike."""

    def __init__(
        self, quotas_EC: IntArray, usual_E: IntArray, layer: LayerPlacement, turn: int = 0
    ) -> None:
        self._slots_EC = layer.logical_to_physical
        totals_E = quotas_EC.sum(axis=1)
        self._ends_EC = np.cumsum(quotas_EC, axis=1) / np.maximum(totals_E, 1)[:, None]
        self._turns_E = np.full(len(quotas_EC), turn)
        used_EC = quotas_EC > 0
        only_E = self._slots_EC[np.arange(len(used_EC)), used_EC.argmax(axis=1)]
        self._slot_of_id = np.append(np.where(totals_E > 0, only_E, usual_E), -1)
        self._divided = np.append(used_EC.sum(axis=1) > 1, False)  # the last is that of id -1

    def choose(self, ids_TK: IntArray) -> IntArray:
        """slots_TK: global slot ids, -1 for id -1. The next call goes on where this one ends."""
        ids_P = ids_TK.ravel()
        slots_P = self._slot_of_id[ids_P]
        pairs = np.flatnonzero(self._divided[ids_P])
        pairs = pairs[np.argsort(ids_P[pairs], kind="stable")]
        experts = ids_P[pairs]
        place = np.arange(len(pairs)) - np.searchsorted(experts, experts)
        drawn = (self._turns_E[experts] + place) * _GOLDEN % 1.0
        copies = (drawn[:, None] >= self._ends_EC[experts, :-1]).sum(axis=1)
        slots_P[pairs] = self._slots_EC[experts, copies]
        np.add.at(self._turns_E, experts, 1)
        return slots_P.reshape(ids_TK.shape)
