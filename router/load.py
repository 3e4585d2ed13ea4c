"""How many tokens each expert gets: what plans are made from.

A `LoadWindow` takes the gate's counts of one batch (or interval) after the other and keeps, in
constant memory, what a planner needs to know: each expert's mean load, how much it varies, and a
sample of tokens. It remembers only what still describes the present: when batches keep differing
from the history by more than the history varied, the history goes.

L layers with experts, E logical experts, M sampled tokens, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router.token_sample import RowArray, TokenSample

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

PATIENCE = 2
"""So many batches in a row must differ before the history goes: one may be an accident."""
PRIOR_BATCHES = 8.0
"""An expert's own variance counts fully once it rests on many more batches than this."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertLoad:
    """What a plan is made for.

    mean_LE: float64, tokens of each expert per batch (any unit). sigma_LE: their standard deviation
    from batch to batch, None = 0. rows_LMK: a sample of tokens, the experts of each (-1 = none), from
    which it shows who is chosen together; None where nobody recorded any.
    """

    mean_LE: FloatArray
    sigma_LE: FloatArray | None = None
    rows_LMK: RowArray | None = None

    def __post_init__(self) -> None:
        mean = self.mean_LE
        if mean.ndim != 2 or not np.isfinite(mean).all() or (mean < 0).any():
            raise ValueError(
                f"mean_LE must be [layers, experts] of finite numbers >= 0, got {mean.shape}"
            )
        if self.sigma_LE is not None and self.sigma_LE.shape != mean.shape:
            raise ValueError(
                f"sigma_LE {list(self.sigma_LE.shape)} is not mean_LE {list(mean.shape)}"
            )


class LoadWindow:
    """Means and variances of the experts' shares of a batch, weighted by the batch's tokens.

    horizon: batches after which old ones weigh 1/e. change: how many times the variance of the
    history makes a batch foreign to it. sample_tokens: most tokens kept as rows. Shares follow West's
    update (Communications of the ACM 22(9), 1979) with decay. Raises ValueError for sizes below 1.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        *,
        horizon: float = 64.0,
        change: float = 3.0,
        sample_tokens: int = 1024,
        seed: int = 0,
    ) -> None:
        if min(num_layers, num_experts) < 1 or horizon < 1 or sample_tokens < 0:
            raise ValueError(
                f"Invalid load window: num_layers({num_layers}), num_experts({num_experts}) and "
                f"horizon({horizon}) must be >= 1, sample_tokens({sample_tokens}) >= 0"
            )
        self.num_layers, self.num_experts = num_layers, num_experts
        self.horizon, self.change = horizon, change
        self.sample_tokens, self.seed = sample_tokens, seed
        self.num_changes = 0
        self._pending: list[tuple[IntArray, RowArray | None]] = []
        self._forget()

    @property
    def num_batches(self) -> float:
        """How many equal batches the history amounts to, old ones counting less; 0 at the start."""
        return float(self._effective_L().max(initial=0.0))

    @property
    def num_tokens(self) -> float:
        """(token, expert) pairs of a layer in the history, old ones counting less."""
        return float(self._weight_L.max())

    def add(self, counts_LE: NDArray[Any], rows_LMK: NDArray[Any] | None = None) -> None:
        """Take a batch: tokens of each expert, and the choices of some of its tokens, if known.

        Raises ValueError for counts that are not [num_layers, num_experts] of numbers >= 0, or rows
        that are not [num_layers, tokens, k] of expert ids or -1.
        """
        counts_LE = self._checked_counts(counts_LE)
        rows = None if rows_LMK is None else self._checked_rows(rows_LMK)
        if not counts_LE.any():
            return
        self._pending.append((counts_LE, rows))
        if self._is_foreign(counts_LE):
            if len(self._pending) < PATIENCE:
                return
            self._forget()
            self.num_changes += 1
        for counts, sampled in self._pending:
            self._take(counts)
            if sampled is not None:
                self._sample.add(sampled)
        self._pending = []

    def estimate(self) -> ExpertLoad:
        """Tokens per mean batch of the present load; ValueError before the first batch."""
        if not self._weight_L.any():
            raise ValueError("The load window is empty: add the counts of a batch first")
        tokens_L = self._weight_L / np.maximum(self._batches_L, 1)
        rows_LMK = self._sample.rows_LMK
        return ExpertLoad(
            mean_LE=self._mean_LE * tokens_L[:, None],
            sigma_LE=np.sqrt(self._variance_LE()) * tokens_L[:, None],
            rows_LMK=rows_LMK if rows_LMK.size else None,
        )

    def error_LE(self) -> FloatArray:
        """Standard error of `estimate().mean_LE`: how far the true mean may be, in the same unit."""
        tokens_L = self._weight_L / np.maximum(self._batches_L, 1)
        variance_LE = self._variance_LE() / np.maximum(self._effective_L(), 1)[:, None]
        error_LE: FloatArray = np.sqrt(variance_LE) * tokens_L[:, None]
        return error_LE

    def state(self) -> dict[str, NDArray[Any]]:
        """All it knows as arrays, for `from_state`; a batch that waits for a second is not kept."""
        settings = [self.horizon, self.change, self.sample_tokens, self.seed, self.num_changes]
        return {
            "settings": np.array(settings, dtype=np.float64),
            "mean": self._mean_LE,
            "scatter": self._scatter_LE,
            "weight": self._weight_L,
            "weight_squares": self._squares_L,
            "batches": self._batches_L,
            "rows": self._sample.rows_LMK,
            "rows_seen": np.array(self._sample.num_seen, dtype=np.int64),
        }

    @staticmethod
    def from_state(state: Mapping[str, NDArray[Any]]) -> LoadWindow:
        """The window that gave this `state`. Raises ValueError that names the array at fault."""
        mean_LE = _array(state, "mean", np.float64, (None, None))
        layers, experts = mean_LE.shape
        settings = _array(state, "settings", np.float64, (5,)).tolist()
        window = LoadWindow(
            layers,
            experts,
            horizon=settings[0],
            change=settings[1],
            sample_tokens=int(settings[2]),
            seed=int(settings[3]),
        )
        window.num_changes = int(settings[4])
        window._mean_LE = mean_LE
        window._scatter_LE = _array(state, "scatter", np.float64, (layers, experts))
        window._weight_L = _array(state, "weight", np.float64, (layers,))
        window._squares_L = _array(state, "weight_squares", np.float64, (layers,))
        window._batches_L = _array(state, "batches", np.float64, (layers,))
        rows_LMK = _array(state, "rows", np.int16, (layers, None, None))
        if rows_LMK.shape[1] > window.sample_tokens:
            raise ValueError(
                f"array 'rows' has {rows_LMK.shape[1]} tokens, more than {window.sample_tokens}"
            )
        seen = int(_array(state, "rows_seen", np.int64, ()))
        window._sample.rows_LMK = window._checked_rows(rows_LMK)
        window._sample.num_seen = max(seen, rows_LMK.shape[1])
        return window

    def _forget(self) -> None:
        shape = (self.num_layers, self.num_experts)
        self._mean_LE, self._scatter_LE = np.zeros(shape), np.zeros(shape)
        self._weight_L, self._squares_L = np.zeros(self.num_layers), np.zeros(self.num_layers)
        self._batches_L = np.zeros(self.num_layers)
        self._sample = TokenSample(self.num_layers, self.sample_tokens, self.seed)

    def _take(self, counts_LE: IntArray) -> None:
        tokens_L = counts_LE.sum(axis=1).astype(np.float64)
        keep = 1 - 1 / self.horizon
        self._weight_L = keep * self._weight_L + tokens_L
        self._squares_L = keep**2 * self._squares_L + tokens_L**2
        self._batches_L = keep * self._batches_L + (tokens_L > 0)
        off_LE = counts_LE / np.maximum(tokens_L, 1)[:, None] - self._mean_LE
        off_LE[tokens_L == 0] = 0
        part_L = tokens_L / np.maximum(self._weight_L, 1)
        self._mean_LE = self._mean_LE + part_L[:, None] * off_LE
        # off before times off after the mean moved
        spread_LE = tokens_L[:, None] * off_LE**2 * (1 - part_L[:, None])
        self._scatter_LE = keep * self._scatter_LE + spread_LE

    def _effective_L(self) -> FloatArray:
        """Kish's effective number of batches."""
        effective_L: FloatArray = self._weight_L**2 / np.maximum(self._squares_L, 1e-300)
        return effective_L

    def _excess_LE(self) -> FloatArray:
        """Variance of shares beyond that of drawing tokens: what the load itself does.

        Few batches say little about one expert, much about all: of an expert's own variance and that
        of an expert of its mean in a layer where all vary by the same factor, a weighted mean.
        """
        weight_L1 = np.maximum(self._weight_L, 1)[:, None]
        degrees_L1 = np.maximum(self._effective_L() - 1, 0)[:, None]
        unbiased_L1 = np.where(degrees_L1 > 0, 1 + 1 / np.maximum(degrees_L1, 1e-9), 0)
        drawn_LE = self._mean_LE * self._batches_L[:, None] / weight_L1
        own_LE = self._scatter_LE / weight_L1 * unbiased_L1 - drawn_LE
        squares_L1 = (self._mean_LE**2).sum(axis=1, keepdims=True)
        factor_L1 = own_LE.sum(axis=1, keepdims=True) / np.maximum(squares_L1, 1e-300)
        common_LE = np.maximum(factor_L1, 0) * self._mean_LE**2
        trust_L1 = degrees_L1 / (degrees_L1 + PRIOR_BATCHES)
        excess_LE: FloatArray = np.maximum(trust_L1 * own_LE + (1 - trust_L1) * common_LE, 0) * (
            degrees_L1 > 0
        )
        return excess_LE

    def _variance_LE(self) -> FloatArray:
        """Variance of the shares of a batch of mean size, drawing its tokens included."""
        drawn_LE = self._mean_LE * (self._batches_L / np.maximum(self._weight_L, 1))[:, None]
        return self._excess_LE() + drawn_LE

    def _is_foreign(self, counts_LE: IntArray) -> bool:
        """Whether this batch is farther from the mean than batches of the history were.

        A chi-square distance, each expert's square divided by its share, summed over experts and
        layers, against what it would be for one more batch of the same kind and this size.
        """
        effective_L = self._effective_L()
        tokens_L = counts_LE.sum(axis=1)
        known_L = (effective_L > 1.5) & (tokens_L > 0)
        if not known_L.any():
            return False
        mean_LE, tokens_L1 = self._mean_LE[known_L], tokens_L[known_L, None]
        off_LE = counts_LE[known_L] / tokens_L1 - mean_LE
        batch_LE = self._excess_LE()[known_L] + mean_LE / tokens_L1
        expected_LE = batch_LE + self._variance_LE()[known_L] / effective_L[known_L, None]
        # An expert that never came would make any first token of it an infinite surprise.
        share_LE = mean_LE + 1 / (self._weight_L[known_L, None] + tokens_L1)
        distance = float((off_LE**2 / share_LE).sum())
        return distance > self.change * float((expected_LE / share_LE).sum())

    def _checked_counts(self, counts_LE: NDArray[Any]) -> IntArray:
        shape = (self.num_layers, self.num_experts)
        if counts_LE.shape != shape:
            raise ValueError(
                f"counts {list(counts_LE.shape)} are not [num_layers({shape[0]}), "
                f"num_experts({shape[1]})]"
            )
        if counts_LE.dtype.kind not in "iuf" or not (counts_LE >= 0).all():
            raise ValueError("counts must be numbers >= 0")
        if counts_LE.max() > 2**53:
            raise ValueError(f"counts must be at most 2**53, got {counts_LE.max()}")
        return counts_LE.astype(np.int64)

    def _checked_rows(self, rows_LMK: NDArray[Any]) -> RowArray:
        if rows_LMK.ndim != 3 or rows_LMK.shape[0] != self.num_layers:
            raise ValueError(
                f"rows {list(rows_LMK.shape)} are not [num_layers({self.num_layers}), tokens, k]"
            )
        outside = (rows_LMK < -1) | (rows_LMK >= self.num_experts)
        if rows_LMK.dtype.kind not in "iu" or outside.any():
            raise ValueError(
                f"rows must be expert ids below num_experts({self.num_experts}), or -1"
            )
        return rows_LMK.astype(np.int16)


def _array(
    state: Mapping[str, NDArray[Any]], name: str, dtype: type, shape: tuple[int | None, ...]
) -> NDArray[Any]:
    """state[name] of that type and shape (None: any length), finite and >= 0 where it is float."""
    if name not in state:
        raise ValueError(f"array '{name}' is missing")
    array = state[name]
    sizes = "[" + ", ".join("any" if n is None else str(n) for n in shape) + "]"
    fits = len(array.shape) == len(shape) and all(
        n is None or n == m for n, m in zip(shape, array.shape, strict=True)
    )
    if array.dtype != dtype or not fits:
        raise ValueError(
            f"array '{name}' is {array.dtype} {list(array.shape)}, expected "
            f"{np.dtype(dtype)} {sizes}"
        )
    if array.dtype.kind == "f" and not (np.isfinite(array) & (array >= 0)).all():
        raise ValueError(f"array '{name}' has entries that are negative or not finite")
    return array
