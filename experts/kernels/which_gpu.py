"""What a GPU can, as far as kernels or tiles are chosen by it."""

from __future__ import annotations

from functools import cache

import torch


@cache
def is_hopper(device: torch.device) -> bool:
    """Neither older nor newer: `wgmma` is there on no other."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


@cache
def is_hopper_or_newer(device: torch.device) -> bool:
    """A copy engine for tiles, and kernels that start before the one ahead has ended."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # Triton's interpreter
    number: int = torch.cuda.get_device_properties(device).multi_processor_count
    return number
