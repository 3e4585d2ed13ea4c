"""Two micro-batches in turns: one computes while the other's tokens are in flight.

A pass over the layers stops whenever its tokens are between ranks. While it waits, the pass of the
other micro-batch runs up to its own next stop:

    first    attention 0, gate | ........ | experts | ......... | attention 1 ...
    second                     | att., gate | ....... | experts | ...

Every rank runs the same passes in the same order, so the order of exchanges agrees everywhere. A
later token of a sequence finds the keys of earlier ones: the first micro-batch is always ahead.
"""

from collections.abc import Generator, Sequence

from torch import Tensor

from comms.where import Where

Pass = Generator[None, None, Tensor]


def interleave(passes: Sequence[Pass], where: Where) -> list[Tensor]:
    """The result of each pass. `where.layer` follows whichever runs."""
    results: dict[int, Tensor] = {}
    layers = [where.layer] * len(passes)
    while len(results) < len(passes):
        for i, steps in enumerate(passes):
            if i in results:
                continue
            where.layer = layers[i]
            try:
                next(steps)
            except StopIteration as stop:
                results[i] = stop.value
            layers[i] = where.layer
    where.layer = -1
    return [results[i] for i in range(len(passes))]
