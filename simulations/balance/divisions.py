"""How tokens divide over the copies of their experts: four rules, for counts and for single tokens.

    single   each expert has one copy
    even     as many tokens to each copy: EPLB's assumption. (Servers deal tokens out at random, or by
             their index, and come out a little less even; that is left out, in EPLB's favour.)
    static   `StaticChoice`: the copy depends on the rank that the token comes from
    resplit  `LayerSplit`: each batch's own counts decide, so that ranks are as even as copies allow

B batches, O origins (1, or all nodes), L layers, N nodes, E experts, C copies, S slots of all ranks,
R ranks, T tokens, K experts per token, Q sources: the ranks that stand for a replica.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from comms.topology import Topology
from router.placement import IntArray, LayerPlacement, Placement
from router.slots import choose_by_share
from router.split_batches import BatchSplit

Array = NDArray[Any]
ALL = slice(None)


class Division(Protocol):
    """Of all layers; `follow` first."""

    def follow(self, placement: Placement, layers: Iterable[int]) -> None:
        """From now on these layers are as in `placement`."""

    def slots(self, counts_BOLE: IntArray, layers: slice = ALL) -> Array:
        """[B, L, S] tokens of each slot. layers: those that counts_BOLE is of. With one origin where
        nodes differ, the counts are of all nodes alike."""

    def choose(self, layer: int, ids_TK: IntArray, source_T: IntArray) -> IntArray:
        """slots_TK of a batch's tokens, in the order of their ranks, source_T; -1 for id -1."""


class _Weighed:
    """Fixed parts of an expert's tokens for each of its copies, by where tokens come from."""

    def __init__(self, num_origins: int) -> None:
        self._num_origins = num_origins
        self._placement: Placement | None = None
        self._expert_LS = np.zeros((0, 0), dtype=np.int64)
        self._weight_OLS = np.zeros((0, 0, 0), dtype=np.float32)

    def follow(self, placement: Placement, layers: Iterable[int]) -> None:
        if self._placement is None:
            layers = range(placement.num_layers)
            shape = placement.physical_to_logical.shape
            self._weight_OLS = np.zeros((self._num_origins, *shape), dtype=np.float32)
        self._placement = placement
        self._expert_LS = np.maximum(placement.physical_to_logical, 0)
        for layer in layers:
            self._weight_OLS[:, layer] = self._weights(layer, placement.layer(layer))

    def slots(self, counts_BOLE: IntArray, layers: slice = ALL) -> Array:
        counts = counts_BOLE.astype(np.float32)
        batches, origins, _, experts = counts.shape
        expert_LS, weight_OLS = self._expert_LS[layers], self._weight_OLS[:, layers]
        if origins < len(weight_OLS):
            weight_OLS = weight_OLS.mean(axis=0, keepdims=True)
        flat = (expert_LS + experts * np.arange(len(expert_LS))[:, None]).ravel()
        slot_BLS = np.zeros((batches, *expert_LS.shape), dtype=np.float32)
        for origin in range(origins):
            of_origin = counts[:, origin].reshape(batches, -1)
            slot_BLS += of_origin.take(flat, axis=1).reshape(slot_BLS.shape) * weight_OLS[origin]
        return slot_BLS

    def _weights(self, layer: int, copies: LayerPlacement) -> Array:
        """[O or 1, S]."""
        raise NotImplementedError


class EvenDivision(_Weighed):
    """As many tokens to each copy; "single", where there is one of each."""

    def _weights(self, layer: int, copies: LayerPlacement) -> Array:
        held_EC = copies.logical_to_physical >= 0
        parts_EC = held_EC / held_EC.sum(axis=1, keepdims=True)
        weight_1S = np.zeros((1, copies.num_slots), dtype=np.float32)
        weight_1S[0, copies.logical_to_physical[held_EC]] = parts_EC[held_EC]
        return weight_1S

    def choose(self, layer: int, ids_TK: IntArray, source_T: IntArray) -> IntArray:
        assert self._placement is not None
        slots_EC = self._placement.logical_to_physical[layer]
        copies_E = (slots_EC >= 0).sum(axis=1)
        copy_TK = np.arange(len(ids_TK))[:, None] % copies_E[ids_TK]
        return np.where(ids_TK >= 0, slots_EC[ids_TK, copy_TK], -1)


class StaticDivision(_Weighed):
    """`LayerPlacement.choose_slots` from every replica's first rank."""

    def __init__(self, num_origins: int, topology: Topology) -> None:
        super().__init__(num_origins)
        self._topology = topology
        self._table_LQE: dict[int, IntArray] = {}

    def _weights(self, layer: int, copies: LayerPlacement) -> Array:
        table_QE = static_choice(copies, self._topology)
        self._table_LQE[layer] = table_QE
        table_OQE = table_QE.reshape(self._num_origins, -1, table_QE.shape[1])
        parts = [np.bincount(t.ravel(), minlength=copies.num_slots) for t in table_OQE]
        return np.stack(parts) / table_OQE.shape[1]

    def choose(self, layer: int, ids_TK: IntArray, source_T: IntArray) -> IntArray:
        replica_T = source_T // self._topology.tensor_parallel_size
        return np.where(ids_TK >= 0, self._table_LQE[layer][replica_T[:, None], ids_TK], -1)


def static_choice(copies: LayerPlacement, topology: Topology) -> IntArray:
    """[Q, E]: what `LayerPlacement.choose_slots` gives each replica for each expert.

    All at once: near copies first, else all; of those number `rank` mod how many.
    """
    slots_EC = copies.logical_to_physical
    node_EC = np.where(slots_EC >= 0, slots_EC // copies.slots_per_node, -1)
    leaders_Q = np.array(topology.leader_ranks)
    table_QE = np.empty((len(leaders_Q), len(slots_EC)), dtype=np.int64)
    for node in range(topology.num_nodes):
        near_EC = node_EC == node
        usable_EC = np.where(near_EC.any(axis=1, keepdims=True), near_EC, node_EC >= 0)
        first_EC = np.argsort(~usable_EC, axis=1, kind="stable")
        here = leaders_Q // topology.ranks_per_node == node
        turn_QE = leaders_Q[here, None] % usable_EC.sum(axis=1)
        copy_QE = first_EC[np.arange(len(slots_EC)), turn_QE]
        table_QE[here] = slots_EC[np.arange(len(slots_EC)), copy_QE]
    return table_QE


class ResplitDivision:
    """Each batch by its own counts."""

    def __init__(self) -> None:
        self._splits: list[BatchSplit] = []

    def follow(self, placement: Placement, layers: Iterable[int]) -> None:
        if not self._splits:
            self._splits = [BatchSplit(placement.layer(n)) for n in range(placement.num_layers)]
            return
        for layer in layers:
            self._splits[layer] = BatchSplit(placement.layer(layer))

    def slots(self, counts_BOLE: IntArray, layers: slice = ALL) -> Array:
        counts_LBE = counts_BOLE.sum(axis=1).transpose(1, 0, 2)
        splits = self._splits[layers]
        num_slots = splits[0].layer.num_slots
        slot_BLS = np.empty((len(counts_BOLE), len(splits), num_slots), dtype=np.int32)
        for place, (split, counts_BE) in enumerate(zip(splits, counts_LBE, strict=True)):
            slot_BLS[:, place] = split.divide(counts_BE)
        return slot_BLS

    def choose(self, layer: int, ids_TK: IntArray, source_T: IntArray) -> IntArray:
        split = self._splits[layer]
        copies = split.layer
        node_T = source_T * copies.slots_per_rank // copies.slots_per_node
        of_node = [ids_TK[node_T == node] for node in range(copies.num_nodes)]
        counts_NE = np.stack(
            [np.bincount(ids[ids >= 0], minlength=copies.num_experts) for ids in of_node]
        )
        quotas_NEC = split.one.divide(counts_NE)
        chosen = [
            choose_by_share(ids.astype(np.int64), quotas_EC, copies)
            for ids, quotas_EC in zip(of_node, quotas_NEC, strict=True)
        ]
        return np.concatenate(chosen)
