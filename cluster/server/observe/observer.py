"""What the gateway tells of its requests and replicas to whoever counts, logs or traces them.

All calls come from the gateway's event loop, several for each step of a replica: an observer does
little and never waits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from cluster.server.errors import Code

if TYPE_CHECKING:
    from cluster.server import wire
    from cluster.server.in_flight import InFlight
    from cluster.server.leaders import Replica

logger = logging.getLogger(__name__)


class Observer:
    """Looks at nothing; overwrite what you want to see.

    A request is either `refused`, or `admitted`, then `progressed` some times and `ended` once.
    """

    def refused(self, code: Code) -> None:
        """A request ended with this error before it was admitted."""

    def admitted(self, request: InFlight) -> None:
        """It has been sent to its replica."""

    def progressed(self, request: InFlight, num_tokens: int, since_last_s: float | None) -> None:
        """One choice got this many new tokens, this long after the ones before; None: its first."""

    def ended(self, request: InFlight, outcome: str) -> None:
        """With a finish reason (stop, length, abort) or the name of an error code."""

    def heard(self, replica: Replica, frame: wire.StepFrame) -> None:
        """A frame of a leader, before its events are looked at."""


NO_OBSERVER = Observer()
_EVENTS = ("refused", "admitted", "progressed", "ended", "heard")


class Observers(Observer):
    """Tells all of them, in order.

    What one raises harms neither requests nor the other observers; it is logged the first time.
    """

    def __init__(self, observers: Iterable[Observer]) -> None:
        told = tuple(observers)
        self._listeners = {event: _listeners(told, event) for event in _EVENTS}
        self._reported: set[Callable[..., None]] = set()

    def refused(self, code: Code) -> None:
        self._tell("refused", code)

    def admitted(self, request: InFlight) -> None:
        self._tell("admitted", request)

    def progressed(self, request: InFlight, num_tokens: int, since_last_s: float | None) -> None:
        self._tell("progressed", request, num_tokens, since_last_s)

    def ended(self, request: InFlight, outcome: str) -> None:
        self._tell("ended", request, outcome)

    def heard(self, replica: Replica, frame: wire.StepFrame) -> None:
        self._tell("heard", replica, frame)

    def _tell(self, event: str, *facts: Any) -> None:
        for listener in self._listeners[event]:
            try:
                listener(*facts)
            except Exception:
                if listener not in self._reported:
                    self._reported.add(listener)
                    logger.exception("%s failed", listener.__qualname__)


def _listeners(observers: Iterable[Observer], event: str) -> list[Callable[..., None]]:
    """Of those that look at this event: tokens come by the thousand a second."""
    nothing = getattr(Observer, event)
    return [
        getattr(observer, event)
        for observer in observers
        if getattr(type(observer), event) is not nothing
    ]
