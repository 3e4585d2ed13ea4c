"""EPLB, DeepSeek's expert parallelism load balancer, written anew from its published description:
the baseline of the balance measurements.

Three steps. Groups of experts go to nodes so that nodes are about equally loaded; inside a node the
expert with the most load per copy gets the next copy, until all slots are taken; copies go to ranks,
heaviest first, each to the least loaded rank that still has a slot. Where groups do not divide over
nodes, all ranks are treated as one node with one group. Tokens split evenly over an expert's copies.

L layers (or layers x nodes), G groups, I items, E experts, S slots.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def eplb(
    load_LE: FloatArray, num_slots: int, num_groups: int, num_nodes: int, num_ranks: int
) -> IntArray:
    """physical_to_logical [L, S]. Raises ValueError where slots, ranks and nodes do not divide."""
    if num_slots % num_ranks or num_ranks % num_nodes or num_slots < load_LE.shape[1]:
        raise ValueError(
            f"EPLB needs whole slots for each rank and ranks for each node: {num_slots} slots, "
            f"{num_ranks} ranks, {num_nodes} nodes, {load_LE.shape[1]} experts"
        )
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    layers, experts = load_LE.shape
    group_size = experts // num_groups
    load_LG = load_LE.reshape(layers, num_groups, group_size).sum(axis=2)
    # By node: the groups it has, then their experts, as rows of [L * nodes, experts of a node].
    group_order = np.argsort(_packed(load_LG, num_nodes), axis=1)
    expert_order = (group_order[:, :, None] * group_size + np.arange(group_size)).reshape(
        layers * num_nodes, -1
    )
    node_load = np.take_along_axis(load_LE, expert_order.reshape(layers, experts), axis=1).reshape(
        expert_order.shape
    )
    copy_of, copies = _replicated(node_load, num_slots // num_nodes)
    copy_load = np.take_along_axis(node_load / copies, copy_of, axis=1)
    slot_order = np.argsort(_packed(copy_load, num_ranks // num_nodes), axis=1)
    in_slots = np.take_along_axis(copy_of, slot_order, axis=1)
    return np.take_along_axis(expert_order, in_slots, axis=1).reshape(layers, num_slots)


def even_rank_loads(
    physical_to_logical: IntArray, load_LE: FloatArray, num_ranks: int
) -> FloatArray:
    """[L, ranks] where each expert's load divides evenly over its copies, as EPLB assumes."""
    copies_LE = np.zeros_like(load_LE)
    layers = np.arange(len(load_LE))[:, None]
    np.add.at(copies_LE, (layers, physical_to_logical), 1)
    slot_load = np.take_along_axis(load_LE / np.maximum(copies_LE, 1), physical_to_logical, axis=1)
    rank_LR: FloatArray = slot_load.reshape(len(load_LE), num_ranks, -1).sum(axis=2)
    return rank_LR


def _packed(weight_LI: FloatArray, num_packs: int) -> IntArray:
    """[L, I] positions: pack * items per pack + place in the pack, as many items in every pack."""
    layers, items = weight_LI.shape
    capacity = items // num_packs
    row = np.arange(layers)
    load = np.zeros((layers, num_packs))
    filled = np.zeros((layers, num_packs), dtype=np.int64)
    position_LI = np.empty((layers, items), dtype=np.int64)
    for item in np.argsort(-weight_LI, axis=1, kind="stable").T:
        pack = np.where(filled < capacity, load, np.inf).argmin(axis=1)
        position_LI[row, item] = pack * capacity + filled[row, pack]
        filled[row, pack] += 1
        load[row, pack] += weight_LI[row, item]
    return position_LI


def _replicated(load_LE: FloatArray, num_slots: int) -> tuple[IntArray, IntArray]:
    """(expert of each copy [L, S], copies of each expert [L, E])."""
    layers, experts = load_LE.shape
    row = np.arange(layers)
    copies_LE = np.ones((layers, experts), dtype=np.int64)
    expert_LS = np.tile(np.arange(num_slots), (layers, 1))
    for slot in range(experts, num_slots):
        expert_LS[:, slot] = (load_LE / copies_LE).argmax(axis=1)
        copies_LE[row, expert_LS[:, slot]] += 1
    return expert_LS, copies_LE
