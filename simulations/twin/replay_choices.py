"""Where a recorded run's tokens go, again: every rank's own choice of copies, given the gates' choices.

All ranks run in this process; what they tell each other of their batches they exchange for real, so
its bytes are booked as the cluster's are.

T tokens, L layers with experts, K experts per token, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.model.transformer import expert_flop
from comms.base import BaseDispatcher
from comms.groups import ParallelGroups
from comms.ledger import TrafficLedger
from comms.make import make_dispatcher
from experts.balance import make_balance
from experts.slot_choice import make_choice
from router.placement import LayerPlacement, Placement
from simulations.twin.rank_threads import run_ranks
from simulations.twin.recording import Recording


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """`tokens[c][r]`: which of all tokens rank r owns in micro-batch c."""

    number: int
    max_tokens: int
    layers: tuple[LayerPlacement, ...]
    tokens: list[list[slice]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Choices:
    """slots_TLK of all tokens; `counted`: the bytes by which ranks told each other their counts;
    micro_batches: of each step, as the dispatcher wants them."""

    slots_TLK: NDArray[np.int32]
    counted: TrafficLedger
    micro_batches: list[int]


def layers_by_epoch(placements: Sequence[Placement]) -> list[tuple[LayerPlacement, ...]]:
    """Of each placement the layers; a layer that did not change is the same object, as on a rank."""
    first, *others = placements
    layers = [first.layer(i) for i in range(first.num_layers)]
    by_epoch = [tuple(layers)]
    before = first
    for placement in others:
        changed = (placement.physical_to_logical != before.physical_to_logical).any(axis=1)
        for i in np.flatnonzero(changed).tolist():
            layers[i] = placement.layer(i)
        by_epoch.append(tuple(layers))
        before = placement
    return by_epoch


def replay_choices(recording: Recording, steps: Sequence[Step]) -> Choices:
    """Raises what the production code raises for choices that cannot be."""
    slots_TLK = np.full(recording.arrays["routing"].shape, -1, dtype=np.int32)

    def rank(groups: ParallelGroups) -> tuple[TrafficLedger, list[int]]:
        return _replay_rank(groups, recording, steps, slots_TLK)

    results = run_ranks(recording.config.parallel.topology, rank, links=recording.links)
    counted, micro_batches = results[0]
    for ledger, _ in results[1:]:
        counted.merge(ledger)
    return Choices(slots_TLK=slots_TLK, counted=counted, micro_batches=micro_batches)


def dispatcher_of(recording: Recording, groups: ParallelGroups) -> BaseDispatcher:
    """As the ranks of the run had it; its ledger remembers every step."""
    comms = recording.config.comms
    dispatcher = make_dispatcher(
        comms.all2all_backend,
        groups,
        slots_per_rank=recording.first_placement.slots_per_rank,
        hidden=recording.model.hidden_size,
        dispatch_dtype=comms.dispatch_dtype,
        combine=comms.combine,
        combine_dtype=comms.combine_dtype,
    )
    dispatcher.ledger = TrafficLedger(
        topology=groups.topology, where=groups.where, max_steps=max(1, recording.num_steps)
    )
    return dispatcher


def _replay_rank(
    groups: ParallelGroups,
    recording: Recording,
    steps: Sequence[Step],
    slots_TLK: NDArray[np.int32],
) -> tuple[TrafficLedger, list[int]]:
    """Fills in the slots of this rank's tokens. The same calls in the same order as in a forward."""
    model, routing_TLK = recording.model, recording.arrays["routing"]
    dispatcher = dispatcher_of(recording, groups)
    balance = make_balance(recording.config.experts.split, dispatcher, expert_flop(model))
    choices = [make_choice(balance, groups.tp.ranks[0]) for _ in model.moe_layers]
    where, micro_batches = groups.where, []
    for step in steps:
        of_rank = -(-step.max_tokens // groups.tp.size)
        micro_batches.append(dispatcher.expect(of_rank))
        if balance is not None:
            balance.expect(of_rank // len(step.tokens))
        where.step = step.number
        for layer, (choice, placement) in enumerate(zip(choices, step.layers, strict=True)):
            where.layer = model.moe_layers[layer]
            for of_ranks in step.tokens:
                mine = of_ranks[groups.rank]
                ids_TK = routing_TLK[mine, layer].astype(np.int64)
                counts_E = np.bincount(ids_TK[ids_TK >= 0], minlength=model.num_experts)
                chosen = choice.choose(
                    torch.from_numpy(ids_TK), torch.from_numpy(counts_E), placement
                )
                slots_TLK[mine, layer] = chosen.numpy()
    return dispatcher.ledger, micro_batches
