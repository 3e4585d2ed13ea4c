"""The baseline: an interpolated modified Kneser-Ney n-gram model over symbols, in numpy.

Works on bytes and on tokens alike. Formula: Chen and Goodman, "An empirical study of smoothing
techniques for language modeling" (1999), section 3, with three discounts an order (D1, D2, D3+),
continuation counts below the highest order, and a uniform distribution at the bottom.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]
Counts = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class OrderTable:
    """One order's counts. `grams` and `contexts` are sorted keys; the rest is aligned with them."""

    grams: Keys
    gram_discounted: Counts  # max(count - discount, 0)
    contexts: Keys
    context_total: Counts
    context_backoff: Counts  # sum of the discounts taken in this context


class KneserNey:
    """P(symbol | up to order - 1 symbols before it), trained on documents of int symbols.

    `num_symbols` counts the alphabet without the document boundary, which is a symbol of its own.
    ValueError when a gram of this order does not fit a 64-bit key.
    """

    def __init__(
        self, documents: Sequence[NDArray[np.integer]], num_symbols: int, order: int
    ) -> None:
        if (num_symbols + 1) ** order >= 2**64:
            raise ValueError(
                f"({num_symbols} + 1) ** {order} does not fit 64 bits: take a lower order"
            )
        self.num_symbols = num_symbols
        self.base = num_symbols + 1
        self.order = order
        stream = self._stream(documents)
        grams, counts = np.unique(self._keys(stream, order), return_counts=True)
        counts_f = counts.astype(np.float64)
        tables = []
        for length in range(order, 0, -1):
            tables.append(self._table(grams, counts_f))
            # The continuation count of a shorter gram: how many distinct symbols come before it.
            grams, counts = np.unique(
                grams % np.uint64(self.base ** (length - 1)), return_counts=True
            )
            counts_f = counts.astype(np.float64)
        self.tables = tables[::-1]  # tables[n - 1] holds grams of length n

    def bits(self, documents: Sequence[NDArray[np.integer]]) -> float:
        """Minus the summed log2 probability of all symbols of `documents`, each from its start."""
        stream = self._stream(documents)
        scored = stream[self.order - 1 :] != self.num_symbols
        prob = np.full(len(stream) - self.order + 1, 1.0 / self.base)
        for length in range(1, self.order + 1):
            keys = self._keys(stream[self.order - length :], length)
            prob = self._interpolate(self.tables[length - 1], keys, prob)
        return float(-np.log2(prob[scored]).sum())

    def _stream(self, documents: Sequence[NDArray[np.integer]]) -> Keys:
        """All documents with order - 1 boundary symbols before each."""
        boundary = np.full(self.order - 1, self.num_symbols, dtype=np.uint64)
        parts = [part for doc in documents for part in (boundary, doc.astype(np.uint64))]
        return np.concatenate(parts)

    def _keys(self, stream: Keys, length: int) -> Keys:
        """Every window of `length` symbols as one number, most recent symbol lowest."""
        count = len(stream) - length + 1
        keys = np.zeros(count, dtype=np.uint64)
        for offset in range(length):
            keys = keys * np.uint64(self.base) + stream[offset : offset + count]
        return keys

    def _table(self, grams: Keys, counts: Counts) -> OrderTable:
        kept = grams % np.uint64(self.base) != self.num_symbols  # the boundary is never predicted
        grams, counts = grams[kept], counts[kept]
        discount = _discounts(counts)[np.minimum(counts, 3).astype(np.int64)]
        contexts, starts = np.unique(grams // np.uint64(self.base), return_index=True)
        taken = np.minimum(discount, counts)
        return OrderTable(
            grams=grams,
            gram_discounted=counts - taken,
            contexts=contexts,
            context_total=np.add.reduceat(counts, starts),
            context_backoff=np.add.reduceat(taken, starts),
        )

    def _interpolate(self, table: OrderTable, keys: Keys, lower: Counts) -> Counts:
        gram_idx, gram_known = _find(table.grams, keys)
        context_idx, context_known = _find(table.contexts, keys // np.uint64(self.base))
        found = np.where(gram_known, table.gram_discounted[gram_idx], 0.0)
        total = table.context_total[context_idx]
        higher = (found + table.context_backoff[context_idx] * lower) / total
        return np.where(context_known, higher, lower)


def _discounts(counts: Counts) -> Counts:
    """[0, D1, D2, D3+] from the counts of counts; absolute 0.75 where those are too thin."""
    n1, n2, n3, n4 = (float(np.sum(counts == times)) for times in (1, 2, 3, 4))
    if min(n1, n2, n3, n4) == 0:
        return np.array([0.0, 0.75, 0.75, 0.75])
    y = n1 / (n1 + 2 * n2)
    raw = [1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
    limited = [min(max(value, 0.05), times - 0.05) for times, value in enumerate(raw, start=1)]
    return np.array([0.0, *limited])


def _find(table: Keys, keys: Keys) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    idx = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return idx, table[idx] == keys
