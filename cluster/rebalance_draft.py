"""A planned rebalance: which layers get which slots, in what order, and what that brings.

Pure, so that it can run in a thread beside the event loop and be shown without being done.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

from router.load import ExpertLoad
from router.placement import IntArray, Placement, settle
from router.planner import PlanOptions, plan
from router.policy import Policy
from router.split import resplit_optima


@dataclass(frozen=True, kw_only=True)
class LayerEffect:
    """What a plan does to one layer (an index of the placement); loads are max / mean over ranks."""

    layer: int
    imbalance_before: float
    imbalance_after: float
    lower_bound: float
    moves: int
    reason: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Draft:
    """`rows`: (layer, its slots) of every layer that changes, the worst first."""

    rows: tuple[tuple[int, IntArray], ...]
    effects: tuple[LayerEffect, ...]

    @property
    def num_moves(self) -> int:
        return sum(effect.moves for effect in self.effects)


def draft(
    load: ExpertLoad,
    current: Placement,
    *,
    target: float,
    node_traffic: float = 0.0,
    from_scratch: bool = False,
    only: Collection[int] | None = None,
) -> Draft:
    """Plan from `current`, or, `from_scratch`, without regard to what is where.

    `target`: max / mean over ranks to reach. `node_traffic`: see `PlanOptions`. `only`: the layers
    that may change; None: all.
    """
    planned = plan(
        load,
        num_ranks=current.num_ranks,
        slots_per_rank=current.slots_per_rank,
        ranks_per_node=current.ranks_per_node,
        current=None if from_scratch else current,
        layers=None if from_scratch else only,
        options=PlanOptions(target=target, node_traffic=node_traffic),
    )
    layers = range(current.num_layers) if only is None else sorted(only)
    drafted = current.with_layers({i: _row(planned.placement, current, i) for i in layers})
    moves_L = np.bincount(
        [move.layer for move in drafted.moves_from(current)], minlength=current.num_layers
    )
    before_L = resplit_optima(load.mean_LE, current).tolist()
    effects = tuple(
        LayerEffect(
            layer=layer,
            imbalance_before=before_L[layer],
            imbalance_after=planned.layers[layer].imbalance,
            lower_bound=planned.layers[layer].lower_bound,
            moves=int(moves_L[layer]),
            reason=planned.layers[layer].reason,
        )
        for layer in layers
    )
    rows = drafted.physical_to_logical
    changed = [i for i in layers if (rows[i] != current.physical_to_logical[i]).any()]
    changed.sort(key=lambda layer: -before_L[layer])
    return Draft(rows=tuple((layer, rows[layer]) for layer in changed), effects=effects)


def worthwhile(drafted: Draft, policy: Policy, current: Placement) -> Draft:
    """The draft without the layers whose moves cost more than they bring."""
    pays = {
        effect.layer
        for effect in drafted.effects
        if policy.pays(
            effect.imbalance_before,
            effect.imbalance_after,
            effect.moves,
            current.num_layers,
            current.num_ranks,
        )
    }
    return replace(drafted, rows=tuple(row for row in drafted.rows if row[0] in pays))


def _row(planned: Placement, current: Placement, layer: int) -> IntArray:
    return settle(
        current.physical_to_logical[layer],
        planned.physical_to_logical[layer],
        current.slots_per_rank,
    )
