"""Names of full KV blocks: digests of all that the contents of a block depend on.

A block's name is the digest of its tokens and of the name of the block before it, so blocks of one
name hold the same tokens, after the same tokens, from the first on. The chain begins with the salt of
the request: those with different salts share nothing. At 256 bits nobody finds two prompts whose
blocks have one name, also not on purpose.
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

_DIGEST_BYTES = 32


def extend(
    digests: list[bytes], token_ids: Sequence[int], block_size: int, salt: str, num_blocks: int
) -> None:
    """Append what `digests` lacks of the names of the first `num_blocks` blocks of `token_ids`."""
    if len(digests) >= num_blocks:
        return
    last = digests[-1] if digests else _digest(salt.encode(errors="surrogatepass"))
    tokens = array("i", token_ids[len(digests) * block_size : num_blocks * block_size])
    data, size = tokens.tobytes(), block_size * tokens.itemsize
    for start in range(0, len(data), size):
        last = _digest(last + data[start : start + size])
        digests.append(last)


def prompt_digests(token_ids: Sequence[int], block_size: int, salt: str = "") -> list[bytes]:
    """The names of those blocks of a prompt that may be found in a cache.

    All full ones but what holds the last token: that one is always computed, for its logits.
    """
    digests: list[bytes] = []
    extend(digests, token_ids, block_size, salt, (len(token_ids) - 1) // block_size)
    return digests


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=_DIGEST_BYTES).digest()
