"""What the leaders say of requests, and what it means when one says nothing."""

import asyncio
import logging
import time

from cluster.config import ServerConfig
from cluster.engine.sequence import TokenEvent
from cluster.server.choice import Choice
from cluster.server.endings import Endings, lost
from cluster.server.errors import Code, RequestError
from cluster.server.in_flight import InFlight
from cluster.server.leaders import LeaderLinks
from cluster.server.observe.observer import Observer
from cluster.server.request_table import RequestTable

logger = logging.getLogger(__name__)


class LeaderEvents:
    """Run `receive` and `watch_silence` side by side, in the gateway's event loop, until cancelled."""

    def __init__(
        self,
        links: LeaderLinks,
        requests: RequestTable,
        endings: Endings,
        observer: Observer,
        config: ServerConfig,
    ) -> None:
        self._links = links
        self._requests = requests
        self._endings = endings
        self._observer = observer
        self._config = config

    async def receive(self) -> None:
        """Give every token to its request, and end requests where the engine ended or they must."""
        async for frame in self._links.frames():
            replica = self._links.replicas[frame.replica]
            replica.suspect = False
            self._observer.heard(replica, frame)
            now = time.monotonic()
            for event in frame.events:
                self._take_in(frame.replica, event, now)

    async def watch_silence(self) -> None:
        """Fails requests that nobody answers any more, and retries aborts that found no room."""
        limit_s = self._config.replica_timeout_s
        while True:
            await asyncio.sleep(min(0.5, limit_s / 4))
            now = time.monotonic()
            for _, replica in sorted(self._links.replicas.items()):
                replica.flush()
                if now - replica.last_heard > limit_s and not replica.suspect:
                    replica.suspect = True
                    logger.warning("%s has sent nothing for %g s", replica, limit_s)
            for request in self._requests.all():
                replica = self._links.replicas[request.info.replica]
                # A busy replica may keep a request waiting; one that says it is idle has lost it.
                idle = replica.stats.running + replica.stats.waiting == 0
                heard = request.last_heard
                if not idle:
                    heard = max(heard, replica.last_heard)
                if now - heard > limit_s:
                    reason = f"{replica} has sent nothing for this request for {limit_s:g} s"
                    self._endings.end(request, error=lost(request, reason))

    def _take_in(self, replica: int, event: TokenEvent, now: float) -> None:
        request, choice = self._requests.choice(event.request_id) or (None, None)
        if request is None or choice is None or choice.finish or request.info.replica != replica:
            return  # ended here before the engine learned of it
        if event.error is not None:
            self._fail(request, event, event.error)
            return
        try:
            finish = request.accept(choice, event)
        except Exception as error:
            logger.exception(
                "cannot take in an event of its engine", extra={"request_id": event.request_id}
            )
            bad = RequestError(Code.INTERNAL, f"bad engine output: {error}")
            self._endings.end(request, error=bad)
            return
        self._note_progress(request, choice, event, now)
        limit = self._config.max_buffered_tokens
        if finish:
            goes_on = event.finish_reason is None
            self._endings.finish(request, choice, finish, tell_engine=goes_on)
        elif request.num_unread > limit:
            message = f"the client left more than max_buffered_tokens = {limit} tokens unread"
            self._endings.end(request, error=RequestError(Code.RESOURCE_EXHAUSTED, message))

    def _fail(self, request: InFlight, event: TokenEvent, reason: str) -> None:
        """The engine refused the request, or failed at it."""
        failed = RequestError(Code.INTERNAL, f"the engine failed this request: {reason}")
        if event.finish_reason == "refused":
            failed = RequestError(Code.INVALID_ARGUMENT, reason)
        # What goes on there, itself or its other choices, must be told to end.
        goes_on = event.finish_reason is None or request.num_choices > 1
        self._endings.end(request, error=failed, tell_engine=goes_on)

    def _note_progress(
        self, request: InFlight, choice: Choice, event: TokenEvent, now: float
    ) -> None:
        request.last_heard = now
        if event.token_id is not None:
            self._observer.progressed(request, 1, request.clock(choice, now))
