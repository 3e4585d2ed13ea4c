"""The kernels that Triton's interpreter cannot run compile for a Hopper GPU, on a machine without one."""

from __future__ import annotations

import pytest

from experts.kernels.tiles import Tiles

MOST_SHARED = (
    227 * 1024
)  # bytes that a program may have (CUDA programming guide, compute capability 9.0)


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")  # it stays as it was
@pytest.mark.parametrize(
    ("float8", "tiles"),
    [
        (False, Tiles(rows=64, features=64, depth=64, stages=8)),
        (True, Tiles(rows=128, features=128, depth=128, stages=4)),
        (True, Tiles(rows=128, features=64, depth=128, stages=6)),
    ],
)
def test_experts(float8: bool, tiles: Tiles) -> None:
    """As many stages as fit, and no more."""
    triton = pytest.importorskip("triton", reason="needs Triton")
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from experts.kernels.hopper_ffn import hopper_ffn

    dtype, bits = ("fp8e4nv", 8) if float8 else ("bf16", 16)
    layout = gl.NVMMASharedLayout(128, bits, 2)

    def boxes(rows: int) -> str:
        return f"tensordesc<{dtype}[{rows}, {tiles.depth}],{layout!r}>"

    types = dict.fromkeys(("x", "h"), f"*{dtype}")
    types |= dict.fromkeys(("x_scale", "w13_scale", "h_scale", "w2_scale"), "*fp32")
    types |= dict.fromkeys(("buffers", "ends", "pairs", "words"), "*i32")
    types |= {"num_places": "i32", "num_slots": "i32", "y": "*bf16"}
    types |= {"w13": boxes(tiles.features), "w2": boxes(tiles.features)}
    types |= {"h_tiles": boxes(tiles.rows)}
    constants = {
        "H": 7168, "I": 2048, "K": 8, "SLOTS": 32, "X8": float8, "EARLY": True,
        "ROWS": tiles.rows, "FEATURES": tiles.features, "DEPTH": tiles.depth, "STAGES": tiles.stages,
    }  # fmt: skip
    names = hopper_ffn.arg_names
    source = GluonASTSource(
        hopper_ffn,
        {name: "constexpr" if name in constants else types[name] for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if types.get(name, "").startswith("*")
        },
    )
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    stage_bytes = (tiles.rows + 2 * tiles.features) * 128
    assert MOST_SHARED - stage_bytes < kernel.metadata.shared <= MOST_SHARED
    assert "wgmma" in kernel.asm["ptx"]
