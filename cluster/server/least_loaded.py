"""Which replica gets a request. Pure, so that simulations route as the gateway does."""

from collections.abc import Iterable
from typing import Protocol, TypeVar


class Loaded(Protocol):
    """What the choice looks at in a replica."""

    @property
    def idx(self) -> int: ...
    @property
    def suspect(self) -> bool: ...
    @property
    def in_flight(self) -> int: ...


R = TypeVar("R", bound=Loaded)


def least_loaded(replicas: Iterable[R]) -> R:
    """The one with the fewest requests among those that are heard of; the first of equals.

    One that is not heard of only if none is.
    """
    return min(replicas, key=lambda replica: (replica.suspect, replica.in_flight, replica.idx))
