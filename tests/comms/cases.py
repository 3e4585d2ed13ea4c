"""Inputs for dispatcher tests, and the expert that tells slots apart."""

from dataclasses import dataclass

import torch
from torch import Tensor

from comms.dispatcher import Received, TrafficLedger
from comms.groups import ParallelGroups
from comms.make import make_dispatcher
from comms.reference import RankInput
from comms.topology import Topology


@dataclass(frozen=True, kw_only=True)
class Case:
    """One exchange: what all ranks do with which options."""

    topology: Topology
    slots_per_rank: int
    hidden: int
    dispatch_dtype: str
    combine: str
    inputs: tuple[RankInput, ...]
    repeats: int = 1


@dataclass(frozen=True, kw_only=True)
class Outcome:
    received: Received
    y_PH: Tensor
    out_TH: Tensor
    ledger: TrafficLedger
    repeats_equal: bool


def make_inputs(
    topology: Topology,
    *,
    tokens: list[int],
    slots_per_rank: int,
    hidden: int = 24,
    num_topk: int = 3,
    dtype: torch.dtype = torch.bfloat16,
    pattern: str = "random",
    seed: int = 0,
) -> tuple[RankInput, ...]:
    """pattern: random (with -1 and repeats) | one (all to the last rank) | local | none."""
    generator = torch.Generator().manual_seed(seed)
    num_slots = topology.world_size * slots_per_rank
    inputs = []
    for rank, num_tokens in enumerate(tokens):
        shape = (num_tokens, num_topk)
        low, high = {
            "random": (-1, num_slots),
            "one": (num_slots - slots_per_rank, num_slots),
            "local": (rank * slots_per_rank, (rank + 1) * slots_per_rank),
            "none": (-1, 0),
        }[pattern]
        inputs.append(
            RankInput(
                x_TH=torch.randn((num_tokens, hidden), generator=generator).to(dtype),
                slots_TK=torch.randint(low, high, shape, generator=generator),
                weights_TK=torch.rand(shape, generator=generator),
            )
        )
    return tuple(inputs)


def expert(received: Received, rank: int, slots_per_rank: int) -> Tensor:
    """y_PH: each slot scales its rows by a factor of its own, so no two slots can be confused."""
    rows, ks = (received.local_slots_RK >= 0).nonzero(as_tuple=True)
    slot_P = rank * slots_per_rank + received.local_slots_RK[rows, ks]
    gain_P = 1.0 + 0.37 * slot_P.float() + 0.01 * slot_P.float() ** 2
    return (received.x_RH[rows].float() * gain_P[:, None]).to(received.x_RH.dtype)


def exchange(groups: ParallelGroups, case: Case, name: str) -> Outcome:
    """What one rank does: dispatch, experts, combine, `repeats` times."""
    dispatcher = make_dispatcher(
        name,
        groups,
        slots_per_rank=case.slots_per_rank,
        hidden=case.hidden,
        dispatch_dtype=case.dispatch_dtype,
        combine=case.combine,
        ledger=(ledger := TrafficLedger(topology=case.topology)),
    )
    mine = case.inputs[groups.rank]
    outs = []
    for _ in range(case.repeats):
        ledger.clear()
        received, handle = dispatcher.dispatch(mine.x_TH, mine.slots_TK, mine.weights_TK)
        y_PH = expert(received, groups.rank, case.slots_per_rank)
        outs.append(dispatcher.combine(y_PH, handle))
    return Outcome(
        received=received,
        y_PH=y_PH,
        out_TH=outs[0],
        ledger=ledger,
        repeats_equal=all(torch.equal(out, outs[0]) for out in outs),
    )


def exchange_both(groups: ParallelGroups, case: Case) -> tuple[Outcome, Outcome]:
    """(flat, hierarchical) in one go."""
    return exchange(groups, case, "flat"), exchange(groups, case, "hierarchical")
