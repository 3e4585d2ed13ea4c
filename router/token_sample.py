"""A bounded, fair sample of tokens: which experts each chose, in every layer.

L layers with experts, M sampled tokens, K experts per token.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

RowArray = NDArray[np.int16]


class TokenSample:
    """Reservoir sampling: every token seen is kept with the same chance, `capacity` at most.

    What is drawn depends on `seed` and on how many tokens came before, and on nothing else.
    """

    def __init__(self, num_layers: int, capacity: int, seed: int = 0) -> None:
        self.capacity, self.seed = capacity, seed
        self.num_seen = 0
        self.rows_LMK: RowArray = np.zeros((num_layers, 0, 0), dtype=np.int16)

    def add(self, rows_LMK: RowArray) -> None:
        """Tokens [L, any, any k]; -1 where a token has fewer experts than others."""
        layers, arriving, width = rows_LMK.shape
        _, kept, kept_width = self.rows_LMK.shape
        place = np.arange(self.num_seen, self.num_seen + arriving)
        drawn = np.random.default_rng([self.seed, self.num_seen]).integers(0, place + 1)
        place = np.where(place < self.capacity, place, drawn)
        self.num_seen += arriving
        rows = np.full(
            (layers, min(self.num_seen, self.capacity), max(width, kept_width)), -1, dtype=np.int16
        )
        rows[:, :kept, :kept_width] = self.rows_LMK
        for token in np.flatnonzero(place < self.capacity):
            rows[:, place[token]] = -1
            rows[:, place[token], :width] = rows_LMK[:, token]
        self.rows_LMK = rows
