"""64 bits of any tensors' bytes, the same on every device: by them a copy is told from other weights.

The bytes are read as words of 32 bits, each is multiplied by a random number of 64 bits, and the products
are added modulo 2^64 (multilinear hashing; Lemire and Kaser, 2014); pieces are joined by Horner's rule. Sums
of integers do not depend on their order, so a GPU may take them as it likes.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

_WORDS = 1 << 16  # of a piece
_PIECES = 64  # at once, on a GPU
_BASE = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def fingerprint(*tensors: Tensor) -> int:
    """Of contiguous tensors on one device, one after the other. Waits for the device."""
    total = 0
    sums = [piece for tensor in tensors for piece in _pieces(tensor)]
    for piece in torch.cat(sums).tolist() if sums else ():
        total = (total * _BASE + piece) & _MASK
    return total


def _pieces(tensor: Tensor) -> list[Tensor]:
    """int64 [number], the sums of the tensor's pieces."""
    data = tensor.detach().reshape(-1).view(torch.uint8)
    if len(data) % 4:
        data = torch.nn.functional.pad(data, (0, -len(data) % 4))
    words, factors = data.view(torch.int32), _factors(data.device)
    if data.device.type == "cpu":  # in its caches, one after the other
        return [torch.dot(w.long(), factors[: len(w)])[None] for w in words.split(_WORDS)]
    whole = len(words) // _WORDS * _WORDS
    pieces = [
        (slab.view(-1, _WORDS) * factors).sum(1) for slab in words[:whole].split(_WORDS * _PIECES)
    ]
    rest = words[whole:]
    return [*pieces, (rest * factors[: len(rest)]).sum()[None]] if len(rest) else pieces


@cache
def _factors(device: torch.device) -> Tensor:
    random = np.random.Generator(np.random.Philox(20_261_122))
    return torch.from_numpy(random.integers(-(1 << 63), 1 << 63, _WORDS, dtype=np.int64)).to(device)
