"""How much of the communication is hidden, and that hiding it never costs time.

Layers of a stand-in attention (products of the tokens with a square matrix) and a real MoE layer, on
hosts with limited links; both are made as long as the case wants, half of the computation each.
*Serial*: every dispatch and combine is waited for at once. *Overlapped*: in the parts and
micro-batches that the dispatcher's rule chooses, run by the model's own `interleave`. Both in turns
within one run.

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
from simulations.bench.hosted import ranks_on

WAITING = ("dispatch/exchange", "combine/exchange")
RATIOS = (0.5, 1.0, 2.0)  # computation to communication
TOKENS = (4, 64, 256, 1024)
LEAST_INTERMEDIATE = 16
MOST_PRODUCTS = 64  # of a layer; noise must not ask for more


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
    """One rank's layers, sharing weights; `products`: of a token with a matrix, as attention."""

    layer: MoELayer
    square_HH: Tensor
    products: int
    num_layers: int

    def steps(self, x_TH: Tensor) -> Pass:
        for _ in range(self.num_layers):
            for _ in range(self.products):
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

    hidden_fraction: (serial - overlapped) / min(compute, comm), which says nothing where the rule chose
    not to overlap (`overlaps` is false: both are the same program). Raises TestbedError where hosts
    cannot be made, ValueError for a number of repeats or hosts that cannot be.
    """
    if repeats < 1 or model.hosts < 0 or model.hosts == 1:
        raise ValueError(f"need repeats >= 1, hosts 0 or >= 2, got {repeats} and {model.hosts}")
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
        "overlaps": per_rank[0]["micro_batches"] * per_rank[0]["parts"] > 1,
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
    cases = []
    for num_tokens in tokens:
        generator = torch.Generator().manual_seed(1 + groups.rank)
        x_TH = torch.randn(num_tokens, model.hidden, generator=generator).bfloat16()
        for ratio in ratios:
            if groups.rank == 0:
                print(f"{num_tokens} tokens, compute / comm {ratio:g}", file=sys.stderr)
            stack = _calibrated(model, groups, dispatcher, x_TH, ratio)
            cases.append({"ratio": ratio, **_both(groups, stack, x_TH, repeats)})
    return cases


def _stack(
    model: Model, groups: ParallelGroups, dispatcher: TokenDispatcher, products: int
) -> Stack:
    """Attention of so many products, and experts that compute as much for a token."""
    generator = torch.Generator().manual_seed(7)
    placement = Placement.contiguous(1, model.experts, groups.topology.world_size, ranks_per_node=1)
    intermediate = max(LEAST_INTERMEDIATE, products * model.hidden // (3 * model.topk))
    slots = ExpertSlots(placement.slots_per_rank, model.hidden, intermediate, torch.bfloat16)
    for slot in range(placement.slots_per_rank):
        slots[slot].w13.normal_(generator=generator).mul_(model.hidden**-0.5)
        slots[slot].w2.normal_(generator=generator).mul_(intermediate**-0.5)
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
    return Stack(
        layer=layer,
        square_HH=square_HH * model.hidden**-0.5,
        products=products,
        num_layers=model.layers,
    )


def _calibrated(
    model: Model,
    groups: ParallelGroups,
    dispatcher: TokenDispatcher,
    x_TH: Tensor,
    ratio: float,
) -> Stack:
    """A stack that computes about `ratio` times as long as it waits; the same on all ranks."""
    products = 8
    _serial(groups, _stack(model, groups, dispatcher, products), x_TH)  # warm up
    fast_s, fast_waited_s = _serial(groups, _stack(model, groups, dispatcher, 0), x_TH)
    for _ in range(3):
        stack = _stack(model, groups, dispatcher, products)
        seconds, waited_s = _serial(groups, stack, x_TH)
        base_s = fast_s - fast_waited_s
        one_s = max(1e-6, (seconds - waited_s - base_s) / max(1, products))
        wanted = max(0.0, ratio * waited_s - base_s) / one_s
        mine = torch.tensor([wanted], dtype=torch.float64)
        mean = float(groups.world.all_gather(mine, [1] * groups.world.size).mean())
        products = min(MOST_PRODUCTS, round(mean))
    return _stack(model, groups, dispatcher, products)


def _both(groups: ParallelGroups, stack: Stack, x_TH: Tensor, repeats: int) -> dict[str, Any]:
    serial: list[float] = []
    overlapped: list[float] = []
    waited: list[float] = []
    dispatcher = stack.layer.dispatcher
    micro_batches = dispatcher.expect(len(x_TH))
    two_parts = bool(getattr(dispatcher, "overlap", False))
    for repeat in range(repeats):
        for mode in ("serial", "overlapped")[:: 1 if repeat % 2 else -1]:  # neither always first
            if mode == "serial":
                serial_s, waited_s = _serial(groups, stack, x_TH)
                serial.append(serial_s)
                waited.append(waited_s)
            else:
                overlapped.append(_overlapped(groups, stack, x_TH))
    return {
        "tokens": len(x_TH),
        "parts": 1 + two_parts,
        "micro_batches": micro_batches,
        "serial": serial,
        "overlapped": overlapped,
        "waited": waited,
    }


def _overlapped(groups: ParallelGroups, stack: Stack, x_TH: Tensor) -> float:
    parts = torch.chunk(x_TH, stack.layer.dispatcher.expect(len(x_TH)))
    groups.world.barrier()
    start = time.perf_counter()
    interleave([stack.steps(part) for part in parts], groups.where)
    return time.perf_counter() - start


def _serial(groups: ParallelGroups, stack: Stack, x_TH: Tensor) -> tuple[float, float]:
    """Seconds in all, and seconds of them waiting for bytes between hosts."""
    dispatcher = stack.layer.dispatcher
    dispatcher.expect(None)
    dispatcher.ledger.clear()
    groups.world.barrier()
    start = time.perf_counter()
    interleave([stack.steps(x_TH)], groups.where)
    seconds = time.perf_counter() - start
    rows = dispatcher.ledger.rows()
    return seconds, sum(row["waited_s"] for row in rows if row["stage"] in WAITING)
