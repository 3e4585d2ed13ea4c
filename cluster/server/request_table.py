"""Which requests are in flight: unique ids, and never more than the queue may hold."""

import uuid
from collections.abc import Iterable

from cluster.server.choice import Choice
from cluster.server.errors import Code, RequestError, invalid
from cluster.server.in_flight import InFlight

_MAX_REMEMBERED = 4096


class RequestTable:
    """Holds places for a request from before anything slow is done for it until it ends.

    A request takes one place for each of its choices, and prompt tokens for each of them.
    """

    def __init__(self, limit: int, max_tokens: int | None = None) -> None:
        self._limit = limit
        self._max_tokens = max_tokens
        self._places: dict[str, list[str]] = {}
        """By request: the engine's ids of its choices."""
        self._taken: set[str] = set()
        """All ids in use, of requests and choices."""
        self._tokens: dict[str, int] = {}
        self._num_tokens = 0
        self._in_flight: dict[str, InFlight] = {}
        self._choices: dict[str, tuple[InFlight, Choice]] = {}
        self._cut_off: dict[str, None] = {}
        """Engine ids of which a late event may still be on its way, the oldest first."""
        self._num_renamed = 0
        self._num_places = 0

    def __len__(self) -> int:
        """Requests in flight."""
        return len(self._places)

    def check_room(self, num_choices: int = 1) -> None:
        """Raise RequestError where that many choices would not find a place."""
        if num_choices > self._limit:
            raise invalid("n", num_choices, f"at most max_num_queued_reqs = {self._limit}")
        if self._num_places + num_choices > self._limit:
            wanted = "" if num_choices == 1 else f", and n = {num_choices} choices take as many"
            raise RequestError(
                Code.RESOURCE_EXHAUSTED,
                f"the queue is full: {self._num_places} requests in flight, "
                f"max_num_queued_reqs = {self._limit}{wanted}",
            )
        self._check_tokens(1)  # at least, so that a full queue costs no tokenizing

    def reserve(self, request_id: str | None, num_choices: int = 1) -> str:
        """Take places, under a new id if none is given; raises RequestError."""
        self.check_room(num_choices)
        request_id = request_id or uuid.uuid4().hex
        ids = self._engine_ids(request_id, num_choices)
        if request_id in self._places or not self._taken.isdisjoint(ids):
            raise RequestError(
                Code.ALREADY_EXISTS, f"request_id = {request_id!r}: is in flight already"
            )
        self._places[request_id] = ids
        self._taken.update(ids)
        self._num_places += num_choices
        return request_id

    def engine_ids(self, request_id: str) -> list[str]:
        """What the engine is to call the choices of a request that has its places."""
        return self._places[request_id]

    def charge(self, request_id: str, num_prompt_tokens: int) -> None:
        """The prompt of a request that has its places; raises RequestError if all prompts together
        grow too long. One alone is let in, whatever its length."""
        num_tokens = num_prompt_tokens * len(self._places[request_id])
        self._check_tokens(num_tokens)
        self._tokens[request_id] = num_tokens
        self._num_tokens += num_tokens

    def release(self, request_id: str) -> None:
        """Give up places that were reserved, if they have not become a request."""
        if request_id in self._places and request_id not in self._in_flight:
            self._vacate(request_id)

    def add(self, request: InFlight) -> None:
        """The request takes the places reserved under its id."""
        self._in_flight[request.info.request_id] = request
        for choice in request.choices:
            self._choices[choice.engine_id] = (request, choice)

    def remove(self, request: InFlight) -> bool:
        """False if it has ended before, even if another one has its id now."""
        request_id = request.info.request_id
        if self._in_flight.get(request_id) is not request:
            return False
        del self._in_flight[request_id]
        for choice in request.choices:
            del self._choices[choice.engine_id]
        self._vacate(request_id)
        return True

    def cut_off(self, engine_id: str) -> None:
        """The engine was told to end this one, and may speak of it once more before it has heard."""
        self._cut_off[engine_id] = None
        if len(self._cut_off) > _MAX_REMEMBERED:
            del self._cut_off[next(iter(self._cut_off))]

    def get(self, request_id: str) -> InFlight | None:
        return self._in_flight.get(request_id)

    def choice(self, engine_id: str) -> tuple[InFlight, Choice] | None:
        return self._choices.get(engine_id)

    def all(self) -> list[InFlight]:
        """A copy: ending requests while going through it is fine."""
        return list(self._in_flight.values())

    def _check_tokens(self, num_tokens: int) -> None:
        limit = self._max_tokens
        if limit is not None and self._num_tokens and self._num_tokens + num_tokens > limit:
            raise RequestError(
                Code.RESOURCE_EXHAUSTED,
                f"the queue is full: {self._num_tokens} prompt tokens in flight and at least "
                f"{num_tokens} more, max_num_queued_tokens = {limit}",
            )

    def _engine_ids(self, request_id: str, num_choices: int) -> list[str]:
        """ID, ID#1, ID#2 ...; another ID where the engine may still speak of the last of that name."""
        ids = _numbered(request_id, num_choices)
        if not self._cut_off.keys().isdisjoint(ids):
            self._num_renamed += 1
            ids = _numbered(f"{request_id}~{self._num_renamed}", num_choices)
        return ids

    def _vacate(self, request_id: str) -> None:
        ids = self._places.pop(request_id)
        self._taken.difference_update(ids)
        self._num_places -= len(ids)
        self._num_tokens -= self._tokens.pop(request_id, 0)


def _numbered(request_id: str, num_choices: int) -> list[str]:
    rest: Iterable[str] = (f"{request_id}#{index}" for index in range(1, num_choices))
    return [request_id, *rest]
