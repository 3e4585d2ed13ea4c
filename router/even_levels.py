"""Tokens divided over ranks as evenly as copies allow: below the greatest load, too.

The ranks that decide the greatest load can pass nothing on; all others may still be more or less even.
A part of the graph (at first a connected one) gives each of its ranks the part's mean, in whole tokens.
Where that is impossible, some ranks have more tokens that can go nowhere else than their mean: they
become a part of their own with a higher mean. Experts that are on other ranks as well stay with those,
and none of their tokens go to the new part (decomposition algorithm of Fujishige and Groenevelt).

No loads are more even than these: each sum of the k greatest is the least possible, and each sum of the
k least is the greatest possible. With speeds that holds but for the rounding to whole tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

from router.flow import Bottleneck, Flow


class _Part(NamedTuple):
    load: int
    speed: int


class EvenLevels:
    """speeds: of each rank, positive."""

    def __init__(self, graph: Flow, speeds: Sequence[int]) -> None:
        self._graph, self._speeds = graph, speeds
        self._components = graph.components()

    def fill(self, tokens: Sequence[int], own: Sequence[int]) -> tuple[list[int], bool]:
        """Tokens on each edge, and whether (surely, if so) no other flow leads to the same loads: no
        cycle is left. own: what each rank has besides."""
        of_expert, of_rank = map(list, self._components)
        closed: set[int] = set()
        while True:
            parts = self._parts(tokens, own, of_expert, of_rank)
            room, least, most = self._rooms(parts, own, of_rank)
            flow, tight = self._fill(tokens, room, [], closed)
            if tight and not self._divided(tight, parts, tokens, own, of_expert, of_rank):
                # Other ranks than these must be the ones with a token more than the mean rounded down.
                flow, _ = self._fill(tokens, least, [], closed)
                flow, tight = self._fill(tokens, most, flow, closed)
                if tight and not self._divided(tight, parts, tokens, own, of_expert, of_rank):
                    # What does not fit into means rounded up is above them; each turn adds a part.
                    raise RuntimeError(
                        f"no part of {parts} can be divided, though {tight} are full"
                    )
            if not tight:
                joined = len(flow) - len(closed)
                return flow, joined <= len(of_expert) + len(of_rank) - len(parts)
            edges = zip(self._graph.experts, self._graph.ranks, strict=True)
            closed = {i for i, (e, r) in enumerate(edges) if of_expert[e] != of_rank[r]}

    def _fill(
        self, tokens: Sequence[int], room: Sequence[int], start: list[int], closed: set[int]
    ) -> tuple[list[int], list[Bottleneck]]:
        flow, tight = self._graph.fill(tokens, [max(0, r) for r in room], start, closed)
        return flow, tight + [Bottleneck([], [r]) for r, left in enumerate(room) if left < 0]

    def _parts(
        self,
        tokens: Sequence[int],
        own: Sequence[int],
        of_expert: Sequence[int],
        of_rank: Sequence[int],
    ) -> list[_Part]:
        load, speed = [0] * (max(of_rank) + 1), [0] * (max(of_rank) + 1)
        for part, amount in zip(of_expert, tokens, strict=True):
            load[part] += amount
        for part, amount, unit in zip(of_rank, own, self._speeds, strict=True):
            load[part] += amount
            speed[part] += unit
        return list(map(_Part, load, speed))

    def _rooms(
        self, parts: Sequence[_Part], own: Sequence[int], of_rank: Sequence[int]
    ) -> tuple[list[int], list[int], list[int]]:
        """Means less own tokens: rounded so that the sum is right, all rounded down, all up."""
        carry, room, least, most = [0] * len(parts), [], [], []
        for part, unit, amount in zip(of_rank, self._speeds, own, strict=True):
            load, speed = parts[part]
            due, carry[part] = divmod(carry[part] + unit * load, speed)
            room.append(due - amount)
            least.append(unit * load // speed - amount)
            most.append(-(-unit * load // speed) - amount)
        return room, least, most

    def _divided(
        self,
        tight: Sequence[Bottleneck],
        parts: Sequence[_Part],
        tokens: Sequence[int],
        own: Sequence[int],
        of_expert: list[int],
        of_rank: list[int],
    ) -> bool:
        """Whether a bottleneck has more than its part's mean; each that has is a part from now on."""
        experts = {expert for bottleneck in tight for expert in bottleneck.experts}
        ranks = {rank for bottleneck in tight for rank in bottleneck.ranks}
        load, speed = [0] * len(parts), [0] * len(parts)
        for expert in experts:
            load[of_expert[expert]] += tokens[expert]
        for rank in ranks:
            load[of_rank[rank]] += own[rank]
            speed[of_rank[rank]] += self._speeds[rank]
        above = [i for i, p in enumerate(parts) if load[i] * p.speed > p.load * speed[i]]
        new = {part: len(parts) + i for i, part in enumerate(above)}
        for expert in experts:
            of_expert[expert] = new.get(of_expert[expert], of_expert[expert])
        for rank in ranks:
            of_rank[rank] = new.get(of_rank[rank], of_rank[rank])
        return bool(new)
