"""All measurements of this machine's processor: what a rank takes for its part of a layer while the
other ranks of a small cluster do the same.

A `Case` is one point of one table: (name of the table, sizes).
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from cluster.config import ServeConfig
from cluster.model.config import ModelConfig
from comms.groups import ParallelGroups
from comms.launch import RankPool
from comms.topology import Topology
from simulations import arithmetic
from simulations.hardware import cpu_exchange, cpu_layer
from simulations.hardware.cpu_tables import Case, cpu_tables, exchange_links
from simulations.hardware.cpu_timing import Call, Windows, undisturbed, window_means
from simulations.hardware.fit import fit_link, rounded
from simulations.hardware.shapes import product_shapes

Say = Callable[[str], None]
Times = dict[Case, list[float]]

LAYERS = 6  # whose weights calls take turns over
MOST_WEIGHTS = 1 << 26  # of one matrix
COPY_BYTES = 32 << 20
LAYOUT = Topology(num_nodes=2, ranks_per_node=2)
ONE_NODE = Topology(num_nodes=1, ranks_per_node=4)
RUN_TIMEOUT_S = 900.0
BUNDLED = Path(__file__).parents[2] / "deploy" / "models" / "mosaic"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured; `quick` is for trying the command."""

    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    experts: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    tokens_per_expert: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    sequences: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    contexts: tuple[int, ...] = (16, 64, 256, 1024)
    prompts: tuple[int, ...] = (16, 64, 256, 512)
    tokens: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    messages: tuple[int, ...] = tuple(1024 << (2 * i) for i in range(6))
    tensor_parallel_sizes: tuple[int, ...] = (1, 2)
    windows: Windows = field(default_factory=Windows)
    steps: int = 40
    check_sequences: tuple[int, ...] = (4, 16)

    @staticmethod
    def quick() -> Sizes:
        return Sizes(
            rows=(1, 16),
            experts=(1, 8),
            tokens_per_expert=(1, 16),
            sequences=(1, 8),
            contexts=(16, 64),
            prompts=(16, 64),
            tokens=(1, 16),
            messages=(1024, 65536),
            tensor_parallel_sizes=(2,),
            windows=Windows(seconds=0.005, rounds=2),
            steps=5,
            check_sequences=(4,),
        )


def measure(model: ModelConfig, sizes: Sizes, say: Say) -> dict[str, Any]:
    """What `calibrate.cpu_calibration` needs. Every time is that of a window that little disturbed."""
    load_before = os.getloadavg()[0]
    ranks = LAYOUT.world_size
    with RankPool(ranks) as pool:

        def times(what: str, topology: Topology, function: Callable[..., Times]) -> Any:
            say(what)
            by_rank = pool.run(function, topology, model, sizes, timeout_s=RUN_TIMEOUT_S)
            return {
                case: undisturbed([windows[case] for windows in by_rank]) for case in by_rank[0]
            }

        layers = times("layers", LAYOUT, time_layers)
        links = times("links", LAYOUT, time_links)
        inside = times("dispatch and combine inside a node", ONE_NODE, time_exchanges)
        across = times("dispatch and combine between nodes", LAYOUT, time_exchanges)
    tables = cpu_tables(model, layers)
    return {
        "tables": tables,
        "measured": {"memory_bandwidth": {"copy": rounded(2 * COPY_BYTES / layers["copy", ()])}},
        "links": {
            where: fit_link(sizes.messages, [links[where, (size,)] for size in sizes.messages])
            for where in ("node", "network")
        },
        **exchange_links(model, LAYOUT, across, ONE_NODE, inside),
        "memory_bytes": float(psutil.virtual_memory().total // ranks),
        "hardware": f"{os.cpu_count()} cores of {_processor()}, {ranks} ranks at once",
        "software": {"torch": torch.__version__, "python": platform.python_version()},
        "clocks": {"load_before": load_before, "load_after": os.getloadavg()[0]},
        "notes": (
            f"times are those of a rank while {ranks - 1} others do the same; step and layer "
            "overheads are what a real step of the bundled model on 2 x 2 ranks takes beyond the "
            "parts predicted, at one sequence per replica"
        ),
    }


def bundled_config() -> ServeConfig:
    """The bundled model on 2 x 2 ranks, otherwise as configured by default."""
    parallel = {"num_nodes": LAYOUT.num_nodes, "ranks_per_node": LAYOUT.ranks_per_node}
    return ServeConfig.from_dict(
        {
            "model": str(BUNDLED),
            "dtype": "bfloat16",
            "parallel": parallel,
            "cache": {"block_size": 32},
        }
    )


def time_layers(groups: ParallelGroups, model: ModelConfig, sizes: Sizes) -> Times:
    """Windows of everything that a rank does by itself."""
    torch.set_num_threads(1)
    with torch.inference_mode():
        return _rounds(
            sizes,
            lambda: {
                case: window_means(calls, groups.world, sizes.windows)
                for case, calls in _layer_cases(model, sizes)
            },
        )


def _rounds(sizes: Sizes, timed: Callable[[], Times]) -> Times:
    """The windows of all rounds together."""
    found: Times = {}
    for _ in range(sizes.windows.rounds):
        for case, windows in timed().items():
            found.setdefault(case, []).extend(windows)
    return found


def _layer_cases(model: ModelConfig, sizes: Sizes) -> Iterator[tuple[Case, list[Call]]]:
    x = torch.zeros(COPY_BYTES, dtype=torch.uint8)
    yield ("copy", ()), [x.clone]
    hidden, size = model.hidden_size, model.expert_intermediate_size
    tp_sizes = sizes.tensor_parallel_sizes
    shapes = sorted({shape for tp in tp_sizes for shape in product_shapes(model, tp)})
    for n, k in (shape for shape in shapes if shape[0] * shape[1] <= MOST_WEIGHTS):
        for rows in sizes.rows:
            yield (f"gemm/bfloat16/{n}x{k}", (rows,)), cpu_layer.product(rows, n, k, LAYERS)
    for rows in sizes.rows:
        yield (f"gate/{model.num_experts}x{hidden}", (rows,)), cpu_layer.gate(model, rows)
        around = cpu_layer.around_attention(model, rows)
        yield (f"elementwise/attention/{hidden}", (rows,)), around
    for number in (x for x in sizes.experts if x <= model.num_experts):
        for rows in sizes.tokens_per_expert:
            experts = cpu_layer.experts(model, number, rows, LAYERS)
            yield (f"grouped_gemm/bfloat16/{hidden}x{size}", (number, rows)), experts
    for tp in tp_sizes:
        yield from _attention_cases(model, sizes, tp)


def _attention_cases(
    model: ModelConfig, sizes: Sizes, tp: int
) -> Iterator[tuple[Case, list[Call]]]:
    work = arithmetic.attention(model, tp)
    for gemm in (*work.before, *work.after):
        if gemm.count > 1:
            for rows in sizes.rows:
                calls = cpu_layer.per_head(rows, gemm.count, gemm.n, gemm.k, LAYERS)
                yield (f"bmm/bfloat16/{gemm.count}/{gemm.n}x{gemm.k}", (rows,)), calls
    attention = cpu_layer.Attention.of(model, tp, max(*sizes.contexts, *sizes.prompts))
    for number in sizes.sequences:
        for context in sizes.contexts:
            calls = attention.decode(number, context)
            yield (f"attention/decode/{tp}", (number, context)), calls
    for prompt in sizes.prompts:
        yield (f"attention/prefill/{tp}", (prompt,)), attention.prefill(prompt)


def time_links(groups: ParallelGroups, model: ModelConfig, sizes: Sizes) -> Times:
    def timed() -> Times:
        found = cpu_exchange.link_windows(groups, sizes.messages, sizes.windows)
        return _by_size(found, sizes.messages)

    return _rounds(sizes, timed)


def time_exchanges(groups: ParallelGroups, model: ModelConfig, sizes: Sizes) -> Times:
    """ "dispatch" and "combine", with the formats that a server has by default."""
    comms = bundled_config().comms

    def timed() -> Times:
        found = cpu_exchange.layer_windows(
            groups,
            model,
            sizes.tokens,
            comms.all2all_backend,
            comms.dispatch_dtype,
            comms.combine,
            sizes.windows,
        )
        return _by_size(found, sizes.tokens)

    with torch.inference_mode():
        return _rounds(sizes, timed)


def _by_size(found: Mapping[str, list[list[float]]], sizes: tuple[int, ...]) -> Times:
    return {
        (what, (size,)): windows
        for what, by_size in found.items()
        for size, windows in zip(sizes, by_size, strict=True)
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
