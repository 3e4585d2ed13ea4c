"""The few constants that stand for measurements where there is no table: least log-error fits.

The formulas are those of the cost model (`simulations/times/op_times.py`, `attention_times.py`), which is
what evaluates them here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cluster.model.config import ModelConfig
from comms.topology import Topology
from simulations.arithmetic import Gemm
from simulations.deployment import ComputeDtype, Deployment
from simulations.hardware.calibration import Calibration, Launch
from simulations.hardware.tables import Table
from simulations.times.op_times import OpTimes
from simulations.times.step_work import StepWork

Floats = NDArray[np.float64]

TILES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
OVERHEADS_S = tuple(float(x) for x in np.geomspace(2e-7, 1e-2, 60))
MOST_BETA = 1e12  # bytes/s of a link whose messages all take alike long
LARGE_ROWS = 0.125  # of the most rows measured: from there on a product is at its peak


def ops_of(model: ModelConfig, calibration: Calibration, dtype: ComputeDtype) -> OpTimes:
    """The cost model's operations on a single rank."""
    single = Topology(num_nodes=1, ranks_per_node=1)
    deployment = Deployment(model=model, topology=single, weights=dtype)
    return OpTimes(deployment, calibration, lambda _warning: None)


def products(tables: Mapping[str, Table], dtype: str) -> dict[Gemm, Table]:
    """The tables of whole products in this dtype, by their sizes."""
    found = {}
    for name, table in tables.items():
        kind, _, shape = name.partition(f"/{dtype}/")
        if kind == "gemm" and shape:
            n, k = map(int, shape.split("x"))
            found[Gemm(n=n, k=k)] = table
    return found


def peak_flops(measured: Mapping[Gemm, Table]) -> float:
    """Median over shapes of the best rate among the largest numbers of rows."""
    best = []
    for gemm, table in measured.items():
        rows = np.asarray(table.axes["tokens"])
        rates = rows * gemm.flop_per_row / table.values
        best.append(rates[rows >= rows[-1] * LARGE_ROWS].max())
    return float(np.median(best))


def fit_launch(
    model: ModelConfig,
    calibration: Calibration,
    measured: Mapping[Gemm, Table],
    dtype: ComputeDtype,
) -> Launch:
    """Overhead and tile, given the calibration's peak and bandwidth."""
    bare = replace(calibration, tables={})

    def error(launch: Launch) -> float:
        trial = replace(bare, gemm={**bare.gemm, dtype: launch})
        predicted = predict_products(model, trial, measured, dtype)
        return float(np.mean(np.abs(np.log(predicted / seconds_of(measured.values())))))

    launches = [Launch(overhead_s=s, tile=tile) for tile in TILES for s in OVERHEADS_S]
    return min(launches, key=error)


def predict_products(
    model: ModelConfig,
    calibration: Calibration,
    measured: Mapping[Gemm, Table],
    dtype: ComputeDtype,
) -> Floats:
    """The cost model's seconds at all points of these tables."""
    ops = ops_of(model, calibration, dtype)
    found = [ops.gemm(gemm, np.asarray(t.axes["tokens"]), dtype) for gemm, t in measured.items()]
    return np.concatenate(found)


def seconds_of(tables: Any) -> Floats:
    return np.concatenate([table.values.ravel() for table in tables])


def fit_attention(
    model: ModelConfig, calibration: Calibration, decode: Table | None, prefill: Table | None
) -> dict[str, float]:
    """The calibration's "attention", as far as there are tables for it."""
    bare = replace(calibration, tables={})
    found: dict[str, float] = {}
    if decode is not None:
        work = decode_work(decode)
        flop = ops_flop(model, work)
        rates = np.quantile(flop / decode.values.ravel(), np.linspace(0.3, 1.0, 15))
        found |= _best_attention(model, bare, work, decode.values.ravel(), rates)
    if prefill is not None:
        tokens = np.asarray(prefill.axes["tokens"])
        work = StepWork.prefill(tokens[:, None], tokens[:, None])
        rates = ops_flop(model, work) / prefill.values
        found["prefill_flops"] = float(rates[tokens >= tokens[-1] * LARGE_ROWS].max())
    return found


def decode_work(table: Table) -> StepWork:
    """All points of a table over sequences and context, as steps of one replica."""
    sequences, context = np.meshgrid(*table.axes.values(), indexing="ij")
    return StepWork.decode(sequences.reshape(-1, 1), context.reshape(-1, 1))


def ops_flop(model: ModelConfig, work: StepWork) -> Floats:
    from simulations import arithmetic

    attention = arithmetic.attention(model)
    per_pair = (
        attention.flop_per_pair_prefill if work.has_prompts else attention.flop_per_pair_decode
    )
    return np.asarray(work.pairs_BD.ravel() * per_pair)


def _best_attention(
    model: ModelConfig,
    calibration: Calibration,
    work: StepWork,
    seconds: Floats,
    rates: Sequence[float] | Floats,
) -> dict[str, float]:
    def error(rate: float, overhead_s: float) -> float:
        trial = replace(calibration, decode_flops=rate, attention_overhead_s=overhead_s)
        predicted = ops_of(model, trial, "bfloat16").core(work).ravel()
        return float(np.mean(np.abs(np.log(predicted / seconds))))

    choices = [(float(rate), overhead_s) for rate in rates for overhead_s in OVERHEADS_S]
    rate, overhead_s = min(choices, key=lambda choice: error(*choice))
    return {"decode_flops": rate, "overhead_s": overhead_s}


def fit_link(num_bytes: ArrayLike, seconds: ArrayLike) -> dict[str, float]:
    """{"alpha_s", "beta"} of seconds = alpha + bytes/beta, by least relative squares."""
    x, y = np.asarray(num_bytes, np.float64), np.asarray(seconds, np.float64)
    design = np.stack([1 / y, x / y], axis=1)
    (alpha, slope), *_ = np.linalg.lstsq(design, np.ones(len(y)), rcond=None)
    if slope <= 0:  # noise: all sizes take alike long
        return {"alpha_s": float(np.median(y)), "beta": MOST_BETA}
    if alpha < 0:
        alpha, slope = 0.0, float(np.median(y / x))
    return {"alpha_s": rounded(float(alpha)), "beta": rounded(1 / float(slope))}


def fit_exchange(times: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """ "dispatch" and "combine" of a calibration, from times by way: {"bytes": [...], "seconds": [...]}.

    One link for both dtypes of dispatch; combine adds up in integers, as it does unless told otherwise.
    """

    def link(*ways: str) -> dict[str, Any]:
        num_bytes = [x for way in ways for x in times[way]["bytes"]]
        seconds = [x for way in ways for x in times[way]["seconds"]]
        return {"node": fit_link(num_bytes, seconds)}

    dispatch = link("dispatch_float8", "dispatch_bfloat16")
    return {"dispatch": dispatch, "combine": link("combine_fixed")}


def rounded(x: float) -> float:
    """To four digits."""
    return float(f"{x:.4g}")
