"""The plan of one step: which tokens of which sequences run, sent by the leader to its TP ranks.

A plan holds all that a follower needs for its forward pass. In memory as on the wire it is a few flat
columns of integers, so 1,024 sequences with long block tables cost bytes and not Python objects.
Free of torch, as is everything that plans: simulations run the same scheduler.
"""

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property, partial
from itertools import accumulate
from typing import Any, NamedTuple, Self

import msgpack

_TYPES = {
    "seq_ids": "q",
    "starts": "i",
    "counts": "i",
    "num_blocks": "i",
    "logits": "B",
    "token_ids": "i",
    "blocks": "i",
}
"""Of the columns, as array.array names them. The first five have one element per row."""
_PER_ROW = tuple(_TYPES)[:5]
_FLAG = "wants_routed_experts"


def block_table(blocks: Any = ()) -> "array[int]":
    """A block table: 32-bit block numbers in order of position. Never changed in place."""
    return array("i", blocks)


class Logits(IntEnum):
    """Which rows of logits a step gives for the tokens of one sequence."""

    NONE = 0
    """All but a last chunk."""
    LAST = 1
    """After the last token."""
    ALL = 2
    """After every token: for log-probabilities of the prompt."""


class PlanItem(NamedTuple):
    """The next tokens of one sequence: `token_ids` go to positions `start`, `start + 1`, ..."""

    seq_id: int
    token_ids: tuple[int, ...]
    start: int
    block_table: "array[int]"
    """Covers positions 0 to start + len(token_ids) - 1, and nothing beyond the last block."""
    logits: Logits


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What one replica computes in one step; empty when it has nothing to do.

    One row per sequence. `token_ids` and `blocks` hold the tokens and block tables of the rows one
    after the other; `counts` and `num_blocks` say how many each row has. Columns are never changed.
    """

    seq_ids: "array[int]" = field(default_factory=partial(array, "q"))
    starts: "array[int]" = field(default_factory=partial(array, "i"))
    counts: "array[int]" = field(default_factory=partial(array, "i"))
    num_blocks: "array[int]" = field(default_factory=partial(array, "i"))
    logits: "array[int]" = field(default_factory=partial(array, "B"))
    token_ids: "array[int]" = field(default_factory=partial(array, "i"))
    blocks: "array[int]" = field(default_factory=partial(array, "i"))
    wants_routed_experts: bool = False
    """Whether some sequence asks which experts its tokens went to."""

    @classmethod
    def of(cls, items: Iterable[PlanItem], wants_routed_experts: bool = False) -> Self:
        """The plan of these rows."""
        items = list(items)
        return cls(
            seq_ids=array("q", [item.seq_id for item in items]),
            starts=array("i", [item.start for item in items]),
            counts=array("i", [len(item.token_ids) for item in items]),
            num_blocks=array("i", [len(item.block_table) for item in items]),
            logits=array("B", [item.logits for item in items]),
            token_ids=array("i", [token for item in items for token in item.token_ids]),
            blocks=joined([item.block_table for item in items]),
            wants_routed_experts=wants_routed_experts,
        )

    def __len__(self) -> int:
        return len(self.seq_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def max_blocks(self) -> int:
        """Of any row."""
        return max(self.num_blocks, default=0)

    @cached_property
    def items(self) -> tuple[PlanItem, ...]:
        """The rows, for whoever looks at them one by one."""
        return tuple(self._items())

    @property
    def logit_items(self) -> tuple[PlanItem, ...]:
        """The items that want logits, in the order of the rows of the forward pass's logits."""
        return tuple(item for item in self.items if item.logits)

    @cached_property
    def num_logit_rows(self) -> int:
        """Rows of the forward pass's logits."""
        wanted = zip(self.logits, self.counts, strict=True)
        return sum(count if logits == Logits.ALL else logits for logits, count in wanted)

    def rows(self, rows: Iterable[int]) -> Self:
        """The plan with these of its rows only."""
        items = self.items
        return self.of((items[row] for row in rows), self.wants_routed_experts)

    def _items(self) -> Iterator[PlanItem]:
        token_ids = self.token_ids.tolist()
        token_ends = accumulate(self.counts)
        block_ends = accumulate(self.num_blocks)
        columns = (self.seq_ids, self.starts, self.counts, self.num_blocks, self.logits)
        for row in zip(*columns, token_ends, block_ends, strict=True):
            seq_id, start, count, num_blocks, logits, token_end, block_end = row
            yield PlanItem(
                seq_id,
                tuple(token_ids[token_end - count : token_end]),
                start,
                self.blocks[block_end - num_blocks : block_end],
                Logits(logits),
            )

    def encode(self) -> bytes:
        """One msgpack map of columns, little-endian integers. Empty plans are a few bytes."""
        columns: dict[str, Any] = {}
        if len(self):
            columns = {name: getattr(self, name).tobytes() for name in _TYPES}
            columns[_FLAG] = self.wants_routed_experts
        packed: bytes = msgpack.packb(columns)
        return packed

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Raise ValueError when `data` is no encoded plan."""
        try:
            raw = msgpack.unpackb(data, strict_map_key=True)
            columns = {k: array(kind, bytes(raw[k])) for k, kind in _TYPES.items()} if raw else {}
            flag = bool(raw.get(_FLAG))
        except (ValueError, TypeError, KeyError, AttributeError, msgpack.UnpackException) as error:
            raise ValueError(f"not an encoded step plan ({len(data)} bytes): {error}") from error
        if not columns:
            return cls()
        lengths = {len(columns[name]) for name in _PER_ROW}
        totals = [sum(columns["counts"]), sum(columns["num_blocks"])]
        if len(lengths) != 1 or totals != [len(columns["token_ids"]), len(columns["blocks"])]:
            raise ValueError(
                f"step plan with columns that disagree: { ({k: len(v) for k, v in columns.items()}) }"
            )
        return cls(**columns, wants_routed_experts=flag)


def joined(tables: "Iterable[array[int]]") -> "array[int]":
    """Block tables, one after the other."""
    return array("i", b"".join(tables))
