"""What is derived from a layer's placement: for the one in force, and ahead of time for the next."""

from collections.abc import Callable
from typing import Generic, TypeVar

from router.placement import LayerPlacement

T = TypeVar("T")


class Prepared(Generic[T]):
    """`of` is for the thread that runs the layer, `prepare` for any other: no step should have to wait
    while something is derived. A placement is recognised by identity."""

    def __init__(self, derive: Callable[[LayerPlacement], T]) -> None:
        self._derive = derive
        self._present: tuple[LayerPlacement, T] | None = None
        self._next: tuple[LayerPlacement, T] | None = None

    def of(self, layer: LayerPlacement) -> T:
        for known in (self._present, self._next):
            if known is not None and known[0] is layer:
                self._present = known
                return known[1]
        self._present = layer, self._derive(layer)
        return self._present[1]

    def prepare(self, layer: LayerPlacement) -> None:
        self._next = layer, self._derive(layer)
