"""How a tensor-parallel group divides things: token rows, vocabulary, heads and channels.

Between the blocks of a layer the residual stream is *token-scattered*: of T tokens, member i of the
group keeps rows [T*i//n, T*(i+1)//n). Attention and dense MLPs gather all rows, compute their local
heads or channels, and scatter the sums back.

Legend: T tokens, O own rows of them, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from comms.group import Group


def shard(total: int, parts: int, idx: int) -> slice:
    """The idx-th of `parts` nearly equal ranges of [0, total)."""
    return slice(total * idx // parts, total * (idx + 1) // parts)


def shard_sizes(total: int, parts: int) -> list[int]:
    """Lengths of all shards, in order; they differ by at most one."""
    return [total * (i + 1) // parts - total * i // parts for i in range(parts)]


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """The rows of one step over a group. With no tokens nothing is exchanged, on any member."""

    group: Group
    num_tokens: int

    @property
    def sizes(self) -> list[int]:
        return shard_sizes(self.num_tokens, self.group.size)

    def gather(self, own_OH: Tensor) -> Tensor:
        """Every member's rows: [T, H]."""
        if self.group.size == 1 or self.num_tokens == 0:
            return own_OH
        return self.group.all_gather(own_OH, self.sizes)

    def scatter_sum(self, partial_TH: Tensor) -> Tensor:
        """My rows of the members' sum (fp32, in rank order): [O, H]."""
        if self.group.size == 1 or self.num_tokens == 0:
            return partial_TH
        return self.group.reduce_scatter(partial_TH, self.sizes)
