"""All experts at once on a Hopper GPU: both products in one launch (experts/kernels/hopper_ffn.py).

Legend: as experts/kernels/grouped.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from experts.kernels.counters import counters
from experts.kernels.early import early
from experts.kernels.hopper_ffn import hopper_ffn
from experts.kernels.hopper_words import TOLD
from experts.kernels.tiles import Tiles, most_tiles, slots_entries
from experts.kernels.types import BLOCK, DeviceExperts, QuantizedRows, SortedPairs
from experts.kernels.which_gpu import is_hopper, multiprocessors


def hopper_tiles(experts: DeviceExperts, num_pairs: int, *, quantized: bool) -> Tiles | None:
    """For so many pairs, what was fastest on an H200: a matter of speed, no bit depends on it.

    None where these kernels cannot be used. Tried with 4, 9 and 32 experts of DeepSeek-V3's sizes and 64
    of DeepSeek-V2-Lite's. As many stages as shared memory holds, but for 64 rows in FP8, where 6 are
    1 to 3 % faster than 8.
    """
    float8 = experts.is_float8
    if (
        not is_hopper(experts.buffer_S.device)
        or float8 != quantized
        or experts.intermediate % BLOCK
        or experts.hidden % (2 * BLOCK)
    ):
        return None
    depth = BLOCK if float8 else BLOCK // 2
    if num_pairs <= 64 * experts.num_slots:
        return Tiles(rows=64, features=64, depth=depth, stages=6 if float8 else 8)
    narrow = Tiles(rows=128, features=64, depth=depth, stages=6)
    programs = experts.num_slots * -(-num_pairs // (experts.num_slots * narrow.rows))
    programs *= experts.intermediate // narrow.features
    if programs <= multiprocessors(experts.buffer_S.device):
        return narrow
    return Tiles(rows=128, features=128, depth=depth, stages=4)


def hopper_rows(
    x: Tensor | QuantizedRows, pairs: SortedPairs, experts: DeviceExperts, tiles: Tiles
) -> Tensor:
    """As `expert_ffn`, with these tiles."""
    x_RH, x_scale = (x.q_RH, x.scale_RB) if isinstance(x, QuantizedRows) else (x, None)
    device, num_places = x_RH.device, pairs.pair_P.shape[0]
    hidden, intermediate = experts.hidden, experts.intermediate
    h_PI = torch.empty(num_places, intermediate, device=device, dtype=x_RH.dtype)
    y_PH = torch.empty(num_places, hidden, device=device, dtype=torch.bfloat16)
    h_scale = None
    if x_scale is not None:
        h_scale = torch.empty(intermediate // BLOCK, num_places, device=device)
    tiles_of_rows = most_tiles(num_places, experts.num_slots, tiles)
    blocks = max(intermediate // tiles.features, hidden // (2 * tiles.features))
    grid = min(tiles_of_rows * blocks, multiprocessors(device))  # all of them run at once
    grid -= grid % 2  # neighbours work together
    hopper_ffn[(grid,)](
        x_RH, x_scale, _descriptor(experts.w13_BNH, tiles.features, tiles), experts.w13_scale,
        experts.buffer_S, pairs.ends_S, pairs.pair_P,
        h_PI, h_scale, _descriptor(h_PI, tiles.rows, tiles),
        _descriptor(experts.w2_BHI, tiles.features, tiles), experts.w2_scale, y_PH,
        counters(device, grid * TOLD.value + 1 + tiles_of_rows), num_places, experts.num_slots,
        H=hidden, I=intermediate, K=pairs.num_topk, SLOTS=slots_entries(experts.num_slots),
        X8=x_scale is not None, ROWS=tiles.rows, FEATURES=tiles.features, DEPTH=tiles.depth,
        STAGES=tiles.stages, num_warps=4, **early(device),
    )  # fmt: skip
    return y_PH


def _descriptor(matrix: Tensor, rows: int, tiles: Tiles) -> TensorDescriptor:
    """Of so many rows or features and 128 bytes of channels; all buffers' rows below each other."""
    layout = gl.NVMMASharedLayout(128, 8 * matrix.element_size(), 2)
    return TensorDescriptor.from_tensor(matrix.flatten(0, -2), [rows, tiles.depth], layout)
