"""All measurements of one GPU (and of the link to a second one, if there is one)."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from cluster.model.config import MlaConfig, ModelConfig
from simulations import arithmetic
from simulations.hardware import gpu_links, gpu_occupied, gpu_products, gpu_rows
from simulations.hardware.gpu_timing import ClockLog, warm_up
from simulations.hardware.shapes import product_shapes

Say = Callable[[str], None]

ROWS = tuple(1 << i for i in range(15))  # 1 ... 16384
SKEWS = ((4, 64), (8, 16), (8, 128), (32, 32))  # experts of a rank, mean rows of each


@dataclass(frozen=True, kw_only=True)
class Sizes:
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

    @staticmethod
    def quick() -> Sizes:
        return Sizes(
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


def measure(model: ModelConfig, sizes: Sizes, say: Say) -> dict[str, Any]:
    """{"tables", "measured", "memory_bytes", "hardware", "software", "clocks"}.

    say: told the name of each part as it starts.
    """
    torch.cuda.init()
    tables: dict[str, Any] = {}
    measured: dict[str, Any] = {}
    with ClockLog() as clocks, torch.inference_mode():
        warm_up()
        for name, part in _parts(model, sizes):
            say(name)
            found, others = part()
            tables |= found
            measured |= others
            torch.cuda.empty_cache()
    properties = torch.cuda.get_device_properties(0)
    return {
        "tables": tables,
        "measured": measured,
        "memory_bytes": float(properties.total_memory),
        "hardware": f"{torch.cuda.device_count()} x {properties.name}",
        "software": _software(),
        "clocks": clocks.summary(),
    }


def _software() -> dict[str, str]:
    versions = {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.CalledProcessError):
        found = subprocess.run(query, capture_output=True, text=True, check=True)
        versions["driver"] = found.stdout.split()[0]
    with suppress(ImportError):
        import triton

        versions["triton"] = triton.__version__
    return versions


Part = Callable[[], tuple[dict[str, Any], dict[str, Any]]]
"""Tables, and what is no table."""


def _parts(model: ModelConfig, sizes: Sizes) -> list[tuple[str, Part]]:
    parts: list[tuple[str, Part]] = [
        ("memory and launches", _memory),
        ("bfloat16 products", lambda: _products(model, sizes, "bfloat16")),
        ("float8 products", lambda: _products(model, sizes, "float8")),
        ("bfloat16 experts", lambda: _experts(model, sizes, "bfloat16")),
        ("float8 experts", lambda: _experts(model, sizes, "float8")),
        ("rows", lambda: _rows(model, sizes)),
    ]
    if isinstance(model.attention, MlaConfig):
        parts.append(("attention", lambda: _attention(model, sizes)))
    parts.append(("work beside communication", lambda: _occupied(model, sizes)))
    if torch.cuda.device_count() > 1:
        parts.append(("links", lambda: ({}, {"link": gpu_links.link_times()})))
    return parts


def _memory() -> tuple[dict[str, Any], dict[str, Any]]:
    bandwidth, launches = gpu_rows.memory_bandwidth(), gpu_rows.launch_seconds()
    return {}, {"memory_bandwidth": bandwidth, "launch_s": launches}


def _products(
    model: ModelConfig, sizes: Sizes, dtype: str
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


def _divisors(model: ModelConfig, sizes: Sizes) -> list[int]:
    """The tensor-parallel sizes that divide the model's heads."""
    return [size for size in sizes.tensor_parallel_sizes if model.attention.num_heads % size == 0]


def _experts(model: ModelConfig, sizes: Sizes, dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """And counts that differ, to see what the cost model makes of them."""
    experts = gpu_products.Experts(model.hidden_size, model.expert_intermediate_size, dtype)
    tables = experts.tables(sizes.experts, sizes.tokens_per_expert)
    skews = {
        ",".join(map(str, counts)): float(f"{experts.seconds(counts).p50:.4g}")
        for number, mean in SKEWS
        for counts in gpu_products.skewed_counts(number, mean)
    }
    return tables, {f"skewed_experts_s/{dtype}": skews}


def _rows(model: ModelConfig, sizes: Sizes) -> tuple[dict[str, Any], dict[str, Any]]:
    tables = gpu_rows.row_tables(model, sizes.rows)
    if model.gate.num_groups == 1:
        return tables, {}  # our kernel chooses among groups
    tables |= gpu_rows.gate_tables(model, sizes.rows)
    return tables, {"gate_disagreement": gpu_rows.gate_disagreement(model)}


def _attention(model: ModelConfig, sizes: Sizes) -> tuple[dict[str, Any], dict[str, Any]]:
    from simulations.hardware import gpu_attention  # needs Triton

    tables: dict[str, Any] = {}
    measured: dict[str, Any] = {}
    for size in _divisors(model, sizes):
        heads = model.attention.num_heads // size
        decode = gpu_attention.MlaDecode(heads)
        for queries in sizes.queries:
            tables |= decode.tables(sizes.sequences, sizes.contexts, queries)
        tables |= gpu_attention.prefill_tables(heads, sizes.prompts)
        measured[f"mla_decode/{heads}"] = {
            "relative_l2": float(f"{decode.error():.3g}"),
            "tiles_s": decode.tried,
            "held_multiprocessors": gpu_occupied.slowdowns(
                {"64 sequences x 4096": decode.work()}, sizes.held
            ),
        }
    return tables, measured


def _occupied(model: ModelConfig, sizes: Sizes) -> tuple[dict[str, Any], dict[str, Any]]:
    hidden, intermediate = model.hidden_size, model.expert_intermediate_size
    works = gpu_products.works(hidden, intermediate)
    return {}, {"held_multiprocessors": gpu_occupied.slowdowns(works, sizes.held)}
