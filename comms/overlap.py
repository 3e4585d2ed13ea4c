"""When hiding communication pays: a rule of message size and measured link speed.

Two things hide time on the network. A dispatch in *two parts* lets the experts start on rows of the
own node while others are in flight, and costs a second exchange inside the node each way. Two
*micro-batches* let one compute while the other is in flight, and cost everything that a layer does
per batch and not per token, once more. Each pays when the network takes longer than that; where two
micro-batches do, parts of them hide nothing more.

The costs are those of a CPU; `expertmesh bench overlap` shows both sides.
"""

from dataclasses import dataclass

from comms.links import LinkSpeed

_PART_S = 4e-3  # a second scatter and reduce in the node, and experts called twice
_MICRO_BATCH_S = 12e-3  # a second pass: its operations, weights read again, smaller products
_LEAST_TOKENS = 8  # a micro-batch of fewer is all overhead


@dataclass(frozen=True, kw_only=True)
class OverlapRule:
    """`dispatch_bytes` and `combine_bytes`: of one row between nodes. links None: one node only."""

    links: LinkSpeed | None
    num_nodes: int
    dispatch_bytes: int
    combine_bytes: int

    def two_parts(self, max_tokens: int) -> bool:
        """Whether a rank's tokens, at most `max_tokens`, are long enough on their way."""
        return self._seconds(max_tokens, self.dispatch_bytes) > _PART_S

    def micro_batches(self, max_tokens: int) -> int:
        """1 or 2."""
        row_bytes = self.dispatch_bytes + self.combine_bytes
        pays = self._seconds(max_tokens, row_bytes) > _MICRO_BATCH_S
        return 2 if pays and max_tokens >= 2 * _LEAST_TOKENS else 1

    def _seconds(self, max_tokens: int, row_bytes: int) -> float:
        """Of an exchange in which every token goes to every other node, which is the most."""
        if self.links is None:
            return 0.0
        return self.links.seconds(max_tokens * (self.num_nodes - 1) * row_bytes)
