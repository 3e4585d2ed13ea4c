"""Calibrations made of published figures only, each with its source beside it.

    python -m simulations.scoreboard.constants      writes hardware/data/<name>.json of `NAMES`

Sources: S1 to S5 of `targets.json`, two kernel libraries' own tables, and a datasheet. Nothing here
has seen a target marked blind. Times in microseconds where a name ends in _us.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from simulations.hardware.tables import table_json

_DATA = Path(__file__).parents[1] / "hardware" / "data"

HIDDEN, EXPERT, TOP_K = 7168, 2048, 8
DISPATCH_ROW, COMBINE_ROW = HIDDEN + HIDDEN // 128 * 4, 2 * HIDDEN
"""Bytes: FP8 with a 4-byte scale for 128 channels; BF16."""

# H800 and H100 SXM5 compute alike; 3.0e12 bytes/s is what FlashMLA reaches of 3.35e12 (README).
BANDWIDTH = 3.0e12
BFLOAT16 = 0.8 * 865e12  # FlashMLA, "A Deep-Dive Into the New Flash MLA Kernel", 2025-04-22
LAUNCH_US = 4.0  # DeepGEMM's 64 x 2112 x 7168, 9.4 us, less its 15.9 MB at BANDWIDTH

# DeepGEMM README at its release (2025-02-26), H800, NVCC 12.8: TFLOPS at M = 64, 128, 4096.
DENSE_TFLOPS = {
    (2112, 7168): (206, 352, 1058),
    (24576, 1536): (289, 535, 990),
    (32768, 512): (219, 358, 590),
    (7168, 16384): (336, 645, 1358),
    (4096, 7168): (287, 533, 1304),
    (7168, 2048): (295, 510, 1025),
}
# Masked grouped products, rows of all groups 1024: groups: TFLOPS of gate and up, of down.
MASKED_TFLOPS = {1: (1233, 925), 2: (1040, 916), 4: (932, 815)}
CONTIGUOUS_TFLOPS = (1297, 1099)  # 4 groups of 8192

# S5, DeepSeek's decode profile, one micro-batch of 128 tokens (64 requests with 2 tokens each) at a
# context of 4096, EP128; kernel times as transcribed by zdszero.github.io, "D4 Profile".
S5_TOKENS = 128
S5_DENSE_US = {(2112, 7168): 13.0, (24576, 1536): 19.0, (7168, 16384): 50.0}
S5_ELEMENTWISE_US = 4 + 2 + 2 + 7 + 5  # norms, quantisation and rotary of attention
S5_CORE_US, S5_GATE_US = 255.0, 19.0
S5_EXPERTS_US, S5_SWIGLU_US = 81.0 + 39.0, 8.0  # 2 experts of 512 tokens
S5_AFTER_CORE_US, S5_COMBINE_US = 15.0 + 5.0 + 50.0, 394.0
S5_LAYERS_MS, S5_STEP_MS = 87.32, 96.0
S5_OPERATIONS_MS = 84.47
"""What the cost model makes of S5's layers when nothing lies between their operations."""

# S4, DeepSeek's prefill profile, one micro-batch of 8192 tokens in prompts of 4096, EP32, on 108 of
# 132 SMs; kernel times as transcribed by H. Shen, "DeepSeek V3/R1 Inference Efficiency (2)".
S4_TOKENS, S4_SM_SHARE = 8192, 24 / 132
S4_DENSE_US = {
    (2112, 7168): 268.0,
    (24576, 1536): 922.0,
    (32768, 512): 533.0,
    (7168, 16384): 1652.0,
    (4096, 7168): 439.0,
    (7168, 2048): 306.0,
}
S4_CORE_US, S4_ELEMENTWISE_US, S4_GATE_US = 2683.0, 549.0 + 232.0, 529.0
S4_EXPERTS_US = 3534.0 + 2381.0 + 728.0 + 314.0 + 594.0  # products, permutation, SwiGLU, local sums
S4_DISPATCH_US, S4_COMBINE_US = 4326.0, 8845.0
S4_DISPATCH_NOTIFY_US, S4_COMBINE_NOTIFY_US = 743.0, 788.0

# S1, DeepEP's low-latency kernels, 128 tokens, us by EP, dispatch and combine: by RDMA alone (until
# 23 May 2025), and with NVLink inside a node (README of 5 June 2025).
S1_RDMA = {8: (163, 318), 16: (173, 329), 32: (182, 350), 64: (186, 353), 128: (192, 369),
           256: (194, 360)}  # fmt: skip
S1_NVLINK = {8: (77, 114), 16: (118, 195), 32: (155, 273), 64: (173, 314), 128: (192, 369),
             256: (194, 360)}  # fmt: skip
S1_TOKENS = 128

# S3, pplx-garden's kernels under the same conditions (docs/fabric-lib.md, ConnectX-7).
S3 = {8: (50.5, 65.3), 16: (110.2, 185.5), 32: (153.9, 266.3), 64: (187.5, 309.1)}

# S2, DeepEP's normal kernels, 4096 tokens, GB/s by EP. They count a token once for each of its
# nodes, its own too, which crosses no network: 58 GB/s at 4 nodes are 43.5 on the wire.
S2 = {8: (153, 158), 16: (43, 43), 32: (58, 57), 64: (51, 50)}

UNIFORM_NODES_S4 = 33 / 14
"""Other nodes that a token visits under DeepSeek-V3's gate: 4 of 8 groups, 2 groups on each of 4
nodes: 4 (1 - C(6,4) / C(8,4)) 3/4."""

NAMES = ("h800-deepep-v1", "h100-published", "h100-pplx")
_GRID = (256, 512, 1024, 2048)


def calibration(name: str) -> dict[str, Any]:
    """The file's content. "h800-deepep-v1": kernels of February to May 2025, what S4 to S8 ran on;
    "h100-published": DeepEP of June 2025 and FlashMLA of 22 April 2025; "h100-pplx": the same with
    pplx-garden's kernels instead of DeepEP's low-latency ones."""
    newer = name != "h800-deepep-v1"
    alpha_beta = _low_latency_links(S1_NVLINK)
    links = alpha_beta if newer else _rdma_only(alpha_beta)
    if name == "h100-pplx":
        links = _low_latency_links(S3)
    return {
        "version": 1,
        "name": name,
        "provenance": {
            "hardware": f"NVIDIA {'H100' if newer else 'H800'} SXM5 80 GB, 8 to a node, one "
            "ConnectX-7 400 Gbit/s a rank",
            "software": {
                "DeepEP": "2025-06-05" if newer else "before 2025-05-23",
                **({"pplx-garden": "2025"} if name == "h100-pplx" else {}),
                "DeepGEMM": "2025-02-26",
                "FlashMLA": "2025-04-22" if newer else "2025-02-24",
            },
            "date": "2025-06-05" if newer else "2025-05-05",
            "source": "published: DeepEP, DeepGEMM and FlashMLA READMEs, DeepSeek's profiles of "
            "prefill and decode; see simulations/scoreboard/constants.py",
        },
        "memory_bytes": 80e9,
        "memory_bandwidth": BANDWIDTH,
        "peak_flops": {"bfloat16": BFLOAT16, "float8": CONTIGUOUS_TFLOPS[0] * 1e12},
        "gemm": {
            dtype: {"overhead_s": LAUNCH_US * 1e-6, "tile": 64} for dtype in ("bfloat16", "float8")
        },
        "attention": {
            # FlashMLA README: 580 TFLOPS in its first version (S5's core is 573), 660 in the second.
            "decode_flops": 6.6e14 if newer else 5.8e14,
            "prefill_flops": _rounded(_s4_core_flops()),
            "overhead_s": 3e-6,
        },
        "tables": _tables(),
        "links": _normal_links(0, alpha_beta["dispatch"]),
        "combine": _normal_links(1, alpha_beta["combine"]),
        "low_latency": links,
        "overheads": {
            "step_s": _rounded(_step_s()),
            "layer_s": _rounded(1e-3 * (S5_LAYERS_MS - S5_OPERATIONS_MS) / (2 * 61)),
        },
        "overlap": {
            "sm_share": _rounded(S4_SM_SHARE),
            "supports_two_batch": True,
            "pipelined_stages": True,
            "exchange_slowdown": _rounded(_slowdown()),
            "held_s": _rounded(1e-6 * (S5_COMBINE_US - S5_CORE_US - S5_AFTER_CORE_US - S5_GATE_US)),
        },
        "range": {"tokens": [64, 16384], "context": [1024, 8192], "ranks": [8, 256]},
    }


def _tables() -> dict[str, Any]:
    whole = 1 - S4_SM_SHARE  # what a time on 108 SMs is on all
    tables = {f"gemm/float8/{n}x{k}": _dense_table(n, k) for n, k in DENSE_TFLOPS}
    tables[f"grouped_gemm/float8/{HIDDEN}x{EXPERT}"] = _grouped_table()
    ends = {"tokens": (S5_TOKENS, S4_TOKENS)}
    tables[f"elementwise/attention/{HIDDEN}"] = table_json(
        ends, [S5_ELEMENTWISE_US * 1e-6, S4_ELEMENTWISE_US * whole * 1e-6], kernel="S5, S4"
    )
    tables[f"gate/256x{HIDDEN}"] = table_json(
        ends, [S5_GATE_US * 1e-6, S4_GATE_US * whole * 1e-6], kernel="S5, S4"
    )
    return tables


def _dense_table(n: int, k: int) -> dict[str, Any]:
    """64 and 4096 rows as DeepGEMM publishes, 128 as S5 (or DeepGEMM) has it, 8192 as S4; between
    128 and 4096 the cubic mean of reading and computing, which gives the first two within 10 %."""
    peaks = DENSE_TFLOPS[n, k]
    flop = 2.0 * n * k
    at_64, at_128, at_4096 = (
        m * flop / (tflops * 1e12) for m, tflops in zip((64, 128, 4096), peaks, strict=True)
    )
    if (n, k) in S5_DENSE_US:
        at_128 = S5_DENSE_US[n, k] * 1e-6

    def between(m: int) -> float:
        read = (n * k + m * (k + 2 * n)) / BANDWIDTH
        compute = m * flop / (peaks[2] * 1e12)
        return float(LAUNCH_US * 1e-6 + np.cbrt(read**3 + compute**3))

    at_8192 = S4_DENSE_US[n, k] * (1 - S4_SM_SHARE) * 1e-6
    values = [at_64, at_128, *(max(at_128, between(m)) for m in _GRID), at_4096, at_8192]
    kernel = "DeepGEMM 2025-02 at 64, 4096; S5 at 128 where it has the shape; S4 at 8192; 256 to 2048 computed"
    return table_json({"tokens": (64, 128, *_GRID, 4096, 8192)}, values, kernel=kernel)


def _grouped_table() -> dict[str, Any]:
    """Few tokens an expert: masked layout, n experts, m rows each, at least the weights' reading,

        in situ x (compute n m + exposed reading n) + SwiGLU

    where DeepGEMM's three points at 1024 rows give compute and exposed reading, and S5 how much
    longer the same takes in place. Many tokens: contiguous layout, S4's time a row, permutation,
    SwiGLU and local sums included.
    """
    row_flop = 2.0 * HIDDEN * EXPERT * np.array([2, 1])
    measured = {n: 1024 * (row_flop / np.array(t) / 1e12).sum() for n, t in MASKED_TFLOPS.items()}
    row_s = float((row_flop / np.array(CONTIGUOUS_TFLOPS) / 1e12).sum())
    groups = np.array(list(measured))
    beyond = np.array(list(measured.values())) - 1024 * row_s
    expert_s = float((beyond * groups).sum() / (groups**2).sum())
    in_situ = S5_EXPERTS_US * 1e-6 / (1024 * row_s + 2 * expert_s)
    read_s = 3 * HIDDEN * EXPERT / BANDWIDTH
    s4_row_s = S4_EXPERTS_US * 1e-6 * (1 - S4_SM_SHARE) / (S4_TOKENS * TOP_K)

    def seconds(n: int, m: int) -> float:
        rows = n * m
        if m >= 2048:
            return rows * s4_row_s + n * expert_s
        swiglu = S5_SWIGLU_US * 1e-6 * (1 + rows / 1024) / 2
        computed = in_situ * (rows * row_s + n * expert_s)
        return swiglu + max(computed, n * read_s + 2 * LAUNCH_US * 1e-6)

    experts = (1, 2, 3, 4, 5, 6, 8, 9, 10, 16, 32)
    tokens = (1, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192, 16384)
    kernel = "fitted to DeepGEMM 2025-02, S5 (up to 1024 tokens) and S4 (from 2048)"
    return table_json(
        {"experts": experts, "tokens_per_expert": tokens},
        [[seconds(n, m) for m in tokens] for n in experts],
        kernel=kernel,
    )


def _low_latency_links(table: Mapping[int, tuple[float, float]]) -> dict[str, Any]:
    """With NVLink in the node: least squares from EP16 on, whose remote share differs; then EP8."""
    low_latency: dict[str, Any] = {}
    for i, (way, row) in enumerate((("dispatch", DISPATCH_ROW), ("combine", COMBINE_ROW))):
        sent = S1_TOKENS * TOP_K * row
        ranks = np.array([ep for ep in table if ep > 8])
        times = np.array([table[ep][i] for ep in ranks]) * 1e-6
        slope, alpha = np.polyfit(sent * (ranks - 8) / ranks, times, 1, w=1 / times)
        in_node = (table[8][i] * 1e-6 - alpha) / (sent * 7 / 8)
        low_latency[way] = {
            "node": {"alpha_s": _rounded(alpha), "beta": _rounded(1 / in_node)},
            "network": {"alpha_s": _rounded(alpha), "beta": _rounded(1 / slope)},
        }
    return {**low_latency, "network_only": False}


def _rdma_only(with_nvlink: Mapping[str, Any]) -> dict[str, Any]:
    """The same latency; bandwidth by least squares over EP16 to EP256 of the older table."""
    low_latency: dict[str, Any] = {}
    for i, (way, row) in enumerate((("dispatch", DISPATCH_ROW), ("combine", COMBINE_ROW))):
        alpha = with_nvlink[way]["network"]["alpha_s"]
        ranks = np.array([ep for ep in S1_RDMA if ep > 8])
        times = np.array([S1_RDMA[ep][i] for ep in ranks]) * 1e-6
        sent = S1_TOKENS * TOP_K * row * (ranks - 1) / ranks / times
        slope = float((sent * (1 - alpha / times)).sum() / (sent**2).sum())
        link = {"alpha_s": alpha, "beta": _rounded(1 / slope)}
        low_latency[way] = {"node": link, "network": link}
    return {**low_latency, "network_only": True}


def _normal_links(i: int, low_latency: Mapping[str, Any]) -> dict[str, Any]:
    """S2's bandwidths; latencies as S1 has them, S2 being too large to show any."""
    alpha = low_latency["network"]["alpha_s"]
    return {
        "node": {"alpha_s": alpha, "beta": _rounded(S2[8][i] * 1e9 * 7 / 8)},
        "network": {"alpha_s": alpha, "beta": _rounded(_s2_beta(i))},
    }


def _s2_beta(i: int) -> float:
    """Bytes/s on the wire, mean of EP32 and EP64: where the network is what limits."""
    return float(np.mean([S2[ep][i] * 1e9 * (1 - 8 / ep) for ep in (32, 64)]))


def _slowdown() -> float:
    """S4's exchanges, notification included, against the same bytes at S2's speed."""
    rows = S4_TOKENS * UNIFORM_NODES_S4
    alone = rows * DISPATCH_ROW / _s2_beta(0), rows * COMBINE_ROW / _s2_beta(1)
    beside = (
        (S4_DISPATCH_NOTIFY_US + S4_DISPATCH_US) * 1e-6,
        (S4_COMBINE_NOTIFY_US + S4_COMBINE_US) * 1e-6,
    )
    return float(np.mean([slow / fast for slow, fast in zip(beside, alone, strict=True)]))


def _s4_core_flops() -> float:
    pairs = S4_TOKENS * (4096 + 1) / 2
    return pairs * 2 * 128 * (128 + 64 + 128) / (S4_CORE_US * 1e-6 * (1 - S4_SM_SHARE))


def _step_s() -> float:
    """S5's step less its 61 layers, the speculative module's layer, and two output heads."""
    head_s = 2.0 * 129280 * HIDDEN * 256 / BFLOAT16
    return (S5_STEP_MS - S5_LAYERS_MS * 62 / 61) * 1e-3 - 2 * head_s


def _rounded(x: float) -> float:
    return float(f"{x:.4g}")


def text(name: str) -> str:
    return json.dumps(calibration(name), indent=1) + "\n"


if __name__ == "__main__":
    for _name in NAMES:
        (_DATA / f"{_name}.json").write_text(text(_name), encoding="utf-8")
