"""The plan of one step: which tokens of which sequences run, sent by the leader to its TP ranks.

A plan holds all that a follower needs for its forward pass. On the wire it is one msgpack map of
flat integer columns, so 1,024 sequences with long block tables cost bytes and not Python objects.
Free of torch, as is everything that plans: simulations run the same scheduler.
"""

from array import array
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple, Self

import msgpack
import numpy as np

_COLUMNS = {
    "seq_ids": np.int64,
    "starts": np.int32,
    "num_tokens": np.int32,
    "num_blocks": np.int32,
    "wants_logits": np.uint8,
    "token_ids": np.int32,
    "blocks": np.int32,
}


def block_table(blocks: Any = ()) -> "array[int]":
    """A block table: 32-bit block numbers in order of position. Never changed in place."""
    return array("i", blocks)


class PlanItem(NamedTuple):
    """The next tokens of one sequence: `token_ids` go to positions `start`, `start + 1`, ..."""

    seq_id: int
    token_ids: tuple[int, ...]
    start: int
    block_table: "array[int]"
    """Covers positions 0 to start + len(token_ids) - 1, and nothing beyond the last block."""
    wants_logits: bool
    """Whether the logits after the last token are wanted (False for all but a last chunk)."""


@dataclass(frozen=True)
class StepPlan:
    """What one replica computes in one step; empty when it has nothing to do."""

    items: tuple[PlanItem, ...] = ()

    @cached_property
    def num_tokens(self) -> int:
        return sum(len(item.token_ids) for item in self.items)

    @property
    def logit_items(self) -> tuple[PlanItem, ...]:
        """The items that want logits, in the order of the rows of the forward pass's logits."""
        return tuple(item for item in self.items if item.wants_logits)

    def _columns(self) -> dict[str, bytes]:
        items = self.items
        return {
            "seq_ids": array("q", [item.seq_id for item in items]).tobytes(),
            "starts": array("i", [item.start for item in items]).tobytes(),
            "num_tokens": array("i", [len(item.token_ids) for item in items]).tobytes(),
            "num_blocks": array("i", [len(item.block_table) for item in items]).tobytes(),
            "wants_logits": bytes(item.wants_logits for item in items),
            "token_ids": array("i", [t for item in items for t in item.token_ids]).tobytes(),
            "blocks": b"".join([item.block_table.tobytes() for item in items]),
        }

    def encode(self) -> bytes:
        """One msgpack map of columns, little-endian integers. Empty plans are a few bytes."""
        packed: bytes = msgpack.packb(self._columns() if self.items else {})
        return packed

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Raise ValueError when `data` is no encoded plan."""
        try:
            raw = msgpack.unpackb(data, strict_map_key=True)
            columns = {k: np.frombuffer(raw[k], t) for k, t in _COLUMNS.items()} if raw else {}
        except (ValueError, TypeError, KeyError, msgpack.exceptions.UnpackException) as error:
            raise ValueError(f"not an encoded step plan ({len(data)} bytes): {error}") from error
        if not columns:
            return cls()
        lengths = {len(columns[k]) for k in list(_COLUMNS)[:5]}
        totals = [int(columns[k].sum()) for k in ("num_tokens", "num_blocks")]
        if len(lengths) != 1 or totals != [len(columns["token_ids"]), len(columns["blocks"])]:
            raise ValueError(
                f"step plan with columns that disagree: { ({k: len(v) for k, v in columns.items()}) }"
            )
        return cls(_items_of_columns(columns))


def _items_of_columns(columns: dict[str, Any]) -> tuple[PlanItem, ...]:
    lists = {name: column.tolist() for name, column in columns.items() if name != "blocks"}
    token_ends = list(accumulate(lists["num_tokens"]))
    block_ends = list(accumulate(lists["num_blocks"]))
    blocks = block_table(columns["blocks"].tobytes())
    return tuple(
        PlanItem(
            seq_id,
            tuple(lists["token_ids"][token_end - num_tokens : token_end]),
            start,
            blocks[block_end - num_blocks : block_end],
            bool(wants),
        )
        for seq_id, start, num_tokens, num_blocks, wants, token_end, block_end in zip(
            lists["seq_ids"],
            lists["starts"],
            lists["num_tokens"],
            lists["num_blocks"],
            lists["wants_logits"],
            token_ends,
            block_ends,
            strict=True,
        )
    )
