"""How dense products are cut: tiles and parts, by the weight's shape and the number of tokens.

Parts decide in which order a row's products are added, so they follow from the weight alone; tiles decide
nothing but speed.

Legend: T tokens, O output and I input channels, N independent products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from experts.kernels.types import BLOCK

MULTIPROCESSORS = 132
"""Of a Hopper GPU: what tiles are chosen for. Programs beyond them wait for a second turn."""


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How one call is cut; none of it changes a bit of the result (fp32 weights: `channels` does).

    `tokens_first`: tokens on the M side of the instruction; 8-bit tiles of many tokens then need few
    registers for their scales. 8-bit tiles must run wgmma: 64 or more on the M side, 16 on the other.
    `by_pointers`: also where the copy engine could read.
    """

    outputs: int
    tokens: int
    channels: int
    warps: int
    stages: int
    tokens_first: bool = False
    by_pointers: bool = False


# From few and narrow tiles to many and wide ones, as measured on an H200.
_BF16_TILES: tuple[Tiles, ...] = (
    Tiles(outputs=64, tokens=16, channels=256, warps=4, stages=5),
    Tiles(outputs=64, tokens=32, channels=256, warps=4, stages=4),
    Tiles(outputs=64, tokens=64, channels=128, warps=4, stages=6, tokens_first=True),
    Tiles(outputs=128, tokens=64, channels=128, warps=4, stages=4, tokens_first=True),
    Tiles(outputs=128, tokens=128, channels=64, warps=8, stages=4, tokens_first=True),
    Tiles(outputs=256, tokens=128, channels=64, warps=8, stages=3, tokens_first=True),
)
_OLDER_TILES: tuple[Tiles, ...] = (  # GPUs with less shared memory and no copy engine
    Tiles(outputs=64, tokens=16, channels=128, warps=4, stages=3),
    Tiles(outputs=64, tokens=64, channels=64, warps=4, stages=4),
    Tiles(outputs=128, tokens=128, channels=64, warps=8, stages=3),
)
_MANY_ROWS = Tiles(outputs=64, tokens=16, channels=256, warps=4, stages=4)
_FEW_LONG_ROWS = Tiles(outputs=16, tokens=16, channels=512, warps=2, stages=4, by_pointers=True)
_FLOAT8_TILES: tuple[Tiles, ...] = (
    Tiles(outputs=64, tokens=16, channels=128, warps=4, stages=5),
    Tiles(outputs=64, tokens=32, channels=128, warps=4, stages=5),
    Tiles(outputs=64, tokens=64, channels=128, warps=4, stages=5, tokens_first=True),
    Tiles(outputs=128, tokens=64, channels=128, warps=4, stages=4, tokens_first=True),
)
_HEAD_TILES: tuple[Tiles, ...] = (
    Tiles(outputs=64, tokens=16, channels=128, warps=4, stages=4),
    Tiles(outputs=64, tokens=64, channels=64, warps=4, stages=4),
    Tiles(outputs=128, tokens=128, channels=64, warps=8, stages=3),
)
_FP32_TILES: tuple[Tiles, ...] = (
    Tiles(outputs=32, tokens=16, channels=64, warps=4, stages=4),
    Tiles(outputs=64, tokens=64, channels=64, warps=4, stages=3),
)


def part_channels(num: int, outputs: int, inputs: int, dtype: torch.dtype) -> int:
    """Channels of a part: it alone decides in which order a row's products are added.

    From the shape and type of the weight only; a multiple of 128, or everything.
    """
    if dtype == torch.bfloat16:
        return inputs
    tiles = num * triton.cdiv(outputs, 64)
    parts = max(1, min(170 // tiles, inputs // (256 if dtype == torch.float32 else 512), 16))
    return int(triton.cdiv(triton.cdiv(inputs, parts), BLOCK)) * BLOCK


def tiles_for(
    num: int, num_tokens: int, outputs: int, inputs: int, dtype: torch.dtype, *, hopper: bool = True
) -> Tiles:
    """The smallest tile of which every multiprocessor has one at most, or the largest that fits."""
    if dtype == torch.bfloat16 and not hopper:
        return _OLDER_TILES[(num_tokens > 16) + (num_tokens > 1024)]
    if dtype == torch.float32:
        return _FP32_TILES[num_tokens > (128 if outputs <= 64 else 16)]
    if dtype == torch.float8_e4m3fn:
        choice = _FLOAT8_TILES
    elif num > 1:
        return _HEAD_TILES[(num_tokens > 16) + (num_tokens > 256)]
    elif num_tokens <= 16 and outputs <= 3072 and inputs >= 4096:
        return _FEW_LONG_ROWS
    elif num_tokens <= 16 and outputs > 4096:
        return _MANY_ROWS
    else:
        choice = _BF16_TILES[num_tokens > 32 :]
    fitting = [t for t in choice if t.tokens < 2 * num_tokens] or choice[:1]
    for tiles in fitting:
        if programs_of(tiles, num_tokens, outputs) <= MULTIPROCESSORS:
            return tiles
    return fitting[-1]


def programs_of(tiles: Tiles, num_tokens: int, outputs: int) -> int:
    return int(triton.cdiv(outputs, tiles.outputs) * triton.cdiv(num_tokens, tiles.tokens))
