"""The experts' grouped products on a GPU: the hardware's floor, PyTorch's own kernels and ours.

    python3 -m simulations.bench.bench_experts --json FILE     (needs neither Ray nor an installation)

One expert layer of DeepSeek-V3's sizes unless told otherwise: E experts on the card, `rows` (token,
expert) pairs for all of them together, each of another token, as one card of many sees them. The floor of a point is the longer of two times: weights once
through memory at the rate of a large copy, and arithmetic at the rate of a large square product, both
measured in the same run. Every point draws new rows and checks ours against fp64 on dequantised weights.

Legend: E experts, H hidden, I intermediate, R rows, P pairs (here one a row).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from simulations.hardware.gpu_timing import seconds_of, warm_up

if TYPE_CHECKING:
    from experts.kernels.types import DeviceExperts, QuantizedRows, SortedPairs

FP8 = torch.float8_e4m3fn
POINTS = tuple(
    (experts, rows)
    for experts, sizes in (
        (4, (128, 256, 512, 1024, 4096, 16384)),
        (9, (256,)),
        (32, (256, 1024, 4096)),
    )
    for rows in sizes
)
CACHE_COPIES = 3  # as many layers' weights take turns: none is found in the L2 cache


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What this GPU does at best: bytes/s read and written, FLOP/s of a large product."""

    bytes_per_s: float
    bfloat16_flops: float
    float8_flops: float

    def floor_s(self, dtype: str, experts: int, rows: int, hidden: int, intermediate: int) -> float:
        weights = 3.0 * hidden * intermediate
        num_bytes = experts * weights * (1 if dtype == "float8" else 2)
        flops = self.float8_flops if dtype == "float8" else self.bfloat16_flops
        return max(num_bytes / self.bytes_per_s, 2 * rows * weights / flops)


def run(
    *,
    hidden: int = 7168,
    intermediate: int = 2048,
    points: Sequence[tuple[int, int]] = POINTS,
    dtypes: Sequence[str] = ("float8", "bfloat16"),
) -> dict[str, Any]:
    """{"device", "ceilings", "points": [{dtype, experts, rows, floor_us, ours_us, library_us, ...}]}.

    Raises RuntimeError without a CUDA GPU or Triton.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("bench experts --device cuda needs a CUDA GPU")
    warm_up()
    ceilings = measure_ceilings()
    rows_of = []
    for dtype in dtypes:
        most = max(experts for experts, _ in points)
        pool = Pool.random(dtype, most, hidden, intermediate)
        rows_of += [pool.point(experts, rows, ceilings) for experts, rows in points]
        del pool
        torch.cuda.empty_cache()
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "hidden": hidden,
        "intermediate": intermediate,
        "ceilings": {
            "copy_tb_per_s": round(ceilings.bytes_per_s / 1e12, 3),
            "bfloat16_tflops": round(ceilings.bfloat16_flops / 1e12),
            "float8_tflops": round(ceilings.float8_flops / 1e12),
        },
        "points": rows_of,
    }


def measure_ceilings(size: int = 8192) -> Ceilings:
    """A large copy; square products of random matrices through cuBLAS, FP8 with a scale per row."""
    x = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    x8, scale = x.to(FP8), torch.ones(size, 1, device="cuda")
    flop = 2.0 * size**3
    return Ceilings(
        bytes_per_s=copy_bandwidth(),
        bfloat16_flops=flop / seconds_of([lambda: x @ x]).p50,
        float8_flops=flop / seconds_of([lambda: _scaled_mm(x8, scale)]).p50,
    )


def copy_bandwidth(num_bytes: int = 4 << 30, times: int = 9) -> float:
    """Bytes/s read plus written of a copy between two buffers; not from a graph, which copies slower."""
    source = torch.randint(256, (num_bytes,), device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    target.copy_(source)
    for event in events[:-1]:
        event.record()
        target.copy_(source)
    events[-1].record()
    torch.cuda.synchronize()
    seconds: float = statistics.median(a.elapsed_time(b) / 1000 for a, b in pairwise(events))
    return 2 * num_bytes / seconds


def _scaled_mm(x8: Tensor, scale: Tensor) -> Tensor:
    product: Tensor = torch._scaled_mm(
        x8, x8.t(), scale_a=scale, scale_b=scale.t(), out_dtype=torch.bfloat16
    )
    return product


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Random weights of enough experts that some layers of them do not fit the L2 cache."""

    dtype: str
    experts: DeviceExperts

    @staticmethod
    def random(dtype: str, experts: int, hidden: int, intermediate: int) -> Pool:
        from experts.kernels.types import DeviceExperts

        num = max(experts, 4 * CACHE_COPIES)
        w13, w13_scale = random_weights(dtype, num, 2 * intermediate, hidden)
        w2, w2_scale = random_weights(dtype, num, hidden, intermediate)
        slots = torch.arange(num, device="cuda", dtype=torch.int32)
        return Pool(
            dtype=dtype,
            experts=DeviceExperts(
                w13_BNH=w13, w2_BHI=w2, buffer_S=slots, w13_scale=w13_scale, w2_scale=w2_scale
            ),
        )

    def layer(self, experts: int, first: int) -> DeviceExperts:
        """Slots that read buffers from `first` on."""
        from dataclasses import replace

        buffers = (torch.arange(experts, device="cuda") + first) % self.experts.num_slots
        return replace(self.experts, buffer_S=buffers.to(torch.int32))

    def point(self, experts: int, rows: int, ceilings: Ceilings) -> dict[str, Any]:
        """Times and error for `rows` pairs, equally many for each expert."""
        from experts.kernels.grouped import expert_ffn

        hidden, intermediate = self.experts.hidden, self.experts.intermediate
        layers = [
            self.layer(experts, experts * i)
            for i in range(max(1, min(CACHE_COPIES, self.experts.num_slots // experts)))
        ]
        pairs = random_pairs([rows // experts] * experts)
        x_RH = torch.randn(pairs.place_RK.shape[0], hidden, device="cuda", dtype=torch.bfloat16)
        x = quantized(x_RH) if self.dtype == "float8" else x_RH
        ours = seconds_of([lambda e=e: expert_ffn(x, pairs, e) for e in layers]).p50  # type: ignore[misc]
        products, whole = self._library(layers, pairs, x_RH)
        floor = ceilings.floor_s(self.dtype, experts, rows, hidden, intermediate)
        library = seconds_of(products).p50
        return {
            "dtype": self.dtype,
            "experts": experts,
            "rows": rows,
            "floor_us": round(1e6 * floor, 1),
            "ours_us": round(1e6 * ours, 1),
            "ours_over_floor": round(ours / floor, 3),
            "library_us": round(1e6 * library, 1),
            "library_with_activation_us": round(1e6 * seconds_of(whole).p50, 1),
            "speedup": round(library / ours, 3),
            **errors(expert_ffn(x, pairs, layers[0]), x, pairs, layers[0]),
        }

    def _library(
        self, layers: Sequence[DeviceExperts], pairs: SortedPairs, x_RH: Tensor
    ) -> tuple[list[Callable[[], Tensor]], list[Callable[[], Tensor]]]:
        """(both products alone, with gathering and SwiGLU between): torch's grouped products.

        FP8: one scale for each row of x and each out-feature, all that torch has; casts are in the
        second form.
        """
        row_P = pairs.pair_P.long()
        ends = pairs.ends_S
        sorted_PH = x_RH[row_P]
        float8 = self.dtype == "float8"
        hidden_PI = torch.randn(
            len(row_P), self.experts.intermediate, device="cuda", dtype=torch.bfloat16
        )
        products: list[Callable[[], Tensor]] = []
        whole: list[Callable[[], Tensor]] = []
        x, h = (_cast(sorted_PH), _cast(hidden_PI)) if float8 else (sorted_PH, hidden_PI)
        for layer in layers:
            first = int(layer.buffer_S[0])
            last = first + layer.num_slots
            if last > layer.w13_BNH.shape[0]:
                first, last = 0, layer.num_slots
            w13, w2 = layer.w13_BNH[first:last].mT, layer.w2_BHI[first:last].mT
            grouped = _float8_product(layer) if float8 else _product

            def both(w13: Tensor = w13, w2: Tensor = w2, g: Any = grouped) -> Tensor:
                g(x, w13, ends)
                y: Tensor = g(h, w2, ends)
                return y

            def ffn(w13: Tensor = w13, w2: Tensor = w2, g: Any = grouped) -> Tensor:
                rows = x_RH[row_P]
                gate, up = g(_cast(rows) if float8 else rows, w13, ends).chunk(2, 1)
                h_PI = torch.nn.functional.silu(gate) * up
                y: Tensor = g(_cast(h_PI) if float8 else h_PI, w2, ends)
                return y

            products.append(both)
            whole.append(ffn)
        return products, whole


def _product(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    y: Tensor = torch._grouped_mm(x, w, offs=ends)
    return y


def _cast(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 with one scale per row."""
    scale_P = x.abs().amax(1).float().clamp(min=1e-4) / 448
    return (x / scale_P[:, None]).to(FP8), scale_P


def _float8_product(
    layer: DeviceExperts,
) -> Callable[[tuple[Tensor, Tensor], Tensor, Tensor], Tensor]:
    ones = {
        n: torch.ones(layer.num_slots, n, device="cuda")
        for n in (layer.hidden, 2 * layer.intermediate)
    }

    def product(x: tuple[Tensor, Tensor], w: Tensor, ends: Tensor) -> Tensor:
        y: Tensor = torch._scaled_grouped_mm(
            x[0], w, x[1], ones[w.shape[2]], offs=ends, out_dtype=torch.bfloat16
        )
        return y

    return product


def random_weights(
    dtype: str, num: int, out_features: int, in_features: int
) -> tuple[Tensor, Tensor | None]:
    """[num, O, I] with in_features^-1/2 as deviation; e4m3 with a scale for each 128 x 128."""
    w = torch.empty(num, out_features, in_features, device="cuda", dtype=torch.bfloat16)
    for one in w:
        one.normal_(std=in_features**-0.5)
    if dtype != "float8":
        return w, None
    w8 = torch.empty_like(w, dtype=FP8)
    scale = torch.empty(num, out_features // 128, in_features // 128, device="cuda")
    for i, one in enumerate(w):
        blocks = one.float().view(out_features // 128, 128, in_features // 128, 128)
        scale[i] = blocks.abs().amax((1, 3)) / 448
        w8[i] = (blocks / scale[i][:, None, :, None]).view(out_features, in_features).to(FP8)
    return w8, scale


def random_pairs(counts: Sequence[int]) -> SortedPairs:
    """So many pairs for each slot; rows are gathered in random order."""
    from experts.kernels.types import SortedPairs

    pair_P = torch.randperm(sum(counts), device="cuda").to(torch.int32)
    place_P = torch.empty_like(pair_P)
    place_P[pair_P.long()] = torch.arange(len(pair_P), device="cuda", dtype=torch.int32)
    ends = torch.tensor(counts, device="cuda").cumsum(0).to(torch.int32)
    return SortedPairs(pair_P=pair_P, place_RK=place_P[:, None], ends_S=ends)


def quantized(x_RH: Tensor) -> QuantizedRows:
    """e4m3 with a scale for each 128 channels, as comms/codecs.py has it."""
    from experts.kernels.types import QuantizedRows

    x_RBC = x_RH.float().unflatten(1, (-1, 128))
    scale_RB = x_RBC.abs().amax(2).clamp(min=1e-4) / 448
    return QuantizedRows(q_RH=(x_RBC / scale_RB[:, :, None]).flatten(1).to(FP8), scale_RB=scale_RB)


def errors(
    y_PH: Tensor, x: Tensor | QuantizedRows, pairs: SortedPairs, layer: DeviceExperts
) -> dict[str, float]:
    """Median and worst relative L2 of a row, against fp64 on what the kernels are given.

    At most 64 rows of each slot are looked at.
    """
    if isinstance(x, Tensor):
        rows_RH = x.double()
    else:
        blocks_RBC = x.q_RH.double().unflatten(1, (-1, 128)) * x.scale_RB.double()[:, :, None]
        rows_RH = blocks_RBC.flatten(1)
    parts, first = [], 0
    for slot, end in enumerate(pairs.ends_S.tolist()):
        places = torch.arange(first, min(end, first + 64), device="cuda")
        first = end
        buffer = int(layer.buffer_S[slot])
        w13 = dequantized(layer.w13_BNH, layer.w13_scale, buffer)
        w2 = dequantized(layer.w2_BHI, layer.w2_scale, buffer)
        gate, up = (rows_RH[pairs.pair_P[places].long()] @ w13.T).chunk(2, 1)
        expected = (torch.nn.functional.silu(gate) * up) @ w2.T
        parts.append((y_PH[places].double() - expected).norm(dim=1) / expected.norm(dim=1))
    error_P = torch.cat(parts).nan_to_num(nan=float("inf"))
    return {
        "relative_l2": float(f"{error_P.median():.2g}"),
        "worst_relative_l2": float(f"{error_P.max():.2g}"),
    }


def dequantized(weights: Tensor, scales: Tensor | None, buffer: int) -> Tensor:
    """One buffer's weights in fp64."""
    w = weights[buffer].double()
    if scales is None:
        return w
    rows, columns = w.shape
    blocks = (
        w.view(rows // 128, 128, columns // 128, 128) * scales[buffer].double()[:, None, :, None]
    )
    return blocks.view(rows, columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    path = parser.parse_args().json
    report = run()
    print(report["device"], report["ceilings"])
    for point in report["points"]:
        print(*(f"{name} {value}" for name, value in point.items()), sep=", ")
    if path:
        path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
