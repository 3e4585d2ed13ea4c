"""How much of the communication is hidden, and that hiding it never costs time.

Layers of a stand-in attention (products of the tokens with square matrices, as many as make the
computation as long as wanted) and a real MoE layer, on hosts with limited links. *Serial*: every
dispatch and combine is waited for at once. *Overlapped*: in the parts and micro-batches that the
dispatcher's rule chooses, run by the model's own `interleave`. Both in turns within one run.

Communication is the time that a serial rank spends waiting for bytes between hosts, and computation
all the rest of the serial time, packing and summing included.

Legend: T tokens, H hidden.
"""

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cluster.model.micro_batches import Pass, interleave
from comms.dispatcher import TokenDispatcher
from comms.groups import ParallelGroups
from comms.links import measure_links
from comms.make import make_dispatcher
from comms.topology import Topology
from experts.linear import stable_linear
from experts.moe import MoELayer
from experts.weights import ExpertSlots
from router.gate import Gate, GateConfig
from router.placement import Placement
from simulations.hosted import ranks_on

WAITING = ("dispatch/exchange", "combine/exchange")
RATIOS = (0.5, 1.0, 2.0)  # computation to communication
TOKENS = (4, 32, 256)
INTERMEDIATE = 64


@dataclass(frozen=True, kw_only=True)
class Model:
    """The stand-in for a model: every rank is a host of its own."""

    hosts: int = 2
    rate: str | None = "200mbit"
    hidden: int = 1024
    experts: int = 16
    topk: int = 4
    layers: int = 8


@dataclass(frozen=True, kw_only=True)
class Stack:
    """One rank's layers, sharing weights; `products`: of a token with a matrix, per layer."""

    layer: MoELayer
    square_HH: Tensor
    num_layers: int

    def steps(self, x_TH: Tensor, products: int) -> Pass:
        for _ in range(self.num_layers):
            for _ in range(products):
                x_TH = stable_linear(x_TH, self.square_HH)
            x_TH = x_TH + (yield from self.layer.steps(x_TH))
        return x_TH


def run(
    model: Model,
    *,
    tokens: Sequence[int] = TOKENS,
    ratios: Sequence[float] = RATIOS,
    repeats: int = 5,
) -> dict[str, Any]:
    """{"config", "links", "cases": [{tokens, parts, micro_batches, compute_s, comm_s, serial_s,
    overlapped_s, hidden_fraction}]}; times of all layers, medians over the repeats of the slowest rank.

    hidden_fraction: (serial - overlapped) / min(compute, comm). Raises TestbedError where hosts
    cannot be made.
    """
    topology = Topology(num_nodes=model.hosts or 2, ranks_per_node=1)
    with ranks_on(model.hosts, 1, model.rate) as pool:
        answers = pool.run(
            _measure, topology, model, tuple(tokens), tuple(ratios), repeats, timeout_s=1800.0
        )
    cases = [_case([answer[i] for answer in answers]) for i in range(len(answers[0]))]
    return {"config": {**asdict(model), "repeats": repeats}, "cases": cases}


def _case(per_rank: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of each repeat the slowest rank, the median over the repeats; waiting is the ranks' mean."""
    serial_s, overlapped_s = (
        statistics.median(map(max, zip(*(of_rank[name] for of_rank in per_rank), strict=True)))
        for name in ("serial", "overlapped")
    )
    comm_s = statistics.median(
        map(statistics.mean, zip(*(of_rank["waited"] for of_rank in per_rank), strict=True))
    )
    compute_s = serial_s - comm_s
    return {
        **{name: per_rank[0][name] for name in ("tokens", "ratio", "parts", "micro_batches")},
        "compute_s": compute_s,
        "comm_s": comm_s,
        "serial_s": serial_s,
        "overlapped_s": overlapped_s,
        "hidden_fraction": (serial_s - overlapped_s) / min(compute_s, comm_s),
    }


def _measure(
    groups: ParallelGroups,
    model: Model,
    tokens: Sequence[int],
    ratios: Sequence[float],
    repeats: int,
) -> list[dict[str, Any]]:
    torch.set_grad_enabled(False)
    groups = replace(groups, links=measure_links(groups.rail, groups.world))
    dispatcher = make_dispatcher(
        "hierarchical",
        groups,
        slots_per_rank=-(-model.experts // groups.topology.world_size),
        hidden=model.hidden,
        dispatch_dtype="float8",
    )
    stack = _stack(model, groups, dispatcher)
    cases = []
    for num_tokens in tokens:
        generator = torch.Generator().manual_seed(1 + groups.rank)
        x_TH = torch.randn(num_tokens, model.hidden, generator=generator).bfloat16()
        for ratio in ratios:
            if groups.rank == 0:
                print(f"{num_tokens} tokens, compute / comm {ratio:g}", file=sys.stderr)
            products = _products(groups, stack, dispatcher, x_TH, ratio)
            cases.append(
                {"ratio": ratio, **_both(groups, stack, dispatcher, x_TH, products, repeats)}
            )
    return cases


def _stack(model: Model, groups: ParallelGroups, dispatcher: TokenDispatcher) -> Stack:
    """The same random weights on all ranks, of which each keeps its experts."""
    generator = torch.Generator().manual_seed(7)
    placement = Placement.contiguous(1, model.experts, groups.topology.world_size, ranks_per_node=1)
    slots = ExpertSlots(placement.slots_per_rank, model.hidden, INTERMEDIATE, torch.bfloat16)
    slots.w13.normal_(generator=generator).mul_(model.hidden**-0.5)
    slots.w2.normal_(generator=generator).mul_(INTERMEDIATE**-0.5)
    config = GateConfig(
        num_experts=model.experts, num_experts_per_token=model.topk, renormalize=True
    )
    weight_EH = torch.randn(model.experts, model.hidden, generator=generator)
    square_HH = torch.randn(model.hidden, model.hidden, generator=generator).bfloat16()
    layer = MoELayer(
        gate=Gate(config, weight_EH),
        slots=slots,
        dispatcher=dispatcher,
        layer_placement=placement.layer(0),
        rank=groups.rank,
    )
    return Stack(layer=layer, square_HH=square_HH * model.hidden**-0.5, num_layers=model.layers)


def _products(
    groups: ParallelGroups, stack: Stack, dispatcher: TokenDispatcher, x_TH: Tensor, ratio: float
) -> int:
    """Per layer, so that computing takes `ratio` times as long as waiting; the same on all ranks."""
    _serial(groups, stack, dispatcher, x_TH, 0)  # warm up
    none_s, waited_s = _serial(groups, stack, dispatcher, x_TH, 0)
    some_s, waited_some_s = _serial(groups, stack, dispatcher, x_TH, 8)
    one_s = max(1e-6, (some_s - waited_some_s - none_s + waited_s) / 8)
    wanted = round(max(0.0, ratio * waited_s - (none_s - waited_s)) / one_s)
    mine = torch.tensor([wanted])
    return int(groups.world.all_gather(mine, [1] * groups.world.size).double().mean())


def _both(
    groups: ParallelGroups,
    stack: Stack,
    dispatcher: TokenDispatcher,
    x_TH: Tensor,
    products: int,
    repeats: int,
) -> dict[str, Any]:
    serial, overlapped, waited = [], [], []
    micro_batches = dispatcher.expect(len(x_TH))
    two_parts = bool(getattr(dispatcher, "overlap", False))
    for _ in range(repeats):
        serial_s, waited_s = _serial(groups, stack, dispatcher, x_TH, products)
        dispatcher.expect(len(x_TH))
        parts = torch.chunk(x_TH, micro_batches)
        groups.world.barrier()
        start = time.perf_counter()
        interleave([stack.steps(part, products) for part in parts], groups.where)
        overlapped.append(time.perf_counter() - start)
        serial.append(serial_s)
        waited.append(waited_s)
    return {
        "tokens": len(x_TH),
        "parts": 1 + two_parts,
        "micro_batches": micro_batches,
        "serial": serial,
        "overlapped": overlapped,
        "waited": waited,
    }


def _serial(
    groups: ParallelGroups, stack: Stack, dispatcher: TokenDispatcher, x_TH: Tensor, products: int
) -> tuple[float, float]:
    """Seconds in all, and seconds of them waiting for bytes between hosts."""
    dispatcher.expect(None)
    dispatcher.ledger.clear()
    groups.world.barrier()
    start = time.perf_counter()
    interleave([stack.steps(x_TH, products)], groups.where)
    seconds = time.perf_counter() - start
    rows = dispatcher.ledger.rows()
    return seconds, sum(row["waited_s"] for row in rows if row["stage"] in WAITING)
