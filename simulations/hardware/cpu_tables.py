"""From times of single cases on ranks of this machine to the tables and links of a calibration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cluster.model.config import ModelConfig
from comms.topology import Topology
from simulations import arithmetic
from simulations.arithmetic import Gemm
from simulations.deployment import Deployment
from simulations.hardware.fit import fit_link
from simulations.hardware.tables import Floats, Table, table_json
from simulations.times.attention_times import core_tables
from simulations.times.step_work import Sends

Case = tuple[str, tuple[int, ...]]
"""Name of a table, and the sizes of one of its points."""

LEAST_SHARE = 0.05  # of a whole that is left for a part after subtracting the others

_AXES = {
    "grouped_gemm": ("experts", "tokens_per_expert"),
    "decode": ("sequences", "context"),
}


def cpu_tables(model: ModelConfig, times: Mapping[Case, float]) -> dict[str, Any]:
    """The tables that the cost model looks up.

    Attention was timed whole ("attention/decode/<tensor-parallel size>"): its core's tables hold
    what is left after the products and the norm, which have tables of their own.
    """
    grids = {name: _grid(name, times) for name in {name for name, _ in times if "/" in name}}
    whole = {name: grid for name, grid in grids.items() if name.startswith("attention/")}
    known = {name: grid for name, grid in sorted(grids.items()) if name not in whole}
    for name, grid in sorted(whole.items()):
        _, kind, size = name.split("/")
        key, core = _core(model, int(size), kind, grid, known)
        known[key] = core
    return {
        name: table_json({axis: _whole(x) for axis, x in grid.axes.items()}, grid.values)
        for name, grid in known.items()
    }


def exchange_links(
    model: ModelConfig,
    layout: Topology,
    across: Mapping[Case, float],
    one_node: Topology,
    inside: Mapping[Case, float],
) -> dict[str, Any]:
    """ "dispatch" and "combine" links: the node's from ranks of one node, the network's from what an
    exchange between nodes takes beyond that."""
    found: dict[str, Any] = {}
    for stage in ("dispatch", "combine"):
        tokens = sorted(sizes[0] for name, sizes in across if name == stage)
        seconds = np.array([across[stage, (t,)] for t in tokens])
        alone = np.array([inside[stage, (t,)] for t in tokens])
        node = fit_link(_node_bytes(model, one_node, stage, tokens), alone)
        drawn = _node_bytes(model, layout, stage, tokens)
        rest = seconds - (node["alpha_s"] + drawn / node["beta"])
        rest = np.maximum(rest, LEAST_SHARE * seconds)
        sent = np.array(tokens) * Sends.uniform(model, layout).nodes_per_token_L[0]
        network = fit_link(sent * _row_bytes(model, layout, stage), rest)
        found[stage] = {"node": node, "network": network}
    return found


def _core(
    model: ModelConfig, size: int, kind: str, whole: Table, known: Mapping[str, Table]
) -> tuple[str, Table]:
    """Name and table of attention's core in "decode" or "prefill"."""
    work = arithmetic.attention(model, size)
    axes = list(whole.axes.values())
    rows = np.asarray(axes[0])
    if kind == "decode":
        gemms = (*work.before, *work.after)
        rows = rows[:, None]
    else:
        gemms = (*work.before_prefill, *work.after_prefill)
    others = known[f"elementwise/attention/{model.hidden_size}"].at(tokens=rows)
    for gemm in gemms:
        table = known.get(_product_name(gemm))
        others = others if table is None else others + table.at(tokens=rows)
    core = np.maximum(whole.values - others, LEAST_SHARE * whole.values)
    return _core_name(model, size, kind), Table(axes=whole.axes, values=core)


def _product_name(gemm: Gemm) -> str:
    shape = f"{gemm.n}x{gemm.k}"
    return f"gemm/bfloat16/{shape}" if gemm.count == 1 else f"bmm/bfloat16/{gemm.count}/{shape}"


def _core_name(model: ModelConfig, size: int, kind: str) -> str:
    decode, prefill = core_tables(model, size)
    return decode if kind == "decode" else prefill


def _grid(name: str, times: Mapping[Case, float]) -> Table:
    cases = sorted(sizes for found, sizes in times if found == name)
    parts = name.split("/")
    names = next((_AXES[part] for part in parts if part in _AXES), ("tokens",))
    points = [sorted({sizes[axis] for sizes in cases}) for axis in range(len(names))]
    values = np.array([times[name, sizes] for sizes in cases])
    axes = {axis: tuple(map(float, x)) for axis, x in zip(names, points, strict=True)}
    return Table(axes=axes, values=values.reshape([len(x) for x in points]))


def _whole(points: tuple[float, ...]) -> list[float]:
    return [int(x) if x == int(x) else x for x in points]


def _row_bytes(model: ModelConfig, topology: Topology, stage: str) -> int:
    deployment = Deployment(model=model, topology=topology, dispatch_dtype="bfloat16")
    return deployment.dispatch_row_bytes if stage == "dispatch" else deployment.combine_row_bytes


def _node_bytes(model: ModelConfig, topology: Topology, stage: str, tokens: list[int]) -> Floats:
    """That a rank draws from the others of its node, when all ranks bring so many tokens."""
    ranks = float(Sends.uniform(model, topology).ranks_per_token_L[0])
    share = (topology.ranks_per_node - 1) / topology.ranks_per_node
    return np.asarray(tokens) * ranks * share * _row_bytes(model, topology, stage)
