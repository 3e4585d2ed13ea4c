"""Owns every request from admission to its last token, by the gateway's rules.

Admission is the gateway's table of requests, the replica its choice. What the gateway keeps of a
request is what another replica needs to go on with it: when a replica is lost, prompt and emitted
tokens go to another one as a longer prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from cluster.engine.sequence import TokenEvent
from cluster.server.admission import Admission
from cluster.server.errors import RequestError
from cluster.server.request import ModelInfo
from cluster.server.request_table import RequestTable
from cluster.server.validation import check_prompt_length
from simulations.serving.arrivals import Arrival
from simulations.serving.replica import Replica


class Request:
    """A request that was admitted, and its times in seconds of the simulation."""

    __slots__ = ("arrival", "emitted", "finish_s", "first_token_s", "id", "max_tokens", "replica")

    def __init__(self, request_id: str, arrival: Arrival, max_tokens: int) -> None:
        self.id = request_id
        self.arrival = arrival
        self.max_tokens = max_tokens
        self.emitted = 0
        self.first_token_s = math.nan
        self.finish_s = math.nan
        self.replica = -1


class FrontEnd:
    """`submit` and `take`; `resubmit` what a lost replica held.

    `max_model_len`: longest prompt plus completion. `max_num_queued_reqs`: waiting and running, all
    replicas together.
    """

    def __init__(
        self, replicas: Sequence[Replica], *, max_model_len: int, max_num_queued_reqs: int
    ) -> None:
        self.replicas = replicas
        self.requests: dict[str, Request] = {}
        self.finished: list[Request] = []
        self.num_submitted = self.num_rejected = self.num_failed = self.num_resubmitted = 0
        self.first_refusal = ""
        """What the first request that was rejected or failed was told."""
        self._model = ModelInfo(name="", vocab_size=1, max_model_len=max_model_len)
        self._table = RequestTable(max_num_queued_reqs)
        self._admission = Admission()  # simulated prompts have lengths, and nothing in common
        self._homeless: list[Request] = []

    @property
    def num_waiting_for_a_replica(self) -> int:
        """While all are lost."""
        return len(self._homeless)

    def submit(self, arrival: Arrival) -> None:
        """Admit a request and hand it to a replica, or refuse it."""
        self.num_submitted += 1
        try:
            check_prompt_length(arrival.prompt_tokens, self._model)
            request_id = self._table.reserve(str(self.num_submitted))
        except RequestError as error:
            self.num_rejected += 1
            self._refused(error.message)
            return
        room = self._model.max_model_len - arrival.prompt_tokens
        request = Request(request_id, arrival, min(arrival.output_tokens, room))
        self.requests[request_id] = request
        if not self._send(request):
            self._end(request)
            self.num_rejected += 1

    def take(self, replica: Replica, events: Sequence[TokenEvent], now_s: float) -> None:
        """A step's tokens of one replica."""
        for event in events:
            request = self.requests[event.request_id]
            if request.emitted == 0:
                request.first_token_s = now_s
            request.emitted += event.token_id is not None
            if event.finish_reason is not None:
                request.finish_s = now_s
                replica.in_flight -= 1
                self._end(request)
                if event.error is None:
                    self.finished.append(request)
                else:
                    self.num_failed += 1
                    self._refused(event.error)

    def resubmit(self, lost: Replica) -> int:
        """Everything that was at a lost replica goes elsewhere, in order of arrival."""
        mine = [request for request in self.requests.values() if request.replica == lost.idx]
        for request in mine:
            lost.in_flight -= 1
            request.replica = -1
            self._send_again(request)
        self.num_resubmitted += len(mine)
        return len(mine)

    def house(self) -> None:
        """A replica is back: what waited for one goes there."""
        homeless, self._homeless = self._homeless, []
        for request in homeless:
            self._send_again(request)

    def _send_again(self, request: Request) -> None:
        """One that has grown to the size of a whole cache fails here as it would have failed there."""
        if not self._send(request):
            self._end(request)
            self.num_failed += 1

    def _send(self, request: Request) -> bool:
        """To the replica of admission; False where it says that the request can never run."""
        replica = self._admission.choose(self.replicas)
        if replica.suspect:
            self._homeless.append(request)
            return True
        num_tokens = request.arrival.prompt_tokens + request.emitted
        try:
            replica.add(request.id, num_tokens, request.max_tokens - request.emitted)
        except ValueError as error:
            self._refused(str(error))
            return False
        request.replica = replica.idx
        replica.in_flight += 1
        return True

    def _refused(self, reason: str) -> None:
        self.first_refusal = self.first_refusal or reason

    def _end(self, request: Request) -> None:
        del self.requests[request.id]
        self._table.release(request.id)
