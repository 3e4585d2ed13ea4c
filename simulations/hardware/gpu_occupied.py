"""How much slower work becomes while communication kernels hold some of the multiprocessors.

A kernel that only waits takes whole multiprocessors (it asks for nearly all of their shared memory)
for a fixed time; meanwhile the work runs on another stream. Persistent kernels that were started for
all multiprocessors would wait for the held ones, so libraries are told how many are left, as
serving engines do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from simulations.hardware.gpu_timing import Call, captured, replay_seconds, seconds_of

HELD_S = 0.05
_SOURCE = r"""
extern "C" __global__ void hold(long long nanoseconds) {
    long long start, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
    do {
        __nanosleep(1000);
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    } while (now - start < nanoseconds);
}
"""
_SHARED_BYTES = 200 * 1024


def slowdowns(works: dict[str, Call], held: Sequence[int]) -> dict[str, dict[str, Any]]:
    """By work: {"free_s", "slowdown": {held: ratio}}. Empty where CuPy is missing."""
    hold = _holder()
    if hold is None:
        return {}
    return {name: _slowdown(work, hold, held) for name, work in works.items()}


def _slowdown(
    work: Call, hold: Callable[[int, torch.cuda.Stream], None], held: Sequence[int]
) -> dict[str, Any]:
    free_s = _seconds(work, hold, 0)
    ratios = {str(number): round(_seconds(work, hold, number) / free_s, 4) for number in held}
    return {"free_s": float(f"{free_s:.4g}"), "slowdown": ratios}


def _seconds(work: Call, hold: Callable[[int, torch.cuda.Stream], None], held: int) -> float:
    """Median seconds of `work` while `held` multiprocessors are taken."""
    torch._C._set_sm_carveout_experimental(held or None)
    try:
        number = max(1, min(20, round(2e-3 / seconds_of([work]).p50)))
        graph = captured([work], number)
    finally:
        torch._C._set_sm_carveout_experimental(None)
    stream, times = torch.cuda.Stream(), []
    for _ in range(5):
        torch.cuda.synchronize()
        if held:
            hold(held, stream)
        seconds = replay_seconds(graph, 5)
        times += [
            s / number for s in seconds if s < HELD_S / 2
        ]  # one that long waited for the holder
    return float(np.median(times)) if times else HELD_S


def _holder() -> Callable[[int, torch.cuda.Stream], None] | None:
    try:
        import cupy  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return None
    kernel = cupy.RawKernel(_SOURCE, "hold")
    kernel.max_dynamic_shared_size_bytes = _SHARED_BYTES

    def hold(number: int, stream: torch.cuda.Stream) -> None:
        with cupy.cuda.ExternalStream(stream.cuda_stream):
            kernel((number,), (32,), (int(HELD_S * 1e9),), shared_mem=_SHARED_BYTES)

    return hold
