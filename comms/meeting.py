"""Members of a group that is being built leave a word for each other in the store."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from comms.group import CommTimeout
from comms.store import PrefixStore, Store


def meet(
    store: Store, rank: int, ranks: Sequence[int], word: str = "", *, name: str, timeout_s: float
) -> list[str]:
    """Every member's word, in the order of `ranks`; once for each name and store.

    Raises CommTimeout naming those that did not come.
    """
    scoped = PrefixStore(f"{name}/here", store)
    scoped.set(str(rank), word)
    try:
        scoped.wait([str(member) for member in ranks], timedelta(seconds=timeout_s))
    except RuntimeError:
        raise CommTimeout(
            group=name,
            operation="connect",
            rank=rank,
            silent=[member for member in ranks if not scoped.check([str(member)])],
            deadline_s=timeout_s,
        ) from None
    return [scoped.get(str(member)).decode() for member in ranks]
