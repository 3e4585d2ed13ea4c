"""Counting the bytes of weights, for reports and for the promise that no rank holds too much."""

from __future__ import annotations

from dataclasses import fields, is_dataclass

from torch import Tensor


def tensor_bytes(module: object) -> int:
    """Bytes of all tensors in a dataclass and in the dataclasses and tuples inside it."""
    if isinstance(module, Tensor):
        return module.nbytes
    if isinstance(module, tuple):
        return sum(tensor_bytes(item) for item in module)
    if is_dataclass(module):
        return sum(tensor_bytes(getattr(module, field.name)) for field in fields(module))
    return 0
