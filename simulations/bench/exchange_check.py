"""Whether an exchange between GPUs gives the reference's bits, again and again, whichever way it goes.

Legend: T tokens, H hidden, K top-k, R received rows, P pairs, B blocks of 128 channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from comms.reference import RankInput, reference_combine, reference_dispatch
from comms.symmetric_layout import SymmetricLayout
from comms.topology import Topology
from simulations.bench.exchange_ways import Dispatcher, Ways
from simulations.bench.exchange_workload import RankTensors

REPEATS = 20  # that must have the same bits
CHECKED_TOKENS = 128  # compared with the reference, which works row by row


def check(tensors: RankTensors, inside: Ways, nodes: Ways | None) -> dict[str, Any]:
    """Bitwise against the reference, REPEATS times against itself, and over `nodes` the same bits.

    Collective; raises AssertionError.
    """
    workload = tensors.workload
    tokens = min(CHECKED_TOKENS, max(workload.tokens))
    inputs = [workload.input(rank, tokens) for rank in range(workload.ranks)]
    others = nodes.all if nodes else (None,) * 3
    for dispatcher, other in zip(inside.all, others, strict=True):
        seen = _repeated(tensors, dispatcher, inputs)
        _compare(tensors, dispatcher.layout, inputs, seen)
        for a, b in zip(seen, _repeated(tensors, other, inputs) if other else seen, strict=True):
            assert torch.equal(a, b), "nodes of one GPU give other bits than one node"
    return {"tokens": tokens, "bitwise_reference": True, "equal_repeats": REPEATS}


def _repeated(
    tensors: RankTensors, dispatcher: Dispatcher, inputs: list[RankInput]
) -> list[Tensor]:
    """Rows, slots, scales if there are any, and sums: REPEATS times the same."""
    dispatcher.expect(len(inputs[0].x_TH))
    arguments = tensors.arguments(inputs[tensors.rank], dispatcher.layout.combine)
    seen = []
    for _ in range(REPEATS):
        received, handle = dispatcher.dispatch(*arguments)
        places, y_PH = tensors.outputs(received.local_slots_RK, tensors.rank)
        out_TH = dispatcher.combine(y_PH, places, handle)
        is_sent_R = (received.local_slots_RK >= 0).any(1)
        rows = [received.x_RH.view(torch.uint8)[is_sent_R], received.local_slots_RK[is_sent_R]]
        rows += [] if received.scale_RB is None else [received.scale_RB[is_sent_R]]
        seen.append([x.cpu() for x in (*rows, out_TH)])
    torch.cuda.synchronize()
    dispatcher.check()
    for again in seen[1:]:
        for a, b in zip(seen[0], again, strict=True):
            assert torch.equal(a, b), "two runs of the same exchange differ"
    return seen[0]


def _compare(
    tensors: RankTensors, layout: SymmetricLayout, inputs: list[RankInput], seen: list[Tensor]
) -> None:
    slots, world_size = layout.slots_per_rank, layout.world_size
    wanted = reference_dispatch(inputs, slots, layout.dispatch_dtype)
    mine = wanted[tensors.rank]
    assert torch.equal(seen[1].long(), mine.local_slots_RK), "slots differ from the reference"
    x_RH = seen[0].view(layout.row_dtype).float()
    if layout.dispatch_dtype == "float8":
        x_RH = x_RH.unflatten(1, (-1, 128)).mul(seen[2][:, :, None]).flatten(1)
    assert torch.equal(x_RH.bfloat16(), mine.x_RH), "rows differ from the reference"
    outputs = []
    for rank, received in enumerate(wanted):
        _, y_PH = tensors.outputs(received.local_slots_RK.to(tensors.device), rank)
        outputs.append(y_PH[: int((received.local_slots_RK >= 0).sum())].cpu())
    one_rank_nodes = Topology(num_nodes=world_size, ranks_per_node=1)
    sums = reference_combine(outputs, inputs, one_rank_nodes, slots, layout.combine)
    assert torch.equal(seen[-1], sums[tensors.rank]), "sums differ from the reference"
