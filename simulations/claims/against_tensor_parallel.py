"""Expert parallelism beside tensor parallelism: throughput, time per token, and how both depend on
hardware and context.

Of each case, from the curves over all batches that fit (`parallel_curves.py`), E being expert, T
tensor parallelism, and T at its limit: the most sequences that its memory holds:

    throughput_same_tpot     E's tokens/s per rank within T's time per token, at T's limit / T's
    throughput_half_tpot     the same within half of T's time
    tpot_same_batch          E's time per token / T's with as many sequences per rank
    tpot_same_throughput     E's time per token / T's with as many tokens/s per rank
    throughput_at_limits     both at the most that memory holds
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from comms.topology import Topology
from simulations.balance.load_balance import spare_slot_each
from simulations.balance.load_shares import Workload
from simulations.claims.parallel_curves import Curve, ExpertParallel, tensor_parallel_curve
from simulations.claims.tensor_parallel import smallest_group
from simulations.deployment import Deployment
from simulations.hardware.calibration import Calibration
from simulations.presets import load_model

NUM_NODES, RANKS_PER_NODE = 8, 8
CALIBRATIONS = ("h100-measured", "h200-measured")
"""Beside the one that was asked for."""
CONTEXT, CONTEXTS = 4096, (1024, 4096, 16384)
LEAST_THROUGHPUT, MOST_LATENCY = 3.2, 0.5


@dataclass(frozen=True, kw_only=True)
class Case:
    """Both have all of the cluster's ranks; those under tensor parallelism form groups of as many
    nodes as the weights and one sequence need."""

    calibration: Calibration
    context: int

    @property
    def name(self) -> str:
        return f"{self.calibration.name}, context {self.context:,}"


def tensor_parallel_row(
    calibration: Calibration, *, seed: int, progress: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """figures: {case: `ratios` and "tensor_parallel_size"}; the first is the verdict's."""
    others = [Calibration.named(name) for name in CALIBRATIONS if name != calibration.name]
    cases = [
        Case(calibration=each, context=context)
        for each in (calibration, *others)
        for context in (CONTEXT, *(c for c in CONTEXTS if c != CONTEXT))
    ]
    figures = compare(
        cases, preset="deepseek-v3", num_nodes=NUM_NODES, seed=seed, progress=progress
    )
    main = figures[cases[0].name]
    enough = {
        name: row["throughput_same_tpot"] >= LEAST_THROUGHPUT for name, row in figures.items()
    }
    quick = {
        name: (row["tpot_same_throughput"] or math.inf) <= MOST_LATENCY
        for name, row in figures.items()
    }
    warnings = [text for row in figures.values() for text in row.pop("warnings")]
    size = main["tensor_parallel_size"]
    return {
        "claim": f"3.2 x the throughput and half the latency: DeepSeek-V3, {NUM_NODES} x "
        f"{RANKS_PER_NODE} ranks, decoding",
        "published": "3.2 x, and 0.5 x",
        "baseline": f"tensor parallelism in groups of {size} ranks ({size // RANKS_PER_NODE} nodes, as "
        "many as the weights need), float8, fastest all-reduce, as many sequences as fit",
        "measured": _measured(main, figures),
        "command": "expertmesh simulate claims --only tensor_parallel",
        "verdict": _verdict(enough[cases[0].name], quick[cases[0].name]),
        "why": _why(enough, quick),
        "figures": figures,
        "warnings": list(dict.fromkeys(warnings)),
    }


def _measured(main: dict[str, Any], figures: dict[str, dict[str, Any]]) -> str:
    others = "; ".join(
        f"{name} (TP{row['tensor_parallel_size']}): {row['throughput_same_tpot']:.1f} x, "
        f"{_factor(row['tpot_same_throughput'])}"
        for name, row in list(figures.items())[1:]
    )
    return (
        f"at the baseline's time per token {main['throughput_same_tpot']:.1f} x its tokens/s; at its "
        f"tokens/s {_factor(main['tpot_same_throughput'])} its time, at its batch "
        f"{_factor(main['tpot_same_batch'])}; both at what memory holds "
        f"{main['throughput_at_limits']:.1f} x. {others}"
    )


def _factor(value: float | None) -> str:
    return "not reached" if value is None else f"{value:.2f} x"


def _verdict(enough: bool, quick: bool) -> str:
    if enough and quick:
        return "reproduces"
    return "partly" if enough or quick else "does not"


def _why(enough: dict[str, bool], quick: dict[str, bool]) -> str:
    return (
        f"throughput in {sum(enough.values())} of {len(enough)} cases: every rank of a tensor-parallel "
        "group keeps the whole cache of MLA's latents and reads all of it, and all experts; latency in "
        f"{sum(quick.values())}: a step of few tokens waits for messages, dispatches as all-reduces"
    )


def compare(
    cases: list[Case],
    *,
    preset: str,
    num_nodes: int,
    seed: int,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, dict[str, Any]]:
    """By the name of the case. Raises DoesNotFit if one of both does not serve a single sequence."""
    model, workload = load_model(preset), Workload()
    topology = Topology(num_nodes=num_nodes, ranks_per_node=RANKS_PER_NODE, tensor_parallel_size=1)
    deployment = Deployment(
        model=model,
        topology=topology,
        num_redundant_experts=spare_slot_each(model, topology),
    )
    experts = ExpertParallel(deployment, workload, seed)
    results = {}
    for case in cases:
        progress(f"tensor parallelism: {case.name}")
        group = smallest_group(
            model,
            case.calibration,
            ranks_per_node=RANKS_PER_NODE,
            max_tokens=1,
            kv_tokens=case.context,
        )
        curves = (
            experts.curve(case.calibration, case.context),
            tensor_parallel_curve(group, case.context, workload, seed),
        )
        results[case.name] = {
            "calibration": case.calibration.hash,
            "tensor_parallel_size": group.size,
            **ratios(*curves),
            "warnings": [*experts.warnings, *group.warnings],
        }
    return results


def ratios(experts: Curve, tensors: Curve) -> dict[str, Any]:
    """The figures of the docstring, and both curves; None where a curve does not reach so far."""
    batch, tpot_s = float(tensors.tokens_per_rank[-1]), float(tensors.tpot_s[-1])
    throughput = batch / tpot_s
    figures = {
        "throughput_same_tpot": experts.throughput_within(tpot_s) / throughput,
        "throughput_half_tpot": experts.throughput_within(tpot_s / 2) / throughput,
        "tpot_same_batch": experts.tpot_at(batch) / tpot_s,
        "tpot_same_throughput": experts.tpot_at_throughput(throughput) / tpot_s,
        "throughput_at_limits": float(experts.throughput[-1]) / throughput,
    }
    return {
        **{name: _rounded(figure) for name, figure in figures.items()},
        "expert_parallel": _points(experts),
        "tensor_parallel": _points(tensors),
    }


def _points(curve: Curve) -> dict[str, list[float | None]]:
    return {
        "tokens_per_rank": [_rounded(tokens) for tokens in curve.tokens_per_rank],
        "tpot_ms": [_rounded(1e3 * seconds) for seconds in curve.tpot_s],
        "tokens_per_s_per_rank": [_rounded(rate) for rate in curve.throughput],
    }


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else float(f"{value:.5g}")
