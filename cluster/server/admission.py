"""Which replica gets a request: from its queue, its KV cache, and what of the prompt it has cached.

Costs are in requests. One more request in a replica lengthens the steps of all replicas by a row for as
many steps as it asks for tokens; a cached prompt token is a row that need not be computed. So a cached
prefix is worth (its tokens / tokens asked for) requests, and a replica whose blocks have nearly run out
would rather preempt than run one more:

    cost = requests in flight - cached prefix, at most `slack` + `slack` if nearly full
    slack = 1 + half the mean of requests in flight

Without prefixes that is the least loaded replica. With them the slack bounds how uneven a popular prefix
can make replicas, so nobody starves behind it.

Pure, so that simulations route as the gateway does.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from cluster.engine.block_hash import prompt_digests

NEARLY_FULL = 0.95
"""Share of KV blocks in use."""
MAX_BLOCKS = 1 << 16


class Loaded(Protocol):
    """What the choice looks at in a replica."""

    @property
    def idx(self) -> int: ...
    @property
    def suspect(self) -> bool:
        """Not heard of lately: gets requests only if that is true of all."""

    @property
    def in_flight(self) -> int: ...
    @property
    def kv_usage(self) -> float:
        """Share of KV blocks that sequences hold."""


R = TypeVar("R", bound=Loaded)


class Admission:
    """Remembers which blocks of prompts went where; the least recently used of them are forgotten.

    It is an estimate: replicas evict by their own lights. `block_size` is that of their caches, None
    if they share no prefixes. `max_blocks` bounds the memory, about 200 bytes each.
    """

    def __init__(self, block_size: int | None = None, max_blocks: int = MAX_BLOCKS) -> None:
        self._block_size = block_size
        self._max_blocks = max_blocks
        self._holders: OrderedDict[bytes, int] = OrderedDict()
        """By name of a block: the replicas that were sent it, as bits."""

    @property
    def num_blocks(self) -> int:
        """Blocks remembered."""
        return len(self._holders)

    def choose(
        self,
        replicas: Iterable[R],
        token_ids: Sequence[int] = (),
        *,
        output_tokens: int = 1,
        cache_salt: str = "",
    ) -> R:
        """The replica of least cost, the first of equals; it is then taken to hold the prompt.

        Raises ValueError if there is none.
        """
        candidates = list(replicas)
        names = self._names(token_ids, cache_salt)
        cached = self._cached_blocks(names)
        slack = 1 + sum(replica.in_flight for replica in candidates) / (2 * max(1, len(candidates)))
        tokens_per_block = self._block_size or 0

        def cost(replica: R) -> tuple[bool, float, int]:
            saved = cached.get(replica.idx, 0) * tokens_per_block / max(1, output_tokens)
            full = slack if replica.kv_usage >= NEARLY_FULL else 0.0
            return replica.suspect, replica.in_flight - min(saved, slack) + full, replica.idx

        chosen = min(candidates, key=cost)
        self._note(chosen.idx, names)
        return chosen

    def sent(self, replica_idx: int, token_ids: Sequence[int], cache_salt: str = "") -> None:
        """A prompt went to a replica that was not chosen here."""
        self._note(replica_idx, self._names(token_ids, cache_salt))

    def forget(self, replica_idx: int | None = None) -> None:
        """A replica, or each, has lost its cache."""
        keep = 0 if replica_idx is None else ~(1 << replica_idx)
        left = ((name, bits & keep) for name, bits in self._holders.items())
        self._holders = OrderedDict((name, bits) for name, bits in left if bits)

    def _names(self, token_ids: Sequence[int], cache_salt: str) -> list[bytes]:
        if self._block_size is None:
            return []
        return prompt_digests(token_ids, self._block_size, cache_salt)[: self._max_blocks]

    def _cached_blocks(self, names: Sequence[bytes]) -> dict[int, int]:
        """By replica: how many blocks from the first on it holds; those with none are absent."""
        cached: dict[int, int] = {}
        holders = -1
        for length, name in enumerate(names):
            still = holders & self._holders.get(name, 0)
            if length:
                cached |= dict.fromkeys(_bits(holders & ~still), length)
            holders = still
            if not holders:
                return cached
        return cached | dict.fromkeys(_bits(holders), len(names)) if names else cached

    def _note(self, replica_idx: int, names: Sequence[bytes]) -> None:
        """Later blocks of a prompt are forgotten before earlier ones, without which they are useless."""
        for name in reversed(names):
            self._holders[name] = self._holders.get(name, 0) | 1 << replica_idx
            self._holders.move_to_end(name)
        while len(self._holders) > self._max_blocks:
            self._holders.popitem(last=False)


def _bits(number: int) -> list[int]:
    """Places of the ones of a number that is not negative."""
    places = []
    while number:
        lowest = number & -number
        places.append(lowest.bit_length() - 1)
        number ^= lowest
    return places
