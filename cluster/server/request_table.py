"""Which requests are in flight: unique ids, and never more than the queue may hold."""

import uuid

from cluster.server.errors import Code, RequestError
from cluster.server.in_flight import InFlight


class RequestTable:
    """Holds a place for a request from before anything slow is done for it until it ends."""

    def __init__(self, limit: int, retry_after_s: float) -> None:
        self._limit = limit
        self._retry_after_s = retry_after_s
        self._reserved: set[str] = set()
        self._in_flight: dict[str, InFlight] = {}

    def __len__(self) -> int:
        return len(self._reserved) + len(self._in_flight)

    def reserve(self, request_id: str | None) -> str:
        """Take a place, under a new id if none is given; raises RequestError."""
        if len(self) >= self._limit:
            raise RequestError(
                Code.RESOURCE_EXHAUSTED,
                f"the queue is full: {len(self)} requests in flight, "
                f"max_num_queued_reqs = {self._limit}",
                self._retry_after_s,
            )
        request_id = request_id or uuid.uuid4().hex
        if request_id in self._in_flight or request_id in self._reserved:
            raise RequestError(
                Code.ALREADY_EXISTS, f"request_id = {request_id!r}: is in flight already"
            )
        self._reserved.add(request_id)
        return request_id

    def release(self, request_id: str) -> None:
        """Give up a place that was reserved, if it has not become a request."""
        self._reserved.discard(request_id)

    def add(self, request: InFlight) -> None:
        """The request takes the place reserved under its id."""
        self._reserved.remove(request.info.request_id)
        self._in_flight[request.info.request_id] = request

    def remove(self, request: InFlight) -> bool:
        """False if it has ended before, even if another one has its id now."""
        if self._in_flight.get(request.info.request_id) is not request:
            return False
        del self._in_flight[request.info.request_id]
        return True

    def get(self, request_id: str) -> InFlight | None:
        return self._in_flight.get(request_id)

    def all(self) -> list[InFlight]:
        """A copy: ending requests while going through it is fine."""
        return list(self._in_flight.values())
