"""Which experts the tokens of one forward pass went to, gathered from the ranks that own them.

Costs nothing but in the passes that ask for it, and then one small all-gather in the TP group for each
micro-batch.

Legend: T tokens of the replica, O own rows of them, L expert layers, K experts per token.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from cluster.model.shards import TokenRows, shard_sizes
from comms.group import Group
from experts.moe import MoELayer

Choices = list[list[Tensor]]
"""By expert layer and micro-batch: [O, K]."""


@contextmanager
def recorded(layers: Sequence[MoELayer]) -> Iterator[Choices]:
    """The choices of what is computed inside."""
    choices: Choices = [[] for _ in layers]
    for layer, batches in zip(layers, choices, strict=True):
        layer.record = batches
    try:
        yield choices
    finally:
        for layer in layers:
            layer.record = None


def gather(choices: Choices, tp: Group, num_tokens: int) -> Tensor:
    """Logical experts of all the replica's tokens, int16 [T, L, K]. Collective over the replica."""
    batches = list(zip(*choices, strict=True))
    sizes = shard_sizes(num_tokens, len(batches))
    parts = []
    for layers_OK, size in zip(batches, sizes, strict=True):
        own_OLK = torch.stack(layers_OK, dim=1).to(torch.int16).cpu()
        parts.append(TokenRows(group=tp, num_tokens=size).gather(own_OLK))
    return torch.cat(parts)
