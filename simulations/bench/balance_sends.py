"""How many nodes recorded tokens are sent to, with ranks even: 4 nodes x 4 ranks x 5 slots.

Planned on the first half of each task of a trace, served on the second, in batches whose tokens
start on any rank. Every rank chooses copies as it would in a cluster: from its own tokens, and from
the counts that ranks and nodes exchange.

L layers, T tokens, K experts per token, N nodes, M ranks of a node, E logical experts, S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from router.affinity import plan_layer
from router.load_files import expert_counts
from router.placement import LayerPlacement, Placement
from router.slots import choose_by_share, share_of_rank
from router.split import LayerSplit
from router.visits import NodeChoice, node_sends
from simulations.bench.balance_planned import eplb_placement
from simulations.bench.recorded import Ids, read_tasks
from simulations.workload import ClusterShape, IntArray

Tokens = list[IntArray]  # [T, K] of each rank: ids, or slots
Choose = Callable[[Tokens], Tokens]

SHAPE = ClusterShape(num_experts=64, num_slots=80, num_nodes=4, ranks_per_node=4)
BATCH_TOKENS = 1024
SLACK = 0.02
SEED = 20263


class Served(NamedTuple):
    per_token: float
    imbalance: float


def sends(trace: Path, progress: Callable[[str], None]) -> dict[str, Any]:
    """Means over tasks, layers and batches.

    per_token: nodes that a token is sent to, other than its own. naive: one send for every expert,
    each equally likely to be on any node. imbalance: max/mean over ranks of (token, expert) pairs,
    in batches of 1,024 tokens; `worst_layer`: of a layer, all its batches; `bound`: the least that
    the copies allow; `imbalance_4096`, `imbalance_half`: in larger batches, up to all at once.
    by_counts: the same placement, copies chosen from counts of experts alone (LayerSplit).
    eplb: EPLB's placement, the own node's copies first. tasks: the same of each.

    Raises LoadFileError for a file that is no routing trace, ValueError for one that does not fit.
    """
    recorded = read_tasks(trace, num_experts=SHAPE.num_experts, least_tokens=2 * BATCH_TOKENS)
    tasks = {name: _task(name, ids_TLK, progress) for name, ids_TLK in recorded.items()}
    keys = next(iter(tasks.values()))
    report: dict[str, Any] = {k: float(np.mean([t[k] for t in tasks.values()])) for k in keys}
    report["worst_layer"] = max(task["worst_layer"] for task in tasks.values())
    return {**report, "tasks": tasks}


def _task(name: str, ids_TLK: Ids, progress: Callable[[str], None]) -> dict[str, float]:
    num_tokens, num_layers, width = ids_TLK.shape
    past_TLK, future_TLK = ids_TLK[: num_tokens // 2], ids_TLK[num_tokens // 2 :]
    load_LE = expert_counts(past_TLK, SHAPE.num_experts).astype(np.float64)
    eplb = eplb_placement(load_LE, SHAPE)
    layers = []
    for layer in range(num_layers):
        progress(f"sends: {name}, layer {layer}")
        planned = placed_by_affinity(load_LE[layer], past_TLK[:, layer])
        layers.append(_layer(planned, eplb.layer(layer), future_TLK[:, layer].astype(np.int64)))
    report = {key: float(np.mean([layer[key] for layer in layers])) for key in layers[0]}
    report["naive"] = width * (SHAPE.num_nodes - 1) / SHAPE.num_nodes
    report["worst_layer"] = max(layer["imbalance"] for layer in layers)
    return report


def _layer(planned: LayerPlacement, eplb: LayerPlacement, ids_TK: IntArray) -> dict[str, float]:
    split, by_nodes = LayerSplit(planned), choose_by_nodes(NodeChoice(planned))
    ours = mean_of(serve(planned, by_nodes, batch) for batch in batches(ids_TK))
    by_counts = mean_of(serve(planned, choose_by_counts(split), batch) for batch in batches(ids_TK))
    theirs = mean_of(serve(eplb, choose_own_node(eplb), batch) for batch in batches(ids_TK))
    larger, whole = (
        mean_of(
            serve(planned, by_nodes, batch) for batch in batches(ids_TK, min(size, len(ids_TK)))
        )
        for size in (4 * BATCH_TOKENS, len(ids_TK))
    )
    counts = [np.bincount(np.concatenate(b).ravel(), minlength=64) for b in batches(ids_TK)]
    return {
        "per_token": ours.per_token,
        "imbalance": ours.imbalance,
        "bound": float(np.mean([split.imbalance(counts_E) for counts_E in counts])),
        "imbalance_4096": larger.imbalance,
        "imbalance_half": whole.imbalance,
        "by_counts": by_counts.per_token,
        "by_counts_imbalance": by_counts.imbalance,
        "eplb": theirs.per_token,
        "eplb_imbalance": theirs.imbalance,
    }


def placed_by_affinity(
    load_E: NDArray[np.float64], past_TK: Ids, shape: ClusterShape = SHAPE
) -> LayerPlacement:
    row_S = plan_layer(
        load_E,
        past_TK.astype(np.int64),
        num_nodes=shape.num_nodes,
        ranks_per_node=shape.ranks_per_node,
        slots_per_rank=shape.slots_per_rank,
    )
    return Placement(
        physical_to_logical=row_S[None],
        num_experts=shape.num_experts,
        num_ranks=shape.num_ranks,
        ranks_per_node=shape.ranks_per_node,
    ).layer(0)


def batches(
    ids_TK: IntArray, size: int = BATCH_TOKENS, num_ranks: int = SHAPE.num_ranks
) -> Iterator[Tokens]:
    """Whole batches in the order of the trace; each token starts on a random rank."""
    rng = np.random.default_rng(SEED)
    for start in range(0, len(ids_TK) - size + 1, size):
        source_T = rng.permutation(np.arange(size) % num_ranks)
        batch_TK = ids_TK[start : start + size]
        yield [batch_TK[source_T == rank] for rank in range(num_ranks)]


def serve(layer: LayerPlacement, choose: Choose, ids_R: Tokens) -> Served:
    slots_R, per_node = choose(ids_R), layer.slots_per_node // layer.slots_per_rank
    sent = 0
    for rank, slots_TK in enumerate(slots_R):
        sent += node_sends(layer, slots_TK, np.full(len(slots_TK), rank // per_node))
    slots_P = np.concatenate(slots_R).ravel()
    load_R = np.bincount(slots_P // layer.slots_per_rank, minlength=layer.num_ranks)
    return Served(sent / sum(map(len, slots_R)), float(load_R.max() / load_R.mean()))


def choose_by_nodes(choice: NodeChoice) -> Choose:
    """What all ranks do with NodeChoice: counts of slots are exchanged."""

    layer = choice.layer
    per_node = layer.slots_per_node // layer.slots_per_rank

    def choose(ids_R: Tokens) -> Tokens:
        preferred_R = [choice.prefer(ids_TK, rank // per_node) for rank, ids_TK in enumerate(ids_R)]
        counts_RS = [_counts(slots_TK, layer.num_slots) for slots_TK in preferred_R]
        counts_NMS = _by_node(counts_RS, layer)
        quota_S = choice.relieve(counts_NMS.sum(axis=(0, 1)), SLACK)
        quota_NS = choice.share(counts_NMS.sum(axis=1), quota_S)
        share_NMS = [choice.share(*pair) for pair in zip(counts_NMS, quota_NS, strict=True)]
        shares = zip(ids_R, preferred_R, np.concatenate(share_NMS), strict=True)
        return [
            choice.change(ids_TK, slots_TK, share_S, rank // per_node)
            for rank, (ids_TK, slots_TK, share_S) in enumerate(shares)
        ]

    return choose


def choose_by_counts(split: LayerSplit) -> Choose:
    """What all ranks do with LayerSplit: counts of experts are exchanged."""

    layer = split.layer
    per_node = layer.slots_per_node // layer.slots_per_rank

    def choose(ids_R: Tokens) -> Tokens:
        counts_NME = _by_node([_counts(ids_TK, layer.num_experts) for ids_TK in ids_R], layer)
        before_NME = np.cumsum(counts_NME, axis=1) - counts_NME
        quotas_NEC = split.divide(counts_NME.sum(axis=1), SLACK)
        slots = []
        for rank, ids_TK in enumerate(ids_R):
            node, idx = divmod(rank, per_node)
            before_E, mine_E = before_NME[node, idx], counts_NME[node, idx]
            share_EC = share_of_rank(quotas_NEC[node], before_E, mine_E)
            slots.append(choose_by_share(ids_TK, share_EC, layer))
        return slots

    return choose


def choose_own_node(layer: LayerPlacement) -> Choose:
    """The static choice."""
    return lambda ids_R: [
        layer.choose_slots(torch.from_numpy(ids_TK), rank).numpy()
        for rank, ids_TK in enumerate(ids_R)
    ]


def _counts(values: IntArray, size: int) -> IntArray:
    return np.bincount(values.ravel(), minlength=size)


def _by_node(counts_R: list[IntArray], layer: LayerPlacement) -> IntArray:
    """[N, M, ...] of each rank's counts."""
    return np.stack(counts_R).reshape(layer.num_nodes, -1, len(counts_R[0]))


def mean_of(served: Iterable[Served]) -> Served:
    per_token, imbalance = np.mean(list(served), axis=0).tolist()
    return Served(per_token, imbalance)
