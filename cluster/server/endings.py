"""The one place where requests end, whatever for: in the table, at their reader and in the engine."""

import time
from collections.abc import Callable

from cluster.server import wire
from cluster.server.choice import Choice
from cluster.server.errors import Code, RequestError
from cluster.server.in_flight import InFlight
from cluster.server.leaders import Replica
from cluster.server.observe.observer import Observer
from cluster.server.pace import Pace
from cluster.server.request import Finish
from cluster.server.request_table import RequestTable


class Endings:
    """`replica`: the attached one of this index. `pace` and `observer` are told of each end."""

    def __init__(
        self,
        requests: RequestTable,
        replica: Callable[[int], Replica],
        pace: Pace,
        observer: Observer,
    ) -> None:
        self._requests = requests
        self._replica = replica
        self._pace = pace
        self._observer = observer

    def end(
        self,
        request: InFlight,
        *,
        finish: Finish | None = None,
        error: RequestError | None = None,
        tell_engine: bool = True,
    ) -> None:
        """The one end of a request, with all of its choices; later calls for it do nothing."""
        if not self._requests.remove(request):
            return
        if request.deadline:
            request.deadline.cancel()
        replica = self._replica(request.info.replica)
        for choice in request.choices:
            if choice.finish is None:
                replica.in_flight -= 1
                if tell_engine:
                    self._cut_off(replica, choice)
                if finish:
                    request.finish(choice, finish)
        if error:
            request.fail(error)
        self._pace.ended(time.monotonic())
        self._observer.ended(request, error.code.value if error else request.outcome)

    def finish(self, request: InFlight, choice: Choice, finish: Finish, tell_engine: bool) -> None:
        """The end of one choice, and of the request with the last of them."""
        replica = self._replica(request.info.replica)
        replica.in_flight -= 1
        if tell_engine:
            self._cut_off(replica, choice)
        request.finish(choice, finish)
        if request.all_finished:
            self.end(request)

    def lose_all(self, reason: str, replica: int | None = None) -> None:
        """All requests, or all of one replica, whose engine cannot be told any more."""
        for request in self._requests.all():
            if replica in (None, request.info.replica):
                self.end(request, error=lost(request, reason), tell_engine=False)

    def _cut_off(self, replica: Replica, choice: Choice) -> None:
        replica.send_later(wire.pack_abort(choice.engine_id))
        self._requests.cut_off(choice.engine_id)


def lost(request: InFlight, reason: str) -> RequestError:
    """ABORTED once tokens were seen, UNAVAILABLE before: both may be tried again."""
    num_tokens = request.num_completion_tokens
    if num_tokens:
        return RequestError(Code.ABORTED, f"{reason}; {num_tokens} tokens had been generated")
    return RequestError(Code.UNAVAILABLE, reason)
