"""Tiles are a matter of speed: whichever a grouped product runs with, every bit is the same."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.grouped_cases import FP8, Case, quantized, random_rows, sorted_pairs

RAGGED = (300, 0, 70, 5, 129, 64, 1)  # whole tiles, last ones of few and of many rows, none
MANY = (260, 130) * 6  # more tiles than programs: they take them in turns
SIZES = (2048, 1408)


@pytest.mark.parametrize("counts", [RAGGED, MANY], ids=["ragged", "many"])
@pytest.mark.parametrize("mode", ["bfloat16", "w8a8"])
def test_every_tile_gives_the_same_bits(cuda, mode: str, counts: tuple[int, ...]) -> None:
    """Ten times each: groups of warps, neighbours and kernels that overlap may not race."""
    from experts.kernels.counters import MOST_COUNTERS, counters
    from experts.kernels.grouped import down_rows, gate_up_rows, plain_tiles
    from experts.kernels.grouped_hopper import hopper_rows
    from experts.kernels.tiles import Tiles

    torch.manual_seed(5)
    float8, num_slots = mode == "w8a8", len(counts)
    case = Case.random(FP8 if float8 else torch.bfloat16, num_slots, *SIZES, "cuda")
    slots_R = torch.arange(num_slots).repeat_interleave(torch.tensor(counts))
    slots_R1 = slots_R[torch.randperm(len(slots_R))].to(cuda)[:, None]
    pairs = sorted_pairs(slots_R1, num_slots)
    x_RH = random_rows(len(slots_R), SIZES[0], "cuda")
    x = quantized(x_RH) if float8 else x_RH

    def plain(first: Tiles, second: Tiles) -> torch.Tensor:
        return down_rows(gate_up_rows(x, pairs, case.experts, first), pairs, case.experts, second)

    depth = 128 if float8 else 64
    small = Tiles(rows=64, features=128, depth=depth, stages=3)
    kinds = [(small, small), plain_tiles(case.experts, quantized=float8)]
    if torch.cuda.get_device_capability(cuda) == (9, 0):
        sizes = ((64, 64, 8), (128, 64, 6), (128, 128, 4))
        kinds += [(Tiles(rows=r, features=f, depth=depth, stages=s),) for r, f, s in sizes]
    expected_PH = torch.empty(0)
    for tiles in kinds:
        for _ in range(10):
            torch.full((len(slots_R), SIZES[0]), torch.nan, device=cuda, dtype=torch.bfloat16)
            # In the memory that has just become free:
            if len(tiles) == 2:
                y_PH = plain(*tiles)
            else:
                y_PH = hopper_rows(x, pairs, case.experts, tiles[0])
            expected_PH = expected_PH if len(expected_PH) else y_PH
            assert torch.equal(y_PH, expected_PH), f"{tiles}"
    assert not counters(cuda, MOST_COUNTERS).any()
