"""Our dense products at a model's sizes, as its layers call them: quantising the rows is part of FP8's.

Legend: T tokens, O out-features, I in-features, N heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from cluster.model.config import ModelConfig
from cluster.model.cuda.weights import Matrix
from experts.kernels import linear
from simulations import arithmetic
from simulations.arithmetic import Gemm
from simulations.hardware.gpu_grid import Grid
from simulations.hardware.gpu_meter import Meter
from simulations.hardware.gpu_timing import Timing

MOST_OUTPUTS = 1 << 29
"""Of a product; the output head's, in fp32, stop there."""


def product_grids(model: ModelConfig, rows: Sequence[int], dtype: str, meter: Meter) -> list[Grid]:
    """ "gemm/<dtype>/<n>x<k>" of attention and dense MLP; with bfloat16 also the head and
    "bmm/bfloat16/<heads>/<n>x<k>". Gates and shared experts have tables of their own."""
    work = arithmetic.attention(model)
    gemms = {*work.before, *work.after}
    if model.dense_intermediate_size and model.num_layers > model.num_moe_layers:
        gemms |= {*arithmetic.dense_mlp(model)}
    grids = [_whole(gemm, rows, dtype, meter) for gemm in _sorted(gemms) if gemm.count == 1]
    if dtype == "bfloat16":
        grids += [_per_head(gemm, rows, meter) for gemm in _sorted(gemms) if gemm.count > 1]
        grids.append(_head(arithmetic.head(model), rows, meter))
    return grids


def _sorted(gemms: set[Gemm]) -> list[Gemm]:
    return sorted(gemms, key=lambda gemm: (gemm.n, gemm.k))


def _whole(gemm: Gemm, rows: Sequence[int], dtype: str, meter: Meter) -> Grid:
    return Grid(
        name=f"gemm/{dtype}/{gemm.n}x{gemm.k}",
        axes={"tokens": rows},
        time=lambda tokens: _time(gemm, tokens, dtype == "float8", linear.linear, meter),
        fits=partial(_fits, gemm),
    )


def _head(gemm: Gemm, rows: Sequence[int], meter: Meter) -> Grid:
    def product(x_TI: Tensor, w_OI: Tensor, _scale: Tensor | None) -> Tensor:
        return linear.linear(x_TI, w_OI).float()

    return Grid(
        name=f"gemm/bfloat16/{gemm.n}x{gemm.k}",
        axes={"tokens": rows},
        time=lambda tokens: _time(gemm, tokens, False, product, meter),
        fits=partial(_fits, gemm),
        notes={"what": "with the logits' conversion to fp32"},
    )


def _fits(gemm: Gemm, tokens: int) -> bool:
    return tokens * gemm.n <= MOST_OUTPUTS


def _time(
    gemm: Gemm,
    tokens: int,
    float8: bool,
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    meter: Meter,
) -> Timing:
    x_TI = normal(meter, tokens, gemm.k)
    first = Matrix.of(normal(meter, gemm.n, gemm.k), float8=float8)

    def again() -> Matrix:
        scale = first.scale_PQ
        return Matrix(w_OI=first.w_OI.clone(), scale_PQ=None if scale is None else scale.clone())

    weights = meter.copies(again, first.num_bytes + 2.0 * tokens * (gemm.n + gemm.k))
    return meter.seconds([partial(product, x_TI, w.w_OI, w.scale_PQ) for w in weights])


def _per_head(gemm: Gemm, rows: Sequence[int], meter: Meter) -> Grid:
    """Of each head with its own matrix: MLA's maps between latent and heads."""
    heads = gemm.count

    def time(tokens: int) -> Timing:
        x_TNI = normal(meter, tokens, heads, gemm.k)
        num_bytes = 2.0 * heads * (gemm.n * gemm.k + tokens * (gemm.n + gemm.k))
        weights = meter.copies(lambda: normal(meter, heads, gemm.n, gemm.k), num_bytes)
        return meter.seconds([partial(linear.linears, x_TNI, w) for w in weights])

    return Grid(
        name=f"bmm/bfloat16/{heads}/{gemm.n}x{gemm.k}",
        axes={"tokens": rows},
        time=time,
        fits=lambda tokens: tokens * heads * max(gemm.n, gemm.k) <= MOST_OUTPUTS,
    )


def normal(meter: Meter, *shape: int) -> Tensor:
    """Random bfloat16 of deviation 1 over the root of the last size: products stay near 1."""
    values = torch.empty(shape, device=meter.device, dtype=torch.bfloat16)
    return values.normal_(std=shape[-1] ** -0.5)
