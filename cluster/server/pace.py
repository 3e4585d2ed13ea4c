"""How soon a client that was refused should come back, from how fast requests end."""

import math

_MEMORY_S = 5.0
"""Time constant of the averages."""
_SHORTEST_S = 0.05
_LONGEST_S = 60.0


class Pace:
    """Counts ends and refusals, forgotten exponentially. Times are seconds of one clock, passed in.

    Those who were refused lately are told to spread over the time in which as many will have been
    served: (refusals + 1) / rate of ends.
    """

    def __init__(self, first_s: float) -> None:
        """`first_s`: the answer as long as no request has ended lately."""
        self._first_s = first_s
        self._ended = 0.0
        self._refused = 0.0
        self._at = -math.inf

    def ended(self, now: float) -> None:
        self._forget(now)
        self._ended += 1.0

    def retry_after(self, now: float) -> float:
        """Seconds, for one more client that is refused."""
        self._forget(now)
        self._refused += 1.0
        if self._ended < 0.5:
            return self._first_s
        per_second = self._ended / _MEMORY_S
        return min(max(self._refused / per_second, _SHORTEST_S), _LONGEST_S)

    def _forget(self, now: float) -> None:
        kept = math.exp((self._at - now) / _MEMORY_S)
        self._ended *= kept
        self._refused *= kept
        self._at = now
