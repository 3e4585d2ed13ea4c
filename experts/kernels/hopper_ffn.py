# ruff: noqa: ANN001, ANN201, ANN202, E741  (what Triton compiles has no Python types; I: intermediate)
"""Both products of all experts in one launch, on a Hopper GPU.

A program first takes tiles of gate and up, then tiles of down, out of one ring of stages: while the last
activations are computed, quantised and stored, the first weights of down are already on their way. A tile
of down waits until all channels of its rows are there; whoever makes them counts.

Tiles of 128 rows are multiplied by two groups of warps, 64 rows each. Tiles of 64 rows go to the two in
turns, so that one multiplies while the other finishes its tile.

Legend: S slots, as experts/kernels/tiles.py.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from experts.kernels.early import let_next_start, wait_for_inputs
from experts.kernels.hopper import HALF, all_slots, make_ring
from experts.kernels.hopper_down import fetch_down, multiply_down
from experts.kernels.hopper_gate_up import fetch_gate_up, multiply_gate_up
from experts.kernels.hopper_sums import pass_turn, take_turn


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def hopper_ffn(  # type: ignore[no-untyped-def]
    x, x_scale, w13, w13_scale, buffers, ends, pairs, h, h_scale, h_tiles, w2, w2_scale, y,
    words, num_places, num_slots,
    H: gl.constexpr, I: gl.constexpr, K: gl.constexpr, SLOTS: gl.constexpr, X8: gl.constexpr,
    ROWS: gl.constexpr, FEATURES: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr,
    EARLY: gl.constexpr,
):  # fmt: skip
    """h_tiles and w2 are descriptors as w13; h_tiles is of h. words: see `TOLD`."""
    ring = make_ring(gl.float8e4nv if X8 else gl.bfloat16, ROWS, FEATURES, DEPTH, STAGES)
    table = (ends, buffers, num_slots)
    rows = (pairs, x, x_scale, h_tiles, h_scale)
    up = (w13_scale, h, h_scale)
    down = (w2_scale, y)
    gl.warp_specialize(
        [
            (_multiply, (
                ring, table, up, down, words, num_places, 0,
                H, I, SLOTS, X8, ROWS, FEATURES, STAGES, EARLY,
            )),
            (_multiply, (
                ring, table, up, down, words, num_places, 1,
                H, I, SLOTS, X8, ROWS, FEATURES, STAGES, EARLY,
            )),
            (_fetch, (
                ring, table, rows, w13, w2, words, num_places,
                H, I, K, SLOTS, ROWS, FEATURES, DEPTH, STAGES, EARLY,
            )),
        ],
        [4, 4],
        [224, 56],  # registers: those that multiply hold two tiles of sums
    )  # fmt: skip


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def _fetch(  # type: ignore[no-untyped-def]
    ring, table, rows, w13, w2, words, num_places,
    H: gl.constexpr, I: gl.constexpr, K: gl.constexpr, SLOTS: gl.constexpr,
    ROWS: gl.constexpr, FEATURES: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr,
    EARLY: gl.constexpr,
):  # fmt: skip
    ends, buffers, num_slots = table
    pairs, x, x_scale, h_tiles, h_scale = rows
    wait_for_inputs(EARLY)
    let_next_start(EARLY)
    slots = all_slots(ends, buffers, num_slots, SLOTS, ROWS)
    step, start = fetch_gate_up(
        ring, slots, pairs, x, x_scale, w13, H, I, K, ROWS, FEATURES, DEPTH, STAGES
    )
    fetch_down(
        ring, slots, h_tiles, h_scale, w2, words, num_places, step, start,
        H, I, ROWS, FEATURES, DEPTH, STAGES,
    )  # fmt: skip


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def _multiply(  # type: ignore[no-untyped-def]
    ring, table, up, down, words, num_places, PART: gl.constexpr,
    H: gl.constexpr, I: gl.constexpr, SLOTS: gl.constexpr, X8: gl.constexpr,
    ROWS: gl.constexpr, FEATURES: gl.constexpr, STAGES: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    ends, buffers, num_slots = table
    turns: gl.constexpr = X8 and ROWS == 2 * HALF
    wait_for_inputs(EARLY)
    slots = all_slots(ends, buffers, num_slots, SLOTS, ROWS)
    if (turns or ROWS == HALF) and PART == 1:
        pass_turn(PART)
    step, turn, start = multiply_gate_up(
        ring, slots, up, words, num_places, PART, H, I, X8, ROWS, FEATURES, STAGES, turns
    )
    turn = multiply_down(
        ring, slots, down, step, turn, start, PART, H, I, X8, ROWS, FEATURES, STAGES, turns
    )
    # The last turn that was passed is nobody's.
    if turns:
        if PART == 0:
            take_turn(PART)
    elif ROWS == HALF:  # noqa: SIM102  (known when compiled, the other is not)
        if (turn & 1) == PART:
            take_turn(PART)
