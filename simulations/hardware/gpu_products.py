"""Matrix products of a GPU at a model's sizes: plain, batched by head, and grouped by expert.

BF16 through cuBLAS and `torch._grouped_mm`; FP8 through `torch._scaled_mm`, with DeepSeek's scales (one
per 128 channels of a row, one per 128 x 128 weights) where this library has kernels for them and one
per row otherwise, and `torch._scaled_grouped_mm` (per row). Weights are random: zeros run faster.

Legend: M rows, N out-features, K in-features, G experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simulations.hardware.gpu_timing import Timing, copies_of, seconds_of
from simulations.hardware.tables import table_json

FP8 = torch.float8_e4m3fn
Product = Callable[[int, int, int], Timing]
"""Seconds of one product by (M, N, K)."""

MOST_OUTPUTS = 1 << 30  # of a product; the output head's stop at 8192 rows


def gemm_tables(
    name: str,
    product: Product,
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    **notes: Any,
) -> dict[str, Any]:
    """{"<name>/<n>x<k>": table over "tokens"}."""
    return {f"{name}/{n}x{k}": _gemm_table(product, n, k, rows, **notes) for n, k in shapes}


def _gemm_table(
    product: Product, n: int, k: int, rows: Sequence[int], **notes: Any
) -> dict[str, Any]:
    fitting = [m for m in rows if m * n <= MOST_OUTPUTS]
    times = [product(m, n, k) for m in fitting]
    spread_of = {"p99_over_p50": spread(times)}
    return table_json({"tokens": fitting}, [t.p50 for t in times], **notes, **spread_of)


def spread(times: Any) -> float:
    """Median over measurements of the 99th percentile over the median."""
    return round(float(np.median([t.p99 / t.p50 for t in times])), 4)


def bfloat16(m: int, n: int, k: int) -> Timing:
    x_MK = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    weights = copies_of(
        lambda: torch.randn(n, k, device="cuda", dtype=torch.bfloat16), 2.0 * (n * k + m * (n + k))
    )
    return seconds_of([lambda w=w: torch.mm(x_MK, w.t()) for w in weights])  # type: ignore[misc]


def float8_rows(m: int, n: int, k: int) -> Timing:
    """One scale per row of x and of the weight."""
    x_MK, scale_M1 = random_float8(m, k), torch.ones(m, 1, device="cuda")
    scale_1N = torch.ones(1, n, device="cuda")
    weights = copies_of(lambda: random_float8(n, k), n * k + m * (2.0 * n + k))
    return seconds_of(
        [lambda w=w: scaled_mm(x_MK, w, scale_M1, scale_1N) for w in weights]  # type: ignore[misc]
    )


def float8_blocks(m: int, n: int, k: int) -> Timing:
    """One scale per 128 channels of x's rows, one per 128 x 128 of the weight. M in fours."""
    m = -(-m // 4) * 4
    x_MK = random_float8(m, k)
    scale_MB = torch.ones(k // 128, m, device="cuda").t()
    scale_BN = torch.ones(-(-n // 128), k // 128, device="cuda").t()
    weights = copies_of(lambda: random_float8(n, k), n * k + m * (2.0 * n + k))
    return seconds_of(
        [lambda w=w: scaled_mm(x_MK, w, scale_MB, scale_BN) for w in weights]  # type: ignore[misc]
    )


def scaled_mm(x_MK: Tensor, w_NK: Tensor, scale_x: Tensor, scale_w: Tensor) -> Tensor:
    product: Tensor = torch._scaled_mm(
        x_MK, w_NK.t(), scale_a=scale_x, scale_b=scale_w, out_dtype=torch.bfloat16
    )
    return product


def best_float8() -> tuple[str, Product]:
    """("float8_blocks" or "float8_rows", the product): DeepSeek's scales if this library has them."""
    try:
        float8_blocks(128, 256, 512)
    except (RuntimeError, ValueError):
        torch.cuda.synchronize()
        return "one scale per row", float8_rows
    return "1x128 and 128x128 scales", float8_blocks


def random_float8(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).to(FP8)


def per_head_tables(
    num_heads: int, shapes: Sequence[tuple[int, int]], rows: Sequence[int]
) -> dict[str, Any]:
    """BF16 products of each head with its own [K, N] matrix: how MLA absorbs its up-projections."""

    def product(m: int, n: int, k: int) -> Timing:
        x = torch.randn(num_heads, m, k, device="cuda", dtype=torch.bfloat16)
        make = lambda: torch.randn(num_heads, k, n, device="cuda", dtype=torch.bfloat16)  # noqa: E731
        weights = copies_of(make, 2.0 * num_heads * (n * k + m * (n + k)))
        return seconds_of([lambda w=w: torch.bmm(x, w) for w in weights])  # type: ignore[misc]

    return gemm_tables(f"bmm/bfloat16/{num_heads}", product, shapes, rows)


class Experts:
    """Grouped products of G experts, w13 [2I, H] and w2 [H, I], in one dtype."""

    def __init__(self, hidden: int, intermediate: int, dtype: str) -> None:
        self.hidden, self.intermediate, self.dtype = hidden, intermediate, dtype

    def seconds(self, counts_G: Sequence[int]) -> Timing:
        """Of both products together, for these numbers of rows."""
        parts = [
            self._product(counts_G, 2 * self.intermediate, self.hidden),
            self._product(counts_G, self.hidden, self.intermediate),
        ]
        return Timing(p50=sum(t.p50 for t in parts), p99=sum(t.p99 for t in parts))

    def tables(self, experts: Sequence[int], rows: Sequence[int]) -> dict[str, Any]:
        """One table, axes "experts" and "tokens_per_expert", all experts having equally many."""
        times = [[self.seconds([m] * g) for m in rows] for g in experts]
        table = table_json(
            {"experts": experts, "tokens_per_expert": rows},
            [[t.p50 for t in row] for row in times],
            p99_over_p50=spread(t for row in times for t in row),
            what="both products of all experts; without the activation between them",
        )
        return {f"grouped_gemm/{self.dtype}/{self.hidden}x{self.intermediate}": table}

    def _product(self, counts_G: Sequence[int], n: int, k: int) -> Timing:
        num_rows, num_experts = sum(counts_G), len(counts_G)
        ends_G = torch.tensor(np.cumsum(counts_G), device="cuda", dtype=torch.int32)
        if self.dtype == "bfloat16":
            x = torch.randn(num_rows, k, device="cuda", dtype=torch.bfloat16)
            weights = copies_of(
                lambda: _expert_weights(num_experts, n, k), 2.0 * num_experts * n * k
            )
            return seconds_of(
                [lambda w=w: torch._grouped_mm(x, w.mT, offs=ends_G) for w in weights]  # type: ignore[misc]
            )
        x, scale_M = random_float8(num_rows, k), torch.ones(num_rows, device="cuda")
        scale_GN = torch.ones(num_experts, n, device="cuda")
        weights = copies_of(
            lambda: _expert_weights(num_experts, n, k).to(FP8), float(num_experts * n * k)
        )
        return seconds_of(
            [
                lambda w=w: torch._scaled_grouped_mm(  # type: ignore[misc]
                    x, w.mT, scale_M, scale_GN, offs=ends_G, out_dtype=torch.bfloat16
                )
                for w in weights
            ]
        )


def _expert_weights(num_experts: int, n: int, k: int) -> Tensor:
    return torch.randn(num_experts, n, k, device="cuda", dtype=torch.bfloat16)


def skewed_counts(num_experts: int, mean: int) -> list[list[int]]:
    """The same number of rows spread evenly, as 1/rank^1.2, and all to one expert."""
    total = num_experts * mean
    weight_G = 1.0 / np.arange(1, num_experts + 1) ** 1.2
    zipf_G = np.floor(weight_G / weight_G.sum() * total).astype(int)
    zipf_G[0] += total - zipf_G.sum()
    return [[mean] * num_experts, zipf_G.tolist(), [total] + [0] * (num_experts - 1)]


def works(hidden: int, intermediate: int) -> dict[str, Callable[[], object]]:
    """Ready calls of typical sizes, to be run beside something else."""
    calls: dict[str, Callable[[], object]] = {}
    w = torch.randn(2 * intermediate, hidden, device="cuda", dtype=torch.bfloat16)
    w8, scale_1N = w.to(FP8), torch.ones(1, 2 * intermediate, device="cuda")
    for rows in (128, 4096):
        x = torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16)
        size, scale_M1 = f"{rows}x{2 * intermediate}x{hidden}", torch.ones(rows, 1, device="cuda")
        calls[f"bfloat16 {size}"] = lambda x=x: torch.mm(x, w.t())  # type: ignore[misc]
        x8 = x.to(FP8)
        calls[f"float8 {size}"] = lambda x=x8, s=scale_M1: scaled_mm(x, w8, s, scale_1N)  # type: ignore[misc]
    experts = _expert_weights(8, 2 * intermediate, hidden)
    ends = torch.arange(1, 9, device="cuda", dtype=torch.int32) * 256
    rows_of_experts = torch.randn(2048, hidden, device="cuda", dtype=torch.bfloat16)
    calls["bfloat16 8 experts x 256 rows"] = lambda: torch._grouped_mm(
        rows_of_experts, experts.mT, offs=ends
    )
    return calls
