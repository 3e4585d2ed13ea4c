"""Owns every request from admission to its last token, whatever front end it came through.

    validate -> reserve a place -> tokenize -> choose a replica -> events in, chunks out

A replica is a cache: prompt, parameters, seed and tokens so far live here. A request ends in
exactly one place, `Endings.end`, for exactly one reason: it finished, its reader left, its deadline
or its replica's silence ran out, or the cluster failed. Use everything from one event loop.
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator
from dataclasses import replace

from tokenizers import Tokenizer

from cluster.config import ServeConfig
from cluster.engine.link_keys import LinkKeys
from cluster.engine.sampling_params import SamplingParams
from cluster.server import wire
from cluster.server.admission import Admission
from cluster.server.chat.template import ChatTemplate
from cluster.server.choice import Choice
from cluster.server.endings import Endings
from cluster.server.errors import Code, RequestError
from cluster.server.in_flight import InFlight
from cluster.server.intake import CheckConstraint, Draft, Intake
from cluster.server.leader_events import LeaderEvents
from cluster.server.leaders import LeaderLinks, Replica
from cluster.server.observe.observer import NO_OBSERVER, Observer
from cluster.server.pace import Pace
from cluster.server.prompt import Prompt
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
from cluster.server.validation import check_model, check_prompt_text

logger = logging.getLogger(__name__)


class Gateway:
    """`start`, `attach` every replica, `set_ready(True)`; then `generate` until `stop`.

    `tokenizer` None: only token ids go in and out. `bind_host` is the one address of this host
    that leaders can reach; `start` returns the address that they connect to. `observer` is told of
    requests and frames, `chat` makes prompts of messages, `check_constraint` tries what completions
    are to look like, and `keys` keep strangers from posing as leaders.
    """

    def __init__(
        self,
        config: ServeConfig,
        tokenizer: Tokenizer | None,
        model_info: ModelInfo,
        bind_host: str = "127.0.0.1",
        observer: Observer = NO_OBSERVER,
        chat: ChatTemplate | None = None,
        check_constraint: CheckConstraint | None = None,
        keys: LinkKeys | None = None,
    ) -> None:
        self.config = config
        self.model = model_info
        self.tokenizer = tokenizer
        self.readiness = Readiness()
        self.draining = False
        self._bind_host = bind_host
        self._keys = keys
        self._observer = observer
        self._intake = Intake(config, model_info, tokenizer, chat, check_constraint)
        self._admission = Admission(
            config.cache.block_size if config.cache.enable_prefix_caching else None
        )
        self._links: LeaderLinks | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._requests = RequestTable(
            config.scheduler.max_num_queued_reqs, config.scheduler.max_num_queued_tokens
        )
        self._pace = Pace(config.server.retry_after_s)
        self._endings = Endings(
            self._requests, lambda idx: self._opened.replicas[idx], self._pace, observer
        )
        self._failure: str | None = None

    # Life ---------------------------------------------------------------------------------------

    async def start(self) -> str:
        """Open the inbox for leaders and return the address where they connect."""
        self._links = LeaderLinks(self._bind_host, self._keys)
        events = self._leader_events()
        self._tasks = [
            asyncio.create_task(self._receive(events), name="gateway-receive"),
            asyncio.create_task(events.watch_silence(), name="gateway-watch"),
        ]
        return self._links.address

    @property
    def replicas(self) -> list[Replica]:
        """All attached replicas, in order."""
        return [replica for _, replica in sorted(self._opened.replicas.items())]

    @property
    def num_in_flight(self) -> int:
        return len(self._requests)

    @property
    def presets(self) -> list[str]:
        """Names of the tasks that chats may name."""
        return self._intake.prompts.presets

    def attach(self, replica: int, leader_address: str) -> None:
        """Connect to the leader of a replica; what an earlier leader of it was doing has failed."""
        self._endings.lose_all(f"replica {replica} was replaced", replica)
        self._admission.forget(replica)
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
            self._endings.end(request, error=RequestError(Code.UNAVAILABLE, message))
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
        """Chunks of the completion: first the prompt's facts, last the usage.

        Raises RequestError. Closing the iterator early aborts the sequences in the engine, so
        readers that may stop early wrap it in `contextlib.aclosing`.
        """
        try:
            admitted = await self._admit(request)
        except RequestError as error:
            if error.code is Code.RESOURCE_EXHAUSTED and error.retry_after_s is None:
                error.retry_after_s = self._pace.retry_after(time.monotonic())
            self._observer.refused(error.code)
            raise
        try:
            yield Chunk(prompt=admitted.info)
            while True:
                chunk = await admitted.next_chunk()
                yield chunk
                if chunk.usage:
                    return
        finally:
            self._endings.end(admitted, finish=Finish(reason=FinishReason.ABORT))

    def abort(self, request_id: str) -> bool:
        """End one request with reason ABORT; False if no such request is in flight."""
        request = self._requests.get(request_id)
        if request:
            self._endings.end(request, finish=Finish(reason=FinishReason.ABORT))
        return request is not None

    async def tokenize(
        self, prompt: str | Chat, model: str | None = None, add_special_tokens: bool = True
    ) -> list[int]:
        """Token ids of a text, or of what the template makes of messages; raises RequestError."""
        check_model(model, self.model)
        if isinstance(prompt, Chat):
            return (await self._intake.prompts.read(prompt)).token_ids
        if prompt:
            check_prompt_text("text", prompt)
        return await self._intake.prompts.tokenize(prompt, add_special_tokens)

    def flush_cache(self) -> int:
        """Tell the replicas to forget cached prompts that no request uses; returns how many."""
        self._admission.forget()
        frame = wire.pack_signal("flush_cache")
        return sum(replica.try_send(frame) for replica in self.replicas)

    async def _admit(self, request: GenerationRequest) -> InFlight:
        arrived = time.monotonic()
        # What refuses many is asked first: an overloaded server must not spend time on refusals.
        self._check_open()
        self._requests.check_room()
        draft = self._intake.check(request)
        request_id = self._requests.reserve(request.request_id, request.n)
        try:
            prompt, params = await self._read(request, draft)
            self._requests.charge(request_id, len(prompt.token_ids))
            self._check_open()  # the world may have ended meanwhile
            return self._send(request, request_id, prompt, params, arrived)
        finally:
            self._requests.release(request_id)

    async def _read(
        self, request: GenerationRequest, draft: Draft
    ) -> tuple[Prompt, SamplingParams]:
        try:
            async with asyncio.timeout(request.deadline_s):
                return await self._intake.read(request, draft)
        except TimeoutError:
            raise _late(request) from None

    def _check_open(self) -> None:
        if self._failure is not None:
            raise RequestError(Code.UNAVAILABLE, self._failure)
        if self.draining:
            raise RequestError(Code.UNAVAILABLE, "the server is draining and takes no new requests")
        if not self.readiness.ready or not self._opened.replicas:
            raise RequestError(Code.UNAVAILABLE, "the server is starting and not ready yet")

    def _send(
        self,
        request: GenerationRequest,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        arrived: float,
    ) -> InFlight:
        """Hand every choice to one replica; from here on the request is in flight."""
        left_s = math.inf
        if request.deadline_s is not None:
            left_s = arrived + request.deadline_s - time.monotonic()
            if left_s <= 0:
                raise _late(request)
        replica = self._choose(request, prompt, params)
        info = PromptInfo(
            request_id=request_id,
            num_tokens=len(prompt.token_ids),
            seed=params.seed,
            replica=replica.idx,
            max_tokens=params.max_tokens,
            text=prompt.text,
        )
        choices = [
            Choice(idx, engine_id, prompt.token_ids, _params_of(params, idx), self.tokenizer)
            for idx, engine_id in enumerate(self._requests.engine_ids(request_id))
        ]
        for num_sent, choice in enumerate(choices):
            if not replica.try_send(_add_frame(request, prompt, choice)):
                for sent in choices[:num_sent]:
                    replica.send_later(wire.pack_abort(sent.engine_id))
                raise RequestError(
                    Code.UNAVAILABLE, f"{replica} does not read its requests", retry_after_s=1.0
                )
        admitted = InFlight(info, params, choices, arrived, request.traceparent)
        self._requests.add(admitted)
        replica.in_flight += len(choices)
        if left_s < math.inf:
            admitted.deadline = asyncio.get_running_loop().call_later(
                left_s, lambda: self._endings.end(admitted, error=_late(request))
            )
        for other in self.replicas:
            if other is not replica:
                other.try_send(wire.pack_signal("wake"))
        self._observer.admitted(admitted)
        return admitted

    def _choose(
        self, request: GenerationRequest, prompt: Prompt, params: SamplingParams
    ) -> Replica:
        """The one that the request names, else the one that admission does."""
        wanted, salt = request.replica, request.cache_salt
        if wanted is None:
            return self._admission.choose(
                self.replicas,
                prompt.token_ids,
                output_tokens=params.max_tokens,
                cache_salt=salt,
            )
        if wanted not in self._opened.replicas:
            raise RequestError(Code.UNAVAILABLE, f"replica {wanted} is not attached")
        self._admission.sent(wanted, prompt.token_ids, salt)
        return self._opened.replicas[wanted]

    # Ends ---------------------------------------------------------------------------------------

    async def _receive(self, events: LeaderEvents) -> None:
        try:
            await events.receive()
        except Exception as error:
            logger.exception("the gateway's receive loop ended")
            self.fail(f"the gateway cannot receive from the replicas: {error!r}")

    def _close(self, reason: str) -> None:
        self._failure = self._failure or reason
        self.readiness.set(False)
        self._endings.lose_all(reason)

    def _leader_events(self) -> LeaderEvents:
        server = self.config.server
        return LeaderEvents(self._opened, self._requests, self._endings, self._observer, server)

    @property
    def _opened(self) -> LeaderLinks:
        if self._links is None:
            raise RuntimeError("the gateway is not started: call `await gateway.start()` first")
        return self._links


def _params_of(params: SamplingParams, choice: int) -> SamplingParams:
    """Choice i draws with seed + i; the prompt's log probabilities are those of the first."""
    if choice == 0:
        return params
    return replace(params, seed=(params.seed + choice) % 2**64, prompt_logprobs=None)


def _add_frame(request: GenerationRequest, prompt: Prompt, choice: Choice) -> bytes:
    return wire.pack_add(
        choice.engine_id,
        prompt.token_ids,
        choice.params.to_dict(),
        priority=request.priority,
        cache_salt=request.cache_salt,
        routed_experts=request.return_routed_experts,
    )


def _late(request: GenerationRequest) -> RequestError:
    return RequestError(Code.DEADLINE_EXCEEDED, f"not finished within {request.deadline_s:.3f} s")
