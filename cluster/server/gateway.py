"""Owns every request from admission to its last token, whatever front end it came through.

    validate -> reserve a place -> tokenize -> least loaded replica -> events in, chunks out

A replica is a cache: prompt, parameters, seed and tokens so far live here. A request ends in
exactly one place, `_end`, for exactly one reason: it finished, its reader left, its deadline or
its replica's silence ran out, or the cluster failed. Use everything from one event loop.
"""

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator
from dataclasses import replace

from tokenizers import Tokenizer

from cluster.config import ServeConfig
from cluster.engine.sampling_params import SamplingParams
from cluster.server import wire
from cluster.server.errors import Code, RequestError
from cluster.server.in_flight import InFlight
from cluster.server.leaders import LeaderLinks, Replica
from cluster.server.least_loaded import least_loaded
from cluster.server.readiness import Readiness
from cluster.server.request import (
    Chat,
    Chunk,
    Finish,
    FinishReason,
    GenerationRequest,
    ModelInfo,
    PromptInfo,
)
from cluster.server.request_table import RequestTable
from cluster.server.validation import (
    check_model,
    check_prompt_length,
    check_request,
    fit_max_tokens,
)

logger = logging.getLogger(__name__)


class Gateway:
    """`start`, `attach` every replica, `set_ready(True)`; then `generate` until `stop`.

    `tokenizer` None: only token ids go in and out. `bind_host` is the one address of this host
    that leaders can reach; `start` returns the address that they connect to.
    """

    def __init__(
        self,
        config: ServeConfig,
        tokenizer: Tokenizer | None,
        model_info: ModelInfo,
        bind_host: str = "127.0.0.1",
    ) -> None:
        self.config = config
        self.model = model_info
        self.tokenizer = tokenizer
        self.readiness = Readiness()
        self.draining = False
        self._bind_host = bind_host
        self._seeds = random.Random(config.seed)
        self._links: LeaderLinks | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._requests = RequestTable(
            config.scheduler.max_num_queued_reqs, config.server.retry_after_s
        )
        self._failure: str | None = None

    # Life ---------------------------------------------------------------------------------------

    async def start(self) -> str:
        """Open the inbox for leaders and return the address where they connect."""
        self._links = LeaderLinks(self._bind_host)
        self._tasks = [
            asyncio.create_task(self._receive(), name="gateway-receive"),
            asyncio.create_task(self._watch_silence(), name="gateway-watch"),
        ]
        return self._links.address

    @property
    def replicas(self) -> list[Replica]:
        """All attached replicas, in order."""
        return [replica for _, replica in sorted(self._opened.replicas.items())]

    @property
    def num_in_flight(self) -> int:
        return len(self._requests)

    def attach(self, replica: int, leader_address: str) -> None:
        """Connect to the leader of a replica; what an earlier leader of it was doing has failed."""
        self._end_all_of(replica, f"replica {replica} was replaced")
        self._opened.attach(replica, leader_address)

    def set_ready(self, ready: bool) -> None:
        """Whether requests are admitted and health says SERVING."""
        self.readiness.set(ready and not self.draining and self._failure is None)

    def fail(self, reason: str) -> None:
        """The cluster is lost: end every request saying so, and admit no more."""
        logger.error("the cluster failed: %s", reason)
        self._close(f"the cluster failed: {reason}")

    async def drain(self, timeout_s: float | None = None) -> int:
        """Admit no more, wait for those in flight; returns how many had to be cut off."""
        self.draining = True
        self.readiness.set(False)
        limit_s = self.config.server.drain_timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + limit_s
        while self.num_in_flight and time.monotonic() < deadline:
            await asyncio.sleep(min(0.02, limit_s))
        cut_off = self._requests.all()
        for request in cut_off:
            message = f"the server is shutting down and waited {limit_s:g} s for this request"
            self._end(request, error=RequestError(Code.UNAVAILABLE, message))
        return len(cut_off)

    async def stop(self) -> None:
        """End what is left, tell the leaders to stop, and close the sockets."""
        self._close("the server was stopped")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._links:
            links, self._links = self._links, None
            await links.close()

    # Placement of experts -----------------------------------------------------------------------

    def commit_placement(self, epoch: int) -> None:
        """Tell every leader that all ranks have prepared the placement of `epoch`."""
        for replica in self.replicas:
            replica.try_send(wire.pack_placement(epoch))

    def placement_epochs(self) -> list[int]:
        """The epoch of the placement in force at each replica, as last reported."""
        return [replica.stats.epoch for replica in self.replicas]

    # Requests -----------------------------------------------------------------------------------

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        """Chunks of the completion: first the prompt's facts, last the finish and usage.

        Raises RequestError. Closing the iterator early aborts the sequence in the engine, so
        readers that may stop early wrap it in `contextlib.aclosing`.
        """
        admitted = await self._admit(request)
        try:
            yield Chunk(prompt=admitted.info)
            while True:
                chunk = await admitted.next_chunk()
                yield chunk
                if chunk.finish:
                    return
        finally:
            self._end(admitted, finish=Finish(reason=FinishReason.ABORT))

    def abort(self, request_id: str) -> bool:
        """End one request with reason ABORT; False if no such request is in flight."""
        request = self._requests.get(request_id)
        if request:
            self._end(request, finish=Finish(reason=FinishReason.ABORT))
        return request is not None

    async def tokenize(
        self, text: str, model: str | None = None, add_special_tokens: bool = True
    ) -> list[int]:
        """Token ids of a text; raises RequestError."""
        check_model(model, self.model)
        if self.tokenizer is None:
            raise RequestError(
                Code.FAILED_PRECONDITION,
                f"model {self.model.name!r} has no tokenizer: send token_ids instead of text",
            )
        # In a thread: a long text must not stop everybody else's stream.
        encoding = await asyncio.to_thread(
            self.tokenizer.encode, text, add_special_tokens=add_special_tokens
        )
        return list(encoding.ids)

    async def _admit(self, request: GenerationRequest) -> InFlight:
        arrived = time.monotonic()
        limits = self.config.server
        num_replicas = self.config.parallel.num_replicas
        params = check_request(request, self.model, limits, num_replicas)
        self._check_open()
        request_id = self._requests.reserve(request.request_id)
        try:
            if isinstance(request.prompt, str):
                prompt_ids = await self.tokenize(request.prompt)
                check_prompt_length(len(prompt_ids), self.model)
            else:
                assert not isinstance(request.prompt, Chat), "refused by check_request"
                prompt_ids = list(request.prompt or ())
            if "seed" not in request.sampling:
                params = replace(params, seed=self._seeds.getrandbits(63))
            params = fit_max_tokens(
                params, request, len(prompt_ids), self.model, limits.default_max_tokens
            )
            self._check_open()  # the world may have ended while the prompt was tokenized
            return self._send(request, request_id, prompt_ids, params, arrived)
        finally:
            self._requests.release(request_id)

    def _check_open(self) -> None:
        if self._failure is not None:
            raise RequestError(Code.UNAVAILABLE, self._failure)
        if self.draining:
            raise RequestError(Code.UNAVAILABLE, "the server is draining and takes no new requests")
        if not self.readiness.ready or not self.replicas:
            raise RequestError(Code.UNAVAILABLE, "the server is starting and not ready yet")

    def _send(
        self,
        request: GenerationRequest,
        request_id: str,
        prompt_ids: list[int],
        params: SamplingParams,
        arrived: float,
    ) -> InFlight:
        replica = self._choose(request.replica)
        info = PromptInfo(
            request_id=request_id,
            num_tokens=len(prompt_ids),
            seed=params.seed,
            replica=replica.idx,
            max_tokens=params.max_tokens,
        )
        admitted = InFlight(info, prompt_ids, params, self.tokenizer, arrived)
        if not replica.try_send(wire.pack_add(request_id, prompt_ids, params.to_dict())):
            raise RequestError(
                Code.UNAVAILABLE, f"{replica} does not read its requests", retry_after_s=1.0
            )
        self._requests.add(admitted)
        replica.in_flight += 1
        if request.deadline_s is not None:
            late = RequestError(
                Code.DEADLINE_EXCEEDED, f"not finished within {request.deadline_s:.3f} s"
            )
            left_s = arrived + request.deadline_s - time.monotonic()
            admitted.deadline = asyncio.get_running_loop().call_later(
                max(0.0, left_s), lambda: self._end(admitted, error=late)
            )
        for other in self.replicas:
            if other is not replica:
                other.try_send(wire.pack_signal("wake"))
        return admitted

    def _choose(self, wanted: int | None) -> Replica:
        """The one that the request names, else the least loaded."""
        if wanted is not None:
            if wanted not in self._opened.replicas:
                raise RequestError(Code.UNAVAILABLE, f"replica {wanted} is not attached")
            return self._opened.replicas[wanted]
        return least_loaded(self.replicas)

    def _end(
        self,
        request: InFlight,
        *,
        finish: Finish | None = None,
        error: RequestError | None = None,
        tell_engine: bool = True,
    ) -> None:
        """The one end of a request; later calls for it do nothing."""
        if not self._requests.remove(request):
            return
        if request.deadline:
            request.deadline.cancel()
        replica = self._opened.replicas[request.info.replica]
        replica.in_flight -= 1
        if tell_engine:
            replica.send_later(wire.pack_abort(request.info.request_id))
        request.end(finish, error)

    def _close(self, reason: str) -> None:
        self._failure = self._failure or reason
        self.readiness.set(False)
        for request in self._requests.all():
            self._end(request, error=_lost(request, reason), tell_engine=False)

    def _end_all_of(self, replica: int, reason: str) -> None:
        for request in self._requests.all():
            if request.info.replica == replica:
                self._end(request, error=_lost(request, reason), tell_engine=False)

    # Events of the leaders ----------------------------------------------------------------------

    async def _receive(self) -> None:
        try:
            async for frame in self._opened.frames():
                self._opened.replicas[frame.replica].suspect = False
                for event in frame.events:
                    self._on_event(frame.replica, event)
        except Exception as error:
            logger.exception("the gateway's receive loop ended")
            self.fail(f"the gateway cannot receive from the replicas: {error!r}")

    def _on_event(self, replica: int, event: wire.Event) -> None:
        request = self._requests.get(event.request_id)
        if request is None or request.info.replica != replica:
            return  # ended here before the engine learned of it
        if event.error is not None:
            failed = RequestError(Code.INTERNAL, f"the engine failed this request: {event.error}")
            self._end(request, error=failed, tell_engine=False)
            return
        try:
            finish = request.accept(event)
        except Exception as error:
            logger.exception("request %s: cannot take in %s", event.request_id, event)
            self._end(request, error=RequestError(Code.INTERNAL, f"bad engine output: {error}"))
            return
        limit = self.config.server.max_buffered_tokens
        if finish:
            self._end(request, finish=finish, tell_engine=event.finish_reason is None)
        elif request.num_unread > limit:
            message = f"the client left more than max_buffered_tokens = {limit} tokens unread"
            self._end(request, error=RequestError(Code.RESOURCE_EXHAUSTED, message))

    async def _watch_silence(self) -> None:
        """Fails requests that nobody answers any more, and retries aborts that found no room."""
        limit_s = self.config.server.replica_timeout_s
        while True:
            await asyncio.sleep(min(0.5, limit_s / 4))
            now = time.monotonic()
            for replica in self.replicas:
                replica.flush()
                if now - replica.last_heard > limit_s and not replica.suspect:
                    replica.suspect = True
                    logger.warning("%s has sent nothing for %g s", replica, limit_s)
            for request in self._requests.all():
                replica = self._opened.replicas[request.info.replica]
                # A busy replica may keep a request waiting; one that says it is idle has lost it.
                idle = replica.stats.running + replica.stats.waiting == 0
                heard = request.last_heard
                if not idle:
                    heard = max(heard, replica.last_heard)
                if now - heard > limit_s:
                    reason = f"{replica} has sent nothing for this request for {limit_s:g} s"
                    self._end(request, error=_lost(request, reason))

    @property
    def _opened(self) -> LeaderLinks:
        if self._links is None:
            raise RuntimeError("the gateway is not started: call `await gateway.start()` first")
        return self._links


def _lost(request: InFlight, reason: str) -> RequestError:
    """ABORTED once tokens were seen, UNAVAILABLE before: both may be tried again."""
    if request.token_ids:
        return RequestError(
            Code.ABORTED, f"{reason}; {len(request.token_ids)} tokens had been generated"
        )
    return RequestError(Code.UNAVAILABLE, reason)
