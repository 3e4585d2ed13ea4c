"""Messages between ranks of this machine: links as groups see them, and whole dispatches and combines.

Legend: T tokens of a rank, H hidden, K experts per token, P pairs at this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from time import perf_counter

import torch

from cluster.model.config import ModelConfig
from comms.dispatcher import CombineMode, WireDtype
from comms.groups import ParallelGroups
from comms.make import make_dispatcher
from experts.gains import token_ranges
from router.gate import Gate
from simulations.hardware.cpu_timing import LOCKSTEP_CALLS, Windows, lockstep_means


def link_windows(
    groups: ParallelGroups, num_bytes: Sequence[int], windows: Windows
) -> dict[str, list[list[float]]]:
    """By "node" and "network" (of which the groups have several ranks), for each size: windows.

    node: an all-gather in which every rank receives so many bytes. network: an exchange in which
    it sends as many, over its rail.
    """
    found = {}
    if groups.node.size > 1:
        found["node"] = [_gather(groups, size, windows) for size in num_bytes]
    if groups.rail.size > 1:
        found["network"] = [_exchange(groups, size, windows) for size in num_bytes]
    return found


def _gather(groups: ParallelGroups, num_bytes: int, windows: Windows) -> list[float]:
    others = groups.node.size - 1
    mine = torch.ones(max(1, num_bytes // others), dtype=torch.uint8)
    sizes = [len(mine)] * groups.node.size
    return lockstep_means(lambda: groups.node.all_gather(mine, sizes), groups.world, windows)


def _exchange(groups: ParallelGroups, num_bytes: int, windows: Windows) -> list[float]:
    part = torch.ones(max(1, num_bytes // (groups.rail.size - 1)), dtype=torch.uint8)
    parts = [part] * groups.rail.size
    return lockstep_means(lambda: groups.rail.exchange(parts, "calibrate"), groups.world, windows)


def layer_windows(
    groups: ParallelGroups,
    model: ModelConfig,
    tokens: Iterable[int],
    backend: str,
    dispatch_dtype: WireDtype,
    combine: CombineMode,
    windows: Windows,
) -> dict[str, list[list[float]]]:
    """ "dispatch" and "combine" of evenly routed tokens, for each number of them: windows."""
    slots_per_rank = model.num_experts // groups.topology.world_size
    dispatcher = make_dispatcher(
        backend,
        groups,
        slots_per_rank=slots_per_rank,
        hidden=model.hidden_size,
        dispatch_dtype=dispatch_dtype,
        combine=combine,
    )
    gate = Gate(model.gate, torch.zeros(model.num_experts, 1))
    found: dict[str, list[list[float]]] = {"dispatch": [], "combine": []}
    for number in tokens:
        x_TH = torch.randn(number, model.hidden_size).to(torch.bfloat16)
        slots_TK, weights_TK = gate.choose(torch.randn(number, model.num_experts))
        gains_E = torch.ones(model.num_experts)
        range_T = token_ranges(slots_TK, weights_TK, gains_E) if combine == "fixed" else None
        spent = {"dispatch": 0.0, "combine": 0.0}

        def layer() -> None:
            start = perf_counter()
            pending = dispatcher.start_dispatch(x_TH, slots_TK, weights_TK, range_T)  # noqa: B023
            parts = list(pending)
            sent = perf_counter()
            outputs = []
            for part in parts:
                rows, _ = torch.nonzero(part.local_slots_RK >= 0, as_tuple=True)
                outputs.append(part.x_RH.index_select(0, rows))
            computed = perf_counter()
            dispatcher.start_combine(outputs, pending.handle).wait()
            spent["dispatch"] += sent - start  # noqa: B023
            spent["combine"] += perf_counter() - computed  # noqa: B023

        for name, seconds in _timed(layer, spent, groups, windows).items():
            found[name].append(seconds)
    return found


def _timed(
    layer: Callable[[], None], spent: dict[str, float], groups: ParallelGroups, windows: Windows
) -> dict[str, list[float]]:
    for _ in range(5):
        layer()
    groups.world.barrier()
    found: dict[str, list[float]] = {name: [] for name in spent}
    for _ in range(windows.number):
        before = dict(spent)
        for _ in range(LOCKSTEP_CALLS):
            layer()
        for name, seconds in spent.items():
            found[name].append((seconds - before[name]) / LOCKSTEP_CALLS)
    return found
