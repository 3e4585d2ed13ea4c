"""Tokens as a gate chooses for them: top-k experts each, all different, from the shares of the load.

Systematic sampling (Madow 1949): the experts' intervals, top_k times their shares long, are laid end to
end in random order, and every top_k-th part of the line from a random start on names an expert. So an
expert is chosen with exactly top_k times its share, and by no token twice. Tokens in bundles of a few
use the same order. A gate that chooses groups of experts first has its bundle draw them by their load.

O origins, L layers, E experts, M tokens, K experts per token, G groups; X = O * L * bundles lines.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from router.gate import GateConfig
from simulations.balance.load_shares import FloatArray, limited

_BUNDLE = 4


def sample_rows(
    rng: np.random.Generator, share_OLE: FloatArray, gate: GateConfig, num_tokens: int
) -> NDArray[np.integer[Any]]:
    """ids [O, L, M, K] of `num_tokens` for each origin and layer; independent between layers."""
    origins, layers, experts = share_OLE.shape
    top_k, bundles = gate.num_experts_per_token, -(-num_tokens // _BUNDLE)
    share_XE = np.repeat(share_OLE.reshape(-1, experts), bundles, axis=0)
    if gate.num_groups_per_token < gate.num_groups:
        share_XE = share_XE * _of_chosen_groups(rng, share_XE, gate)
    share_XE = limited(share_XE, 1 / top_k)
    order_XE = rng.random(share_XE.shape).argsort(axis=1)
    ends_XE = np.cumsum(np.take_along_axis(share_XE, order_XE, axis=1), axis=1)
    ends_XE *= top_k / ends_XE[:, -1:]
    wanted_XMK = rng.random((len(ends_XE), _BUNDLE, 1)) + np.arange(top_k)
    # One search in all lines: line x lies at 2 * x * top_k.
    offset_X = 2.0 * top_k * np.arange(len(ends_XE))
    flat = np.searchsorted(
        (ends_XE + offset_X[:, None]).ravel(), wanted_XMK + offset_X[:, None, None], side="right"
    )
    place_XMK = np.minimum(flat - np.arange(len(ends_XE))[:, None, None] * experts, experts - 1)
    ids = np.take_along_axis(order_XE, place_XMK.reshape(len(ends_XE), -1), axis=1)
    ids_OLMK = ids.reshape(origins, layers, bundles * _BUNDLE, top_k)[:, :, :num_tokens]
    return ids_OLMK.astype(np.int16 if experts < 2**15 else np.int32)


def _of_chosen_groups(
    rng: np.random.Generator, share_XE: FloatArray, gate: GateConfig
) -> NDArray[np.bool_]:
    """[X, E]: whether the expert's group is one of those chosen, by their loads, one after another."""
    load_XG = share_XE.reshape(len(share_XE), gate.num_groups, -1).sum(axis=2)
    # The first of exponential clocks that run as fast as the loads.
    clock_XG = rng.standard_exponential(load_XG.shape) / np.maximum(load_XG, np.finfo(float).tiny)
    place_XG = clock_XG.argsort(axis=1).argsort(axis=1)
    return np.repeat(
        place_XG < gate.num_groups_per_token, share_XE.shape[1] // gate.num_groups, axis=1
    )
