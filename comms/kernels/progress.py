# ruff: noqa: ANN001, ANN201  (what Triton compiles has no Python types)
"""How far the GPU is in exchanges between nodes, and how much it has sent there (`comms/rail_watch.py`).

count: on the device, kernels so far, and bytes that have left for other nodes. told: the kernels again, in
memory of the host.
"""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def tell_host(told, count):  # type: ignore[no-untyped-def]
    """One more kernel of the exchange has come this far; or, as a kernel itself, the exchange begins."""
    if tl.program_id(0) == 0:
        now = tl.load(count) + 1
        tl.store(count, now)
        tl.store(told, now)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def book_rows(count, num_rows, ROW_BYTES: tl.constexpr):  # type: ignore[no-untyped-def]
    """So many rows more have left for other nodes."""
    if tl.program_id(0) == 0:
        tl.store(count + 1, tl.load(count + 1) + tl.cast(num_rows, tl.int64) * ROW_BYTES)
