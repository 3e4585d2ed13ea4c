"""What PyTorch's own kernels do on one GPU (and the link to a second one): a machine without our kernels.

Where PyTorch has none (latent attention in decode, norms with quantisation, the choice of experts), ours
stand in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from cluster.model.config import MlaConfig, ModelConfig
from simulations import arithmetic
from simulations.hardware import gpu_attention, gpu_links, gpu_occupied, gpu_products, gpu_rows
from simulations.hardware.gpu_grid import Part
from simulations.hardware.gpu_meter import GraphMeter
from simulations.hardware.own_attention import decode_grid
from simulations.hardware.own_grids import SKEWS
from simulations.hardware.shapes import product_shapes

ROWS = tuple(1 << i for i in range(15))  # 1 ... 16384


@dataclass(frozen=True, kw_only=True)
class LibrarySizes:
    """What is measured; `quick` is for trying the command."""

    rows: tuple[int, ...] = ROWS
    experts: tuple[int, ...] = (1, 2, 4, 5, 8, 9, 32)
    tokens_per_expert: tuple[int, ...] = ROWS[:11]
    sequences: tuple[int, ...] = ROWS[:9]
    contexts: tuple[int, ...] = tuple(512 << i for i in range(7))
    prompts: tuple[int, ...] = tuple(512 << i for i in range(6))
    queries: tuple[int, ...] = (1, 2)
    tensor_parallel_sizes: tuple[int, ...] = (1, 8)
    held: tuple[int, ...] = (8, 16, 24)
    skews: tuple[tuple[int, int], ...] = SKEWS

    @staticmethod
    def quick() -> LibrarySizes:
        return LibrarySizes(
            rows=(1, 16, 128, 1024),
            experts=(1, 4, 9),
            tokens_per_expert=(1, 16, 128),
            sequences=(1, 16, 128),
            contexts=(512, 4096),
            prompts=(512, 4096),
            queries=(1,),
            tensor_parallel_sizes=(1,),
            held=(24,),
        )


def library_parts(model: ModelConfig, sizes: LibrarySizes) -> list[tuple[str, Part]]:
    parts: list[tuple[str, Part]] = [
        ("bfloat16 products", lambda: _products(model, sizes, "bfloat16")),
        ("float8 products", lambda: _products(model, sizes, "float8")),
        ("bfloat16 experts", lambda: _experts(model, sizes, "bfloat16")),
        ("float8 experts", lambda: _experts(model, sizes, "float8")),
        ("rows", lambda: _rows(model, sizes)),
    ]
    parts.append(("attention", lambda: _attention(model, sizes)))
    parts.append(("work beside communication", lambda: _occupied(model, sizes)))
    if torch.cuda.device_count() > 1:
        parts.append(("links", lambda: ({}, {"link": gpu_links.link_times()})))
    return parts


def _products(
    model: ModelConfig, sizes: LibrarySizes, dtype: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    parallel = _divisors(model, sizes)
    shapes = sorted({shape for size in parallel for shape in product_shapes(model, size)})
    if dtype == "float8":
        scales, product = gpu_products.best_float8()
        kernel = f"_scaled_mm, {scales}"
        tables = gpu_products.gemm_tables("gemm/float8", product, shapes, sizes.rows, kernel=kernel)
        return tables, {}
    tables = gpu_products.gemm_tables("gemm/bfloat16", gpu_products.bfloat16, shapes, sizes.rows)
    for size in parallel:
        work = arithmetic.attention(model, size)
        for gemm in (*work.before, *work.after):
            if gemm.count > 1:
                shape = [(gemm.n, gemm.k)]
                tables |= gpu_products.per_head_tables(gemm.count, shape, sizes.rows)
    return tables, {}


def _divisors(model: ModelConfig, sizes: LibrarySizes) -> list[int]:
    """The tensor-parallel sizes that divide the model's heads."""
    return [size for size in sizes.tensor_parallel_sizes if model.attention.num_heads % size == 0]


def _experts(
    model: ModelConfig, sizes: LibrarySizes, dtype: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """And counts that differ, to see what the cost model makes of them."""
    experts = gpu_products.Experts(model.hidden_size, model.expert_intermediate_size, dtype)
    tables = experts.tables(sizes.experts, sizes.tokens_per_expert)
    skews = {
        ",".join(map(str, counts)): float(f"{experts.seconds(counts).p50:.4g}")
        for number, mean in sizes.skews
        for counts in gpu_products.skewed_counts(number, mean)
    }
    return tables, {f"skewed_experts_s/{dtype}": skews}


def _rows(model: ModelConfig, sizes: LibrarySizes) -> tuple[dict[str, Any], dict[str, Any]]:
    return gpu_rows.row_tables(model, sizes.rows) | gpu_rows.gate_tables(model, sizes.rows), {}


def _attention(model: ModelConfig, sizes: LibrarySizes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Decode by our kernel, of a rank of each tensor-parallel size; prompts by PyTorch's."""
    meter = GraphMeter(device=torch.device("cuda", torch.cuda.current_device()))
    tables: dict[str, Any] = {}
    for size in _divisors(model, sizes):
        heads = model.attention.num_heads // size
        part = replace(model, attention=replace(model.attention, num_heads=heads))
        for queries in sizes.queries:
            grid = decode_grid(part, sizes.sequences, sizes.contexts, meter, queries)
            tables[grid.name] = grid.table()
        if isinstance(model.attention, MlaConfig):
            tables |= gpu_attention.prefill_tables(heads, sizes.prompts)
    return tables, {}


def _occupied(model: ModelConfig, sizes: LibrarySizes) -> tuple[dict[str, Any], dict[str, Any]]:
    hidden, intermediate = model.hidden_size, model.expert_intermediate_size
    works = gpu_products.works(hidden, intermediate)
    return {}, {"held_multiprocessors": gpu_occupied.slowdowns(works, sizes.held)}
