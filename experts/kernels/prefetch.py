# ruff: noqa: ANN001, ANN201  (what Triton compiles has no Python types)
"""Lines of memory on their way to the L2 cache before anybody can read them.

A kernel that starts early (experts/kernels/early.py) asks for what it will read while the one ahead still runs.
That says nothing about values: another kernel may yet write them, caches of L2 are one for all.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def prefetch(pointers, EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """The lines, 128 bytes, that these pointers point to; all of them must be valid."""
    if EARLY:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [pointers.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
