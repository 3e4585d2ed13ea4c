"""So many bytes a second for whatever is sent in the background, however many send it."""

import threading
import time


class ByteBudget:
    """A token bucket that threads share: `take` sleeps until the bytes are covered.

    bytes_per_s None: no limit. burst_s: of an unused budget, as many seconds' worth are kept.
    """

    def __init__(self, bytes_per_s: float | None, burst_s: float = 0.01) -> None:
        if bytes_per_s is not None and bytes_per_s <= 0:
            raise ValueError(f"bytes_per_s must be > 0 or None, got {bytes_per_s:g}")
        self._s_per_byte = 0.0 if bytes_per_s is None else 1.0 / bytes_per_s
        self._burst_s = burst_s
        self._covered_until = 0.0  # by the bytes given out so far, on the monotonic clock
        self._lock = threading.Lock()

    def take(self, num_bytes: int, stop: threading.Event) -> bool:
        """Wait for our turn to send that many bytes; False when `stop` was set meanwhile."""
        with self._lock:
            now = time.monotonic()
            turn = max(self._covered_until, now - self._burst_s)
            self._covered_until = turn + num_bytes * self._s_per_byte
        if turn > now:
            return not stop.wait(turn - now)
        return not stop.is_set()
