"""A whole expert layer on one GPU, as one card of 64 sees DeepSeek-V3's: time, floor, share of each part.

    python3 -m simulations.bench.bench_moe_gpu --json FILE     (needs neither Ray nor an installation)

64 cards hold 256 experts, so each has 4 and a shared expert of its own. With t tokens on every card and
8 experts a token, 64 t * 8 / 256 = 2 t pairs go to each expert: 8 t on a card, in about 7.64 t rows (a
token whose 8 experts are drawn evenly has at least one of these 4 with probability 1 - C(252, 8) /
C(256, 8) = 0.1194). A card does:

    of its own t tokens    gate, choice, shared expert; at last the sum of up to 8 t partial sums
    of the rows it gets    sort by expert, grouped products, one weighted sum for each row

Bytes on the wire are somebody else's (`bench dispatch`): rows arrive quantised here, partial sums are
there. The floor is the longer of two times: what has to pass through memory (weights; rows, tokens and
partial sums in; partial sums and outputs out) at the best rate of a large copy or read, and the
arithmetic at that of a large product. What stays inside the layer is not in it.

Legend: T tokens, R received rows, P pairs, H hidden, I intermediate, E experts, K experts per token.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from simulations.bench.bench_experts import measure_ceilings
from simulations.bench.card_layers import CardLayers
from simulations.bench.card_step import CARDS, EXPERTS
from simulations.hardware.gpu_rows import memory_bandwidth
from simulations.hardware.gpu_timing import warm_up

TOKENS = (16, 128)
"""On each card: 128 and 1,024 pairs for the four experts of one."""


def run(
    *,
    hidden: int = 7168,
    intermediate: int = 2048,
    tokens: Sequence[int] = TOKENS,
    dtype: str = "float8",
) -> dict[str, Any]:
    """{"device", "ceilings", "cases": [{tokens, rows, pairs, layer_us, floor_us, parts: {...}}]}.

    Raises RuntimeError without a CUDA GPU.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("bench experts --layer needs a CUDA GPU")
    warm_up()
    ceilings = measure_ceilings()
    fastest = max(ceilings.bytes_per_s, *memory_bandwidth().values())
    ceilings = replace(ceilings, bytes_per_s=fastest)
    cases = [CardLayers(count, hidden, intermediate, dtype).measure(ceilings) for count in tokens]
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "hidden": hidden,
        "intermediate": intermediate,
        "dtype": dtype,
        "cards": CARDS,
        "experts_per_card": EXPERTS,
        "ceilings": {
            "memory_tb_per_s": round(ceilings.bytes_per_s / 1e12, 3),
            "float8_tflops": round(ceilings.float8_flops / 1e12),
            "bfloat16_tflops": round(ceilings.bfloat16_flops / 1e12),
        },
        "cases": cases,
    }


def table(report: dict[str, Any]) -> str:
    """The report as lines of text."""
    lines = [f"{report['device']}: {report['dtype']}, one of {CARDS} cards, microseconds"]
    for case in report["cases"]:
        lines.append(
            f"{case['tokens']} tokens a card, {case['rows']:.0f} rows, {case['pairs']:.0f} pairs: "
            f"layer {case['layer_us']} (one stream {case['one_stream_us']}), floor "
            f"{case['floor_us']} (memory {case['memory_us']}, arithmetic {case['arithmetic_us']}), "
            f"{case['over_floor']} x floor"
        )
        for name, time in case["parts_us"].items():
            more = case["with_gaps_us"].get(name)
            gaps = f"   {more} in a buffer with a place for every token" if more else ""
            if name == "experts":
                gaps += f"; {case['experts_with_even_counts_us']} with even counts"
            lines.append(f"    {name:<15}{time:>8.2f}{100 * case['share'][name]:>7.1f} %{gaps}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--dtype", choices=("float8", "bfloat16"), default="float8")
    arguments = parser.parse_args()
    report = run(dtype=arguments.dtype)
    print(table(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
