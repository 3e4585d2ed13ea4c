"""Who owns which KV block. Every operation costs O(1) per block it hands out or takes back."""

from array import array

from cluster.engine.plan import block_table


class BlockManager:
    """A stack of free blocks; the same calls always give the same blocks."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._is_free = bytearray(b"\x01") * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    @property
    def capacity(self) -> int:
        """Tokens that fit into the whole cache."""
        return self.num_blocks * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens of one sequence."""
        return -(-num_tokens // self.block_size)

    def allocate(self, num_blocks: int) -> "array[int]":
        """Hand out blocks; RuntimeError when fewer are free, for callers look before they take."""
        if num_blocks > len(self._free):
            raise RuntimeError(f"{num_blocks} KV blocks wanted, {len(self._free)} are free")
        blocks = block_table(self._free.pop() for _ in range(num_blocks))
        for block in blocks:
            self._is_free[block] = 0
        return blocks

    def free(self, blocks: "array[int]") -> None:
        """Take blocks back; RuntimeError when one is free already."""
        for block in reversed(blocks):
            if self._is_free[block]:
                raise RuntimeError(f"KV block {block} is freed twice")
            self._is_free[block] = 1
            self._free.append(block)
