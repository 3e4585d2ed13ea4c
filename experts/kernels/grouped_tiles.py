"""Which tiles a grouped product runs with: what was fastest on an H200 among those tried.

With 4, 9 and 32 experts of DeepSeek-V3's sizes, and 64 of DeepSeek-V2-Lite's.
"""

from __future__ import annotations

from dataclasses import replace

from experts.kernels.tiles import Tiles
from experts.kernels.types import DeviceExperts
from experts.kernels.which_gpu import is_hopper

MANY_TILES = 528
"""Tiles of the second product from which three programs to a multiprocessor pay: four for each."""

FEW_TILES = 150
"""Tiles of the first product, of 128 channels each, up to which twice as many of 64 are faster."""


def tiles_for(experts: DeviceExperts, num_pairs: int, *, quantized: bool) -> tuple[Tiles, Tiles]:
    """The tiles of both products for so many pairs: a matter of speed, no bit depends on it."""
    float8, rows = experts.is_float8, num_pairs / experts.num_slots
    depth = 128 if float8 else 64
    if float8 and not quantized:
        both = Tiles(rows=64, features=128, depth=depth, warps=8, stages=3)
        return both, both
    hopper = is_hopper(experts.buffer_S.device)
    first = 128 if experts.intermediate % 128 == 0 else 64
    second = 128 if experts.hidden % 128 == 0 else 64
    deep = 5 if hopper and not float8 else 4  # as many as its shared memory holds
    gate_up = Tiles(rows=64, features=first, depth=depth, warps=8, stages=deep)
    crowded = experts.num_slots * (experts.hidden // second) > MANY_TILES
    down = Tiles(
        rows=64,
        features=second,
        depth=depth,
        warps=4,
        stages=3 if crowded else 4,
        programs=3 if crowded else 2,
    )
    if not hopper or first != 128 or experts.hidden % 256:
        return gate_up, down
    most = Tiles(rows=128, features=128, depth=depth, warps=4, stages=4, specialised=True)
    spread = replace(most, rows=64, features=64, stages=8)
    crowd = min(num_pairs, experts.num_slots) * (experts.intermediate // 128)
    if crowd <= FEW_TILES and rows <= 1:
        return spread, replace(spread, stages=6)
    if float8 and rows <= 64:
        return spread, down
    if float8 and rows <= 128 and crowd <= FEW_TILES:
        return replace(most, features=64, stages=6), most
    return (most, most) if rows > 64 else (gate_up, down)
