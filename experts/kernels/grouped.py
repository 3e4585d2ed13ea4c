"""All experts of a rank at once: gate and up, SwiGLU, down, for rows of any number and division.

Two launches whatever the counts, which stay on the GPU: the call can be captured in a CUDA graph. A
pair's output depends on its row and its expert alone, bit for bit.

Legend: R rows, P = R * K places, H hidden, I intermediate, B buffers or blocks of 128.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from experts.kernels.down import down
from experts.kernels.early import early
from experts.kernels.gate_up import gate_up
from experts.kernels.grouped_hopper import hopper_rows, hopper_tiles
from experts.kernels.tiles import Tiles, most_tiles, slots_entries
from experts.kernels.types import BLOCK, DeviceExperts, QuantizedRows, SortedPairs
from experts.kernels.which_gpu import multiprocessors


def expert_ffn(
    x: Tensor | QuantizedRows,
    pairs: SortedPairs,
    experts: DeviceExperts,
    *,
    expected_pairs: int | None = None,
) -> Tensor:
    """y_PH bf16: w2 @ (silu(gate @ x) * (up @ x)) of each pair, unweighted, in sorted order.

    x: [R, H]; the row of a place is pair_P // K. bf16 weights take bf16 rows. FP8 weights take
    quantised rows, and the activations between the products are quantised alike (1 x 128); or bf16
    rows, and the weights become bf16 in the tile. Places beyond the last are left unwritten.

    expected_pairs: about how many pairs there will be, where most places stay empty; tiles are chosen
    for it. Raises ValueError for operands that do not fit together.
    """
    _check(x, experts)
    if not pairs.pair_P.shape[0]:
        return torch.empty(0, experts.hidden, device=pairs.pair_P.device, dtype=torch.bfloat16)
    num_pairs = pairs.pair_P.shape[0] if expected_pairs is None else expected_pairs
    quantized = isinstance(x, QuantizedRows)
    if tiles := hopper_tiles(experts, num_pairs, quantized=quantized):
        return hopper_rows(x, pairs, experts, tiles)
    first, second = plain_tiles(experts, quantized=quantized)
    return down_rows(gate_up_rows(x, pairs, experts, first), pairs, experts, second)


@dataclass(frozen=True, kw_only=True)
class Hidden:
    """Activations between the products: h_PI bf16, or e4m3 with scale_BP fp32."""

    h_PI: Tensor
    scale_BP: Tensor | None


MANY_TILES = 528
"""Tiles of the second product from which three programs to a multiprocessor pay: four for each."""


def plain_tiles(experts: DeviceExperts, *, quantized: bool) -> tuple[Tiles, Tiles]:
    """Of both products, for any GPU."""
    depth = 128 if experts.is_float8 else 64
    if experts.is_float8 and not quantized:
        both = Tiles(rows=64, features=128, depth=depth, warps=8, stages=3)
        return both, both
    first = 128 if experts.intermediate % 128 == 0 else 64
    second = 128 if experts.hidden % 128 == 0 else 64
    gate_up = Tiles(rows=64, features=first, depth=depth, warps=8, stages=4)
    crowded = experts.num_slots * (experts.hidden // second) > MANY_TILES
    down = Tiles(
        rows=64,
        features=second,
        depth=depth,
        stages=3 if crowded else 4,
        programs=3 if crowded else 2,
    )
    return gate_up, down


def gate_up_rows(
    x: Tensor | QuantizedRows, pairs: SortedPairs, experts: DeviceExperts, tiles: Tiles
) -> Hidden:
    """silu(gate @ x) * (up @ x) of each pair, in sorted order."""
    x_RH, x_scale = (x.q_RH, x.scale_RB) if isinstance(x, QuantizedRows) else (x, None)
    intermediate, num_places = experts.intermediate, pairs.pair_P.shape[0]
    h_PI = torch.empty(num_places, intermediate, device=x_RH.device, dtype=x_RH.dtype)
    scale_BP = None
    if x_scale is not None:
        scale_BP = torch.empty(intermediate // BLOCK, num_places, device=x_RH.device)
    gate_up[(_programs(pairs, experts, intermediate // tiles.features, tiles),)](
        x_RH, x_scale, _descriptor(experts.w13_BNH, x_scale, tiles), experts.w13_scale,
        experts.buffer_S, pairs.ends_S, pairs.pair_P, h_PI, scale_BP, num_places, experts.num_slots,
        H=experts.hidden, I=intermediate, K=pairs.num_topk, SLOTS=slots_entries(experts.num_slots),
        X8=x_scale is not None, W8=experts.is_float8,
        ROWS=tiles.rows, FEATURES=tiles.features, DEPTH=tiles.depth,
        num_warps=tiles.warps, num_stages=tiles.stages, **early(x_RH.device),
    )  # fmt: skip
    return Hidden(h_PI=h_PI, scale_BP=scale_BP)


def down_rows(hidden: Hidden, pairs: SortedPairs, experts: DeviceExperts, tiles: Tiles) -> Tensor:
    """w2 @ h of each pair, in sorted order: y_PH bf16."""
    h_PI, scale_BP = hidden.h_PI, hidden.scale_BP
    num_places = pairs.pair_P.shape[0]
    y_PH = torch.empty(num_places, experts.hidden, device=h_PI.device, dtype=torch.bfloat16)
    down[(_programs(pairs, experts, experts.hidden // tiles.features, tiles),)](
        TensorDescriptor.from_tensor(h_PI, [tiles.rows, tiles.depth]), scale_BP,
        _descriptor(experts.w2_BHI, scale_BP, tiles), experts.w2_scale,
        experts.buffer_S, pairs.ends_S, y_PH, num_places, experts.num_slots,
        H=experts.hidden, I=experts.intermediate, SLOTS=slots_entries(experts.num_slots),
        X8=scale_BP is not None, W8=experts.is_float8,
        ROWS=tiles.rows, FEATURES=tiles.features, DEPTH=tiles.depth,
        num_warps=tiles.warps, num_stages=tiles.stages, **early(h_PI.device),
    )  # fmt: skip
    return y_PH


def _programs(pairs: SortedPairs, experts: DeviceExperts, blocks: int, tiles: Tiles) -> int:
    """At most as many as the GPU runs at once: they take the tiles in turns."""
    needed = most_tiles(pairs.pair_P.shape[0], experts.num_slots, tiles)
    return min(needed * blocks, tiles.programs * multiprocessors(experts.buffer_S.device))


def _descriptor(weights: Tensor, scale: Tensor | None, tiles: Tiles) -> TensorDescriptor:
    """All buffers' rows below each other. FP8 beside bf16 rows is read as bytes."""
    rows = weights.flatten(0, 1)
    if rows.dtype == torch.float8_e4m3fn and scale is None:
        rows = rows.view(torch.uint8)
    return TensorDescriptor.from_tensor(rows, [tiles.features, tiles.depth])


def _check(x: Tensor | QuantizedRows, experts: DeviceExperts) -> None:
    quantized = isinstance(x, QuantizedRows)
    hidden, intermediate = experts.hidden, experts.intermediate
    channels = (x.q_RH if isinstance(x, QuantizedRows) else x).shape[1]
    if channels != hidden:
        raise ValueError(f"rows of {channels} channels for experts of hidden({hidden})")
    if quantized and not experts.is_float8:
        raise ValueError("bfloat16 experts take bfloat16 rows, not quantised ones")
    if experts.is_float8 and (hidden % BLOCK or intermediate % BLOCK):
        raise ValueError(
            f"FP8 experts need hidden({hidden}) and intermediate({intermediate}) in blocks of {BLOCK}"
        )
    if hidden % 64 or intermediate % 64:
        raise ValueError(
            f"hidden({hidden}) and intermediate({intermediate}) must be multiples of 64"
        )
