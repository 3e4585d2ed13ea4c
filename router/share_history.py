"""Each expert's share of a batch: its mean and variance over batches, in constant memory.

L layers with experts, E logical experts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

PRIOR_BATCHES = 8.0
"""An expert's own variance counts fully once it rests on many more batches than this."""
_TINY = 1e-300


class ShareHistory:
    """Batches weigh by their tokens, and less with age: by 1/e after `horizon` batches.

    mean_LE and scatter_LE (the weighted squares of deviations) follow West's update (Communications
    of the ACM 22(9), 1979), with decay. weight_L: tokens; squares_L: the sum of squared weights;
    batches_L: how many batches had tokens.
    """

    def __init__(self, num_layers: int, num_experts: int, horizon: float) -> None:
        self.horizon = horizon
        self.mean_LE, self.scatter_LE = np.zeros((2, num_layers, num_experts))
        self.weight_L, self.squares_L, self.batches_L = np.zeros((3, num_layers))

    def add(self, counts_LE: FloatArray) -> None:
        """Take one batch."""
        keep = 1 - 1 / self.horizon
        tokens_L = counts_LE.sum(axis=1)
        self.weight_L = keep * self.weight_L + tokens_L
        self.squares_L = keep**2 * self.squares_L + tokens_L**2
        self.batches_L = keep * self.batches_L + (tokens_L > 0)
        off_LE = counts_LE / np.maximum(tokens_L, _TINY)[:, None] - self.mean_LE
        off_LE[tokens_L == 0] = 0
        part_L1 = (tokens_L / np.maximum(self.weight_L, _TINY))[:, None]
        self.mean_LE = self.mean_LE + part_L1 * off_LE
        # The deviation from the old mean times that from the new one.
        self.scatter_LE = keep * self.scatter_LE + tokens_L[:, None] * off_LE**2 * (1 - part_L1)

    @property
    def effective_L(self) -> FloatArray:
        """To how many batches of equal weight it amounts (Kish)."""
        effective_L: FloatArray = self.weight_L**2 / np.maximum(self.squares_L, _TINY)
        return effective_L

    @property
    def batch_tokens_L(self) -> FloatArray:
        """(token, expert) pairs of a mean batch."""
        tokens_L: FloatArray = self.weight_L / np.maximum(self.batches_L, _TINY)
        return tokens_L

    def excess_LE(self) -> FloatArray:
        """Variance of the shares beyond that of drawing tokens: what the load itself does.

        Few batches say little about one expert, but much about all of a layer. So it is a weighted
        mean of the expert's own variance and of that which its mean suggests, if all experts of the
        layer varied by the same factor.
        """
        degrees_L1 = np.maximum(self.effective_L - 1, 0)[:, None]
        unbiased_L1 = 1 + 1 / np.maximum(degrees_L1, _TINY)
        own_LE = self.scatter_LE / np.maximum(self.weight_L, _TINY)[:, None] * unbiased_L1
        own_LE -= self._drawn_LE()
        squares_L1 = (self.mean_LE**2).sum(axis=1, keepdims=True)
        factor_L1 = own_LE.sum(axis=1, keepdims=True) / np.maximum(squares_L1, _TINY)
        common_LE = np.maximum(factor_L1, 0) * self.mean_LE**2
        trust_L1 = degrees_L1 / (degrees_L1 + PRIOR_BATCHES)
        mixed_LE = np.maximum(trust_L1 * own_LE + (1 - trust_L1) * common_LE, 0)
        excess_LE: FloatArray = np.where(degrees_L1 > 1e-6, mixed_LE, 0)
        return excess_LE

    def variance_LE(self) -> FloatArray:
        """Variance of the shares of a batch of mean size, drawing its tokens included."""
        return self.excess_LE() + self._drawn_LE()

    def distance(self, counts_LE: FloatArray) -> float:
        """How far a batch is from the mean: about 1 for one more of the same kind, whatever its size.

        Of chi-square distances, summed over experts and layers, the found to the expected.
        1 as long as there is no second batch to tell what is usual.
        """
        tokens_L = counts_LE.sum(axis=1)
        known = (self.effective_L > 1.5) & (tokens_L > 0)
        if not known.any():
            return 1.0
        mean_LE, tokens_L1 = self.mean_LE[known], tokens_L[known, None]
        off_LE = counts_LE[known] / tokens_L1 - mean_LE
        batch_LE = self.excess_LE()[known] + mean_LE / tokens_L1
        expected_LE = batch_LE + self.variance_LE()[known] / self.effective_L[known, None]
        # An expert that never came would make the first token of it an infinite surprise.
        share_LE = mean_LE + 1 / (self.weight_L[known, None] + tokens_L1)
        return float((off_LE**2 / share_LE).sum() / (expected_LE / share_LE).sum())

    def _drawn_LE(self) -> FloatArray:
        """Variance of the shares that comes from drawing a batch's tokens (Poisson)."""
        drawn_LE: FloatArray = self.mean_LE / np.maximum(self.batch_tokens_L, _TINY)[:, None]
        return drawn_LE
