# ruff: noqa: ANN001, ANN201  (what Triton compiles has no Python types)
"""Where the regions of the ranks' shared memory lie: a table of addresses [region, rank] on the device.

`comms/symmetric_layout.py` says what is in which of them.
"""

import triton
import triton.language as tl

ROWS, SCALES, SLOTS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
WEIGHTS, RANGES = tl.constexpr(3), tl.constexpr(4)
PARTIALS, WIDE, FORMS = tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)
DISPATCHED, COMBINED = tl.constexpr(8), tl.constexpr(9)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def address(table, REGION: tl.constexpr, rank, WORLD: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of a region on a rank; all are multiples of 128, which is what lets 16 bytes go at once."""
    return tl.multiple_of(tl.load(table + REGION * WORLD + rank).to(tl.pointer_type(tl.int32)), 16)
