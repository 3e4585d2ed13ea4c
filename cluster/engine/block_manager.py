"""Who holds which KV block, and which blocks are kept for later. O(1) per block of each operation.

A block is *used* while sequences hold it, *cached* when none does but its contents have a name by
which they may be found (`block_hash.py`), and *free* otherwise. Cached blocks are forgotten once free
ones have run out: those unused for longest first, of one sequence the last first. So as sequences hold
all blocks before one that they hold, no block is forgotten before the ones after it.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from cluster.engine.plan import block_table


class BlockManager:
    """Free blocks are a stack: the same calls always give the same blocks."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.generation = 0
        """How often all names were forgotten."""
        self._free = list(range(num_blocks - 1, -1, -1))
        self._num_holders = [0] * num_blocks
        self._names: list[bytes | None] = [None] * num_blocks
        self._named: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()
        """Named blocks without holders, unused for longest first."""

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_available

    @property
    def capacity(self) -> int:
        """Tokens that fit into the whole cache."""
        return self.num_blocks * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens of one sequence."""
        return -(-num_tokens // self.block_size)

    def allocate(self, num_blocks: int) -> "array[int]":
        """Hand out blocks; RuntimeError when fewer are available, for callers look before they take."""
        if num_blocks > self.num_available:
            raise RuntimeError(f"{num_blocks} KV blocks wanted, {self.num_available} are available")
        while len(self._free) < num_blocks:
            self._forget_oldest()
        blocks = block_table(self._free[len(self._free) - num_blocks :])
        del self._free[len(self._free) - num_blocks :]
        blocks.reverse()
        for block in blocks:
            self._num_holders[block] = 1
        return blocks

    def free(self, blocks: "array[int]") -> None:
        """Take a sequence's blocks back; RuntimeError when one has no holder."""
        for block in reversed(blocks):
            if not self._num_holders[block]:
                raise RuntimeError(f"KV block {block} is freed twice")
            self._num_holders[block] -= 1
            if self._num_holders[block]:
                continue
            if self._names[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None

    def find(self, names: Iterable[bytes]) -> "array[int]":
        """The blocks that begin a chain of names, as many as are there."""
        found = block_table()
        for name in names:
            block = self._named.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def num_cached_of(self, blocks: "array[int]") -> int:
        """How many of these `hold` would take from what is available."""
        return sum(not self._num_holders[block] for block in blocks)

    def hold(self, blocks: "array[int]") -> None:
        """One more holder for blocks that were found."""
        for block in blocks:
            self._num_holders[block] += 1
            self._cached.pop(block, None)

    def name(self, block: int, name: bytes) -> int:
        """Say what a held, full block holds: it may be found from now on.

        Where another block of this name is there already, the holder gets that one for its own.
        """
        other = self._named.setdefault(name, block)
        if other != block:
            self.hold(block_table([other]))
            self.free(block_table([block]))
        else:
            self._names[block] = name
        return other

    def forget(self) -> int:
        """No block is found any more, also none that is in use; returns how many were cached."""
        num_cached = len(self._cached)
        self._free += self._cached
        self._cached.clear()
        self._named.clear()
        self._names = [None] * self.num_blocks
        self.generation += 1
        return num_cached

    def holders(self) -> Sequence[int]:
        """How many sequences hold each block."""
        return tuple(self._num_holders)

    def _forget_oldest(self) -> None:
        block, _ = self._cached.popitem(last=False)
        name, self._names[block] = self._names[block], None
        assert name is not None, "cached blocks are named"
        del self._named[name]
        self._free.append(block)
