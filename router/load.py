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

from router.share_history import FloatArray, ShareHistory
from router.token_sample import RowArray, TokenSample

PATIENCE = 2
"""So many batches in a row must differ before the history goes: one may be an accident."""
LARGEST = 1e15
"""No count, nor sum of counts, may be larger: beyond it floats skip integers."""


class LoadFileError(ValueError):
    """A file of loads that is not what it should be; the message is for whoever gave it."""


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
    """The load of the last batches, as far back as it was the same load.

    horizon: batches after which old ones weigh 1/e. change: a batch whose squared distance from the
    mean is so many times the usual one is foreign to the history. sample_tokens: most tokens kept as
    rows. Raises ValueError for sizes below 1.
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
        self._pending: list[tuple[FloatArray, RowArray | None]] = []
        self._forget()

    @property
    def num_batches(self) -> float:
        """How many equal batches the history amounts to, old ones counting less; 0 at the start."""
        return float(self._history.effective_L.max())

    @property
    def num_tokens(self) -> float:
        """(token, expert) pairs of a layer in the history, old ones counting less."""
        return float(self._history.weight_L.max())

    def add(self, counts_LE: NDArray[Any], rows_LMK: NDArray[Any] | None = None) -> None:
        """Take a batch: tokens of each expert, and the choices of some of its tokens, if known.

        Raises ValueError for counts that are not [num_layers, num_experts] of numbers >= 0, or rows
        that are not [num_layers, tokens, k] of expert ids or -1.
        """
        counts = self._checked_counts(counts_LE)
        rows = None if rows_LMK is None else self._checked_rows(rows_LMK)
        if not counts.any():
            return
        self._pending.append((counts, rows))
        if self._history.distance(counts) > self.change:
            if len(self._pending) < PATIENCE:
                return
            self._forget()
            self.num_changes += 1
        for pending, sampled in self._pending:
            self._history.add(pending)
            if sampled is not None:
                self._sample.add(sampled)
        self._pending = []

    def estimate(self) -> ExpertLoad:
        """Tokens per mean batch of the present load; ValueError before the first batch."""
        history, rows_LMK = self._history, self._sample.rows_LMK
        if not history.weight_L.any():
            raise ValueError("The load window is empty: add the counts of a batch first")
        tokens_L1 = history.batch_tokens_L[:, None]
        return ExpertLoad(
            mean_LE=history.mean_LE * tokens_L1,
            sigma_LE=np.sqrt(history.variance_LE()) * tokens_L1,
            rows_LMK=rows_LMK if rows_LMK.size else None,
        )

    def error_LE(self) -> FloatArray:
        """Standard error of `estimate().mean_LE`: how far the true mean may be, in the same unit."""
        history = self._history
        variance_LE = history.variance_LE() / np.maximum(history.effective_L, 1)[:, None]
        error_LE: FloatArray = np.sqrt(variance_LE) * history.batch_tokens_L[:, None]
        return error_LE

    def state(self) -> dict[str, NDArray[Any]]:
        """All it knows as arrays, for `from_state`; a batch that waits for a second is not kept."""
        settings = [self.horizon, self.change, self.sample_tokens, self.seed, self.num_changes]
        return {
            "settings": np.array(settings, dtype=np.float64),
            "mean": self._history.mean_LE,
            "scatter": self._history.scatter_LE,
            "weight": self._history.weight_L,
            "weight_squares": self._history.squares_L,
            "batches": self._history.batches_L,
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
        history = window._history
        history.mean_LE = mean_LE
        history.scatter_LE = _array(state, "scatter", np.float64, (layers, experts))
        history.weight_L = _array(state, "weight", np.float64, (layers,))
        history.squares_L = _array(state, "weight_squares", np.float64, (layers,))
        history.batches_L = _array(state, "batches", np.float64, (layers,))
        _check_shares(mean_LE, history.scatter_LE, history.weight_L)
        rows_LMK = _array(state, "rows", np.int16, (layers, None, None))
        seen = int(_array(state, "rows_seen", np.int64, ()))
        if min(seen, window.sample_tokens) != rows_LMK.shape[1]:
            raise ValueError(
                f"array 'rows' has {rows_LMK.shape[1]} tokens, expected those kept of "
                f"'rows_seen' = {seen}, {window.sample_tokens} at most"
            )
        window._sample.rows_LMK = window._checked_rows(rows_LMK)
        window._sample.num_seen = seen
        return window

    def _forget(self) -> None:
        self._history = ShareHistory(self.num_layers, self.num_experts, self.horizon)
        self._sample = TokenSample(self.num_layers, self.sample_tokens, self.seed)

    def _checked_counts(self, counts_LE: NDArray[Any]) -> FloatArray:
        shape = (self.num_layers, self.num_experts)
        if counts_LE.shape != shape:
            raise ValueError(
                f"counts {list(counts_LE.shape)} are not [num_layers({shape[0]}), "
                f"num_experts({shape[1]})]"
            )
        if counts_LE.dtype.kind not in "iuf" or not (counts_LE >= 0).all():
            raise ValueError("counts must be numbers >= 0")
        if counts_LE.max() > LARGEST:
            raise ValueError(f"counts must be at most {LARGEST:.0e}, got {counts_LE.max()}")
        return counts_LE.astype(np.float64)

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


def _check_shares(mean_LE: FloatArray, scatter_LE: FloatArray, weight_L: FloatArray) -> None:
    """Shares are at most 1, and so is what they scatter by token; without tokens there are none."""
    most_L1 = np.where(weight_L > 0, 1 + 1e-9, 0)[:, None]
    for name, array_LE, limit_L1 in (
        ("mean", mean_LE, most_L1),
        ("scatter", scatter_LE, most_L1 * weight_L[:, None]),
    ):
        wrong_L = (array_LE > limit_L1).any(axis=1)
        if wrong_L.any():
            layer = int(wrong_L.argmax())
            raise ValueError(
                f"array '{name}' has {array_LE[layer].max():g} in layer {layer}, which weighs "
                f"{weight_L[layer]:g} tokens: at most {limit_L1[layer, 0]:g} is possible"
            )


def _array(
    state: Mapping[str, NDArray[Any]], name: str, dtype: type, shape: tuple[int | None, ...]
) -> NDArray[Any]:
    """state[name] of that type and shape (None: any length), in range where it is float."""
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
    if array.dtype.kind == "f" and not ((array >= 0) & (array <= LARGEST**2)).all():
        raise ValueError(f"array '{name}' has entries outside [0, {LARGEST**2:.0e}]")
    return array
