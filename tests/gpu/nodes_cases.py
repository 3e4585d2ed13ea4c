"""Nodes of ranks that share a process and a device: rails that copy, results compared with the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from comms.nodes import NodesDispatcher
from comms.rail_watch import Progress
from comms.reference import RankInput, reference_combine, reference_dispatch
from comms.symmetric import SymmetricDispatcher
from comms.symmetric_memory import SymmetricMemory
from comms.topology import Topology
from tests.gpu.symmetric_cases import Case, inputs_of, outputs_of, same_bits, sent_rows


class CopyRail:
    """A `Rail` of one process: `finish` copies what the others have put up by then.

    Counts, which ranks one after the other cannot exchange, it has from `counts`: by source and destination.
    """

    def __init__(self, idx: int, rails: list[CopyRail], size: int) -> None:
        self.idx, self.size, self._rails = idx, size, rails
        self.rows = self.bytes = 0  # that came
        self.counts = torch.empty(0)
        rails.append(self)

    def start(self, outs: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
        self.outs, self.parts = outs, parts

    def finish(self) -> None:
        for rail in self._rails:
            if rail is self:
                continue
            if self.outs[rail.idx].dim() == 1:
                self.outs[rail.idx].fill_(self.counts[rail.idx, self.idx])
            else:
                assert self.outs[rail.idx].shape == rail.parts[self.idx].shape
                self.outs[rail.idx].copy_(rail.parts[self.idx])
                self.rows += len(self.outs[rail.idx])
                self.bytes += self.outs[rail.idx].nbytes

    def abort(self) -> None: ...


def nodes_in_one_process(
    case: Case, topology: Topology, device: torch.device, exact_above: int | None = None
) -> list[NodesDispatcher]:
    """In rank order."""
    layout = replace(
        case.layout,
        world_size=topology.ranks_per_node,
        capacity=topology.num_nodes * case.layout.capacity,
        of_several=True,
    )
    rails: list[list[CopyRail]] = [[] for _ in range(topology.ranks_per_node)]
    ranks = []
    for node in range(topology.num_nodes):
        memories = SymmetricMemory.in_one_process(topology.ranks_per_node, layout.num_bytes, device)
        for local_rank, memory in enumerate(memories):
            inside = SymmetricDispatcher(
                layout, memory, timeout_s=10.0, ranks=topology.node_ranks(node)
            )
            rail = CopyRail(node, rails[local_rank], topology.num_nodes)
            ranks.append(NodesDispatcher(inside, rail, Progress(device), exact_above=exact_above))
    return ranks


def run_nodes(
    case: Case, topology: Topology, device: torch.device, exact_above: int | None = None
) -> list[NodesDispatcher]:
    """Raises AssertionError where a bit differs from the reference."""
    ranks = nodes_in_one_process(case, topology, device, exact_above)
    for step in range(case.steps):
        for dispatcher in ranks:
            dispatcher.expect(case.expected or max(1, *case.tokens))
        check_nodes(case, topology, ranks, inputs_of(case, step), device, step)
    crossed = sum(dispatcher.bytes_sent["inter_node"] for dispatcher in ranks)
    assert crossed == sum(dispatcher.rail.bytes for dispatcher in ranks) > 0
    inside = [dispatcher.bytes_sent["intra_node"] for dispatcher in ranks]
    assert all((num_bytes > 0) == (topology.ranks_per_node > 1) for num_bytes in inside)
    return ranks


def check_nodes(
    case: Case,
    topology: Topology,
    ranks: list[NodesDispatcher],
    inputs: list[RankInput],
    device: torch.device,
    step: int,
) -> list[Tensor]:
    """Dispatch and combine on all ranks; returns the reference's sums."""
    fixed = case.combine == "fixed"
    _tell_counts(ranks, inputs, topology, case.slots_per_rank)
    pending = [
        dispatcher.start_dispatch(*arguments_of(source, device, fixed))
        for dispatcher, source in zip(ranks, inputs, strict=True)
    ]
    handles = [part.forward() for part in pending]
    received = [part.wait() for part in pending]
    expected = reference_dispatch(inputs, case.slots_per_rank, case.dispatch_dtype)
    orders = [_order(found, topology, ranks[0].num_rows) for found in received]
    for rank, (found, order, wanted) in enumerate(zip(received, orders, expected, strict=True)):
        x_RH, slots_RK = sent_rows(_in_order(found, order))
        assert torch.equal(slots_RK.long(), wanted.local_slots_RK), f"slots of rank {rank}"
        assert same_bits(x_RH, wanted.x_RH), f"rows of rank {rank}"
    outputs = [outputs_of(x, 10 * step + rank, case.exact) for rank, x in enumerate(received)]
    home = [
        dispatcher.start_combine(y_PH.to(device), place_RK.to(device), handle)
        for dispatcher, (y_PH, place_RK), handle in zip(ranks, outputs, handles, strict=True)
    ]
    for part in home:
        part.send()
    extras = [torch.randn(x.x_TH.shape).bfloat16() if step % 2 else None for x in inputs]
    if case.exact:  # the interpreter cuts off where a GPU rounds
        extras = [None if extra is None else torch.zeros_like(extra) for extra in extras]
    sums = [
        part.wait(None if extra is None else extra.to(device))
        for part, extra in zip(home, extras, strict=True)
    ]
    in_order = [
        y_PH[place_RK[order][place_RK[order] >= 0].long()]
        for (y_PH, place_RK), order in zip(outputs, orders, strict=True)
    ]
    wanted_sums = reference_combine(in_order, inputs, topology, case.slots_per_rank, case.combine)
    for rank, (out_TH, wanted_TH, extra) in enumerate(zip(sums, wanted_sums, extras, strict=True)):
        both_TH = wanted_TH if extra is None else wanted_TH + extra
        assert same_bits(out_TH, both_TH), f"sums of rank {rank}"
    for dispatcher in ranks:
        dispatcher.check()
        assert dispatcher.progress.kernels == 3 * (step + 1)
    return wanted_sums


def _tell_counts(
    ranks: list[NodesDispatcher], inputs: list[RankInput], topology: Topology, slots_per_rank: int
) -> None:
    for rank, dispatcher in enumerate(ranks):
        counts = torch.zeros(topology.num_nodes, topology.num_nodes)
        for source in topology.rail_ranks(topology.local_rank_of(rank)):
            slots_TK = inputs[source].slots_TK
            node_TK = slots_TK.div(slots_per_rank * topology.ranks_per_node, rounding_mode="floor")
            for node in range(topology.num_nodes):
                counts[topology.node_of(source), node] = (node_TK == node).any(1).sum()
        dispatcher.rail.counts = counts


def arguments_of(source: RankInput, device: torch.device, fixed: bool) -> list[Tensor]:
    parts = [source.x_TH, source.slots_TK, source.weights_TK]
    if fixed and source.range_T is not None:
        parts.append(source.range_T)
    return [part.to(device) for part in parts]


def _order(received, topology: Topology, num_rows: int) -> Tensor:
    """Rows are by (local rank, node, token); the reference's by (node, local rank, token)."""
    rows = torch.arange(topology.world_size * num_rows)
    by_rank = rows.view(topology.ranks_per_node, topology.num_nodes, num_rows)
    assert len(received.x_RH) == len(rows)
    return by_rank.transpose(0, 1).flatten()


def _in_order(received, order: Tensor):
    scale_RB = received.scale_RB
    return replace(
        received,
        x_RH=received.x_RH.cpu()[order],
        scale_RB=None if scale_RB is None else scale_RB.cpu()[order],
        local_slots_RK=received.local_slots_RK.cpu()[order],
    )


def interpreted_cases() -> None:
    """The arithmetic of the kernels, on a CPU."""
    cpu = torch.device("cpu")
    two_by_two = Topology(num_nodes=2, ranks_per_node=2)
    run_nodes(Case(exact=True, tokens=(4, 0, 2, 5), steps=1), two_by_two, cpu)
    fixed = Case(exact=True, tokens=(4, 3, 0, 2), expected=5, combine="fixed", steps=1)
    float8 = replace(fixed, dispatch_dtype="float8", num_topk=2, slots_per_rank=2)
    even = run_nodes(replace(float8, steps=2), two_by_two, cpu)
    exact = run_nodes(float8, two_by_two, cpu, exact_above=1)
    assert all(0 <= 2 * b.rail.rows < a.rail.rows for a, b in zip(even, exact, strict=True))
    run_nodes(fixed, Topology(num_nodes=4, ranks_per_node=1), cpu)
