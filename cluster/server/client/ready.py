"""Waiting for a server that may still start: what was seen of it so far."""

import time
from typing import Any

import grpc

from cluster.server.client.error import ClientError

RETRY_S = 0.05


class Watched:
    """One wait for the server at `address`, of `timeout_s` seconds."""

    def __init__(self, address: str, timeout_s: float) -> None:
        self._address = address
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._seen = "no answer"

    @property
    def left_s(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def not_ready(self) -> None:
        self._seen = "the server answers but is not ready"

    def failed(self, error: Any) -> None:
        """A failed watch; running out of time tells nothing new."""
        if error.code() != grpc.StatusCode.DEADLINE_EXCEEDED:
            self._seen = str(ClientError.of(error))

    def timeout(self) -> TimeoutError:
        return TimeoutError(
            f"{self._address} was not ready within {self._timeout_s:g} s: {self._seen}"
        )
