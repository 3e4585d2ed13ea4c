"""When a failed call is made again: after the server's own advice, or ever longer pauses.

Only calls that had no effect are: the server refused them (queue full, with RetryInfo) or could not
be reached, and nothing of an answer has come. Pauses are random, so that clients that failed together do
not come back together.
"""

import random
import time

from cluster.server.client.error import ClientError
from cluster.server.errors import Code

FIRST_PAUSE_S = 0.1
MAX_PAUSE_S = 5.0


class Attempts:
    """Of one call, all under one deadline `timeout_s` from now; at most `max_retries` after the first."""

    def __init__(self, timeout_s: float, max_retries: int) -> None:
        self._deadline = time.monotonic() + timeout_s
        self._retries_left = max_retries
        self._pause_s = FIRST_PAUSE_S

    @property
    def left_s(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def pause_after(self, error: ClientError) -> float:
        """Seconds to wait until the next attempt; raises `error` if there must be none."""
        if not self._retries_left or not _had_no_effect(error):
            raise error
        if error.retry_after_s is not None:
            pause_s = error.retry_after_s * random.uniform(1.0, 1.25)  # never sooner
        else:
            pause_s = self._pause_s * random.uniform(0.5, 1.0)
        if pause_s >= self.left_s:
            raise error
        self._retries_left -= 1
        self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)
        return pause_s


def _had_no_effect(error: ClientError) -> bool:
    """A full queue comes with advice when to try again; other limits would be hit again."""
    if error.code == Code.RESOURCE_EXHAUSTED:
        return error.retry_after_s is not None
    return error.code == Code.UNAVAILABLE
