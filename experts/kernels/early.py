"""Kernels that start while the one before them still runs: programmatic dependent launch, from Hopper on.

Between two kernels of a stream the GPU is empty for a microsecond or two, and each begins with empty
pipelines. A kernel launched early gets its programs onto multiprocessors as they become free and does
what depends on nobody, such as reading weights; then it waits for what the other one writes.

    _kernel[grid](..., **early(x.device))      # the kernel has a parameter EARLY: tl.constexpr

    wait_for_inputs(EARLY)                     # in the kernel, after what depends on nobody
    let_next_start(EARLY)

Rules, or results are wrong now and then:
- Every program of the kernel waits (`wait_for_inputs`), also one that has nothing to do. Waiting is for the
  whole of the kernel before, which waited for the one before it, so nothing ever overtakes.
- Before that it reads only what no kernel of a step writes: weights, their scales, tables of the model.
  It writes nothing. It may ask for anything to come into the L2 cache (experts/kernels/prefetch.py).
- `let_next_start` says nothing about results, the next kernel still waits for the end of this one. It comes
  after this one's own waiting, so that one kernel is ahead and not several: programs that wait have
  memory on their multiprocessors, which another stream's might need (measured: a little faster so).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from experts.kernels.which_gpu import is_hopper_or_newer


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def wait_for_inputs(EARLY: tl.constexpr) -> None:
    """Until all kernels before this one have ended and what they wrote can be read."""
    if EARLY:
        gdc_wait()


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def let_next_start(EARLY: tl.constexpr) -> None:
    """Once all programs have said so or ended, the next kernel's programs may come."""
    if EARLY:
        gdc_launch_dependents()


def early(device: torch.device) -> dict[str, Any]:
    """Keyword arguments of a launch: early where the GPU can, else after the kernel before, as ever."""
    return {"EARLY": True, "launch_pdl": True} if is_hopper_or_newer(device) else {"EARLY": False}
