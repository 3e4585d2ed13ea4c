"""Inputs for dispatcher tests, and the expert that tells slots apart."""

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor

from comms.dispatcher import Received
from comms.groups import ParallelGroups
from comms.ledger import TrafficLedger
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
    combine_dtype: str = "bfloat16"
    repeats: int = 1


@dataclass(frozen=True, kw_only=True)
class Outcome:
    received: list[Received]
    again_RH: Tensor
    outputs: list[Tensor]
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
                # Some far too small, which makes escapes, and some refuse the token altogether.
                range_T=torch.exp2(torch.randint(-22, 6, (num_tokens,), generator=generator)),
            )
        )
    return tuple(inputs)


def expert(received: Received, rank: int, slots_per_rank: int) -> Tensor:
    """y_PH: each slot scales its rows by a factor of its own, so no two slots can be confused."""
    rows, ks = (received.local_slots_RK >= 0).nonzero(as_tuple=True)
    slot_P = rank * slots_per_rank + received.local_slots_RK[rows, ks]
    gain_P = 1.0 + 0.37 * slot_P.float() + 0.01 * slot_P.float() ** 2
    return (received.x_RH[rows].float() * gain_P[:, None]).to(received.x_RH.dtype)


def equal(x: Tensor, y: Tensor) -> bool:
    """Bit for bit, where any NaN is like another."""
    return torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(0), y.nan_to_num(0))


CAPACITY = 32
WAYS = ("flat", "hierarchical", "overlapped", "low_latency")
"""The dispatchers, and the hierarchical one in two parts."""


def make(groups: ParallelGroups, way: str, **options):
    if way == "low_latency":
        options["capacity"] = CAPACITY
    dispatcher = make_dispatcher("hierarchical" if way == "overlapped" else way, groups, **options)
    if way == "overlapped":
        dispatcher.overlap = True
    return dispatcher


def exchange(groups: ParallelGroups, case: Case, way: str) -> Outcome:
    """What one rank does: dispatch, experts, combine, `repeats` times."""
    dispatcher = make(
        groups,
        way,
        slots_per_rank=case.slots_per_rank,
        hidden=case.hidden,
        dispatch_dtype=case.dispatch_dtype,
        combine=case.combine,
        combine_dtype=case.combine_dtype,
    )
    mine = case.inputs[groups.rank]
    outs = []
    for _ in range(case.repeats):
        dispatcher.ledger.clear()
        pending = dispatcher.start_dispatch(mine.x_TH, mine.slots_TK, mine.weights_TK, mine.range_T)
        parts = list(pending)
        outputs = [expert(part, groups.rank, case.slots_per_rank) for part in parts]
        outs.append(dispatcher.start_combine(outputs, pending.handle).wait())
    ledger = deepcopy(dispatcher.ledger)
    again_RH = dispatcher.dispatch_again(mine.x_TH, pending.handle)
    return Outcome(
        received=parts,
        again_RH=again_RH,
        outputs=outputs,
        out_TH=outs[0],
        ledger=ledger,
        repeats_equal=all(equal(out, outs[0]) for out in outs),
    )


def exchange_all(groups: ParallelGroups, case: Case) -> dict[str, Outcome]:
    """Every way in one go."""
    return {way: exchange(groups, case, way) for way in WAYS}
