"""Which experts the tokens of one forward pass went to, gathered from the ranks that own them.

Costs nothing but in the passes that ask for it, and then small all-gathers in the TP group.

Legend: T tokens of the replica, O own rows of them, L expert layers, K experts per token.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

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


def gather(choices: Choices, tp: Group) -> Tensor:
    """Logical experts of all the replica's tokens, int16 [T, L, K]. Collective over the replica, whose ranks
    say how many rows they own: backends divide them differently."""
    batches = [
        torch.stack(layers_OK, 1).to(torch.int16).cpu() for layers_OK in zip(*choices, strict=True)
    ]
    own = torch.tensor([[len(own_OLK) for own_OLK in batches]])
    sizes = tp.all_gather(own, [1] * tp.size)
    return torch.cat(
        [tp.all_gather(own_OLK, sizes[:, i].tolist()) for i, own_OLK in enumerate(batches)]
    )
