"""Random numbers without state: the same key and counter give the same number, always, anywhere.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC'11).
"""

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
_KEY_STEPS = np.array([[0x9E3779B9], [0xBB67AE85]], np.uint64)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox4x32(counters: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Counters [4, N] and keys [2, N], 32-bit words in uint64, to random 32-bit words [4, N]."""
    even, odd = counters[0::2], counters[1::2]
    for _ in range(10):
        products = even * _MULTIPLIERS
        even, odd = (products >> _HALF)[::-1] ^ odd ^ keys, (products & _LOW)[::-1]
        keys = (keys + _KEY_STEPS) & _LOW
    return np.stack([even[0], odd[0], even[1], odd[1]])


def uniform(seeds: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.float64]:
    """One float64 in [0, 1) with 53 random bits for each (64-bit seed, 64-bit position)."""
    zeros = np.zeros_like(positions)
    counters = np.stack([positions & _LOW, positions >> _HALF, zeros, zeros])
    words = philox4x32(counters, np.stack([seeds & _LOW, seeds >> _HALF]))
    bits = (words[0] << np.uint64(21)) | (words[1] >> np.uint64(11))
    numbers: NDArray[np.float64] = bits.astype(np.float64) * 2.0**-53
    return numbers
