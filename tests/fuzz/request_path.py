"""The whole path of a request in one process, without sockets: any bytes go in.

    bytes -> protobuf -> gateway -> frame -> mailbox -> leader (scheduler, sampler) -> frame -> chunks

`run` raises AssertionError when bytes do harm: an error of our own, a hang, a sequence or block that stays,
or other tokens for the request beside.
"""

import asyncio
import logging
import tempfile
import time
from contextlib import aclosing, suppress
from pathlib import Path
from types import SimpleNamespace

import msgpack
from google.protobuf.message import DecodeError

from cluster.config import ServeConfig
from cluster.engine.arrivals import Arrivals
from cluster.engine.engine import Leader
from cluster.engine.mailbox import unpack
from cluster.engine.sampler import Sampler
from cluster.engine.scheduler import Scheduler, SchedulerConfig
from cluster.server import wire
from cluster.server.constraint_check import ConstraintCheck
from cluster.server.errors import Code, RequestError
from cluster.server.gateway import Gateway
from cluster.server.leaders import Replica
from cluster.server.proto.expertmesh.v1 import inference_pb2 as pb
from cluster.server.request import GenerationRequest, ModelInfo
from cluster.server.rpc.inference_messages import Answer, chunk_message, read_request
from comms.solo import SoloGroup
from comms.topology import Topology
from tests.fuzz.hash_runner import HashRunner
from tests.server.serving import EOS, VOCAB_SIZE, byte_level_tokenizer

NUM_BLOCKS = 24
MAX_MODEL_LEN = 64
PATIENCE_S = 60.0
REQUEST, FRAME_TO_LEADER, FRAME_TO_GATEWAY = range(3)
"""What the bytes are, by the first of them; the second says when the reader leaves."""
_READS_ALL = 200
_UNDEFINED = ("no finite logits", "logprob is not a number")
"""What becomes of a request whose logits are not finite."""
_OPTIONS = (
    "scheduler.max_num_seqs=4",
    "scheduler.max_num_batched_tokens=24",
    "scheduler.async_scheduling=false",
    "cache.block_size=4",
    "server.default_max_tokens=12",
    "server.max_choices=3",
    "server.max_logprobs=4",
)
_BESIDE = GenerationRequest(
    prompt=[5, 6, 7],
    request_id="beside",
    sampling={"seed": 3, "max_tokens": 8, "ignore_eos": True},
)


class _Mailbox:
    """Both directions; frames are bytes as on the wire."""

    def __init__(self) -> None:
        self.inbox: list[bytes] = []
        self.sent: asyncio.Queue[bytes] = asyncio.Queue()

    def receive(self, timeout_s: float) -> list[dict]:
        frames, self.inbox = [unpack(data) for data in self.inbox], []
        return [frame for frame in frames if frame is not None]

    def send(self, frame: dict) -> None:
        self.sent.put_nowait(msgpack.packb(frame))


class _Links:
    """In place of `LeaderLinks`."""

    def __init__(self, mailbox: _Mailbox) -> None:
        socket = SimpleNamespace(send=lambda frame, flags: mailbox.inbox.append(frame))
        self.replicas = {0: Replica(0, "here", socket, last_heard=time.monotonic())}
        self._mailbox = mailbox

    async def frames(self):
        while True:
            data = await self._mailbox.sent.get()
            try:
                frame = wire.parse_step(data)
                replica = self.replicas[frame.replica]
            except (wire.WireError, KeyError):
                continue
            replica.stats = frame.stats
            yield frame


class RequestPath:
    """Make it once; `run` any number of inputs, one after the other."""

    def __init__(self) -> None:
        logging.disable(logging.CRITICAL)  # malformed frames are logged, thousands of them here
        self._loop = asyncio.new_event_loop()
        self._directory = tempfile.TemporaryDirectory()
        tokenizer = byte_level_tokenizer()
        tokenizer.save(str(Path(self._directory.name) / "tokenizer.json"))
        self._config = ServeConfig.from_dict({"model": "m"}, _OPTIONS)
        model = ModelInfo(
            name="m", vocab_size=VOCAB_SIZE, max_model_len=MAX_MODEL_LEN, eos_token_ids=(EOS,)
        )
        self._mailbox = _Mailbox()
        self._constraints = ConstraintCheck(self._directory.name, VOCAB_SIZE, (EOS,))
        self._gateway = Gateway(
            self._config, tokenizer, model, check_constraint=self._constraints.check
        )
        self._gateway._links = _Links(self._mailbox)
        self._gateway.set_ready(True)
        self._leader = self._make_leader()
        self._receiving = self._loop.create_task(
            self._gateway._receive(self._gateway._leader_events())
        )
        self._expected = self._loop.run_until_complete(self._alone())

    def close(self) -> None:
        self._receiving.cancel()
        self._loop.run_until_complete(asyncio.gather(self._receiving, return_exceptions=True))
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()
        self._constraints.close()
        self._directory.cleanup()
        logging.disable(logging.NOTSET)

    def run(self, data: bytes) -> None:
        self._loop.run_until_complete(self._run(data))

    def _make_leader(self) -> Leader:
        scheduling, cache = self._config.scheduler, self._config.cache
        scheduler = Scheduler(
            SchedulerConfig(
                max_num_seqs=scheduling.max_num_seqs,
                max_num_batched_tokens=scheduling.max_num_batched_tokens,
                block_size=cache.block_size,
                num_blocks=NUM_BLOCKS,
                max_model_len=MAX_MODEL_LEN,
                eos_token_ids=(EOS,),
                vocab_size=VOCAB_SIZE,
            )
        )
        groups = SimpleNamespace(
            topology=Topology(num_nodes=1, ranks_per_node=1),
            rank=0,
            tp=SoloGroup(name="tp", rank=0),
            leaders=SoloGroup(name="leaders", rank=0),
        )
        sampler = Sampler(VOCAB_SIZE, (EOS,), Path(self._directory.name))
        runner = HashRunner(self._config, NUM_BLOCKS, VOCAB_SIZE)
        return Leader(groups, runner, scheduler, sampler, self._mailbox)

    async def _run(self, data: bytes) -> None:
        (kind, leaves_after), message = (*data[:2], 0, 0)[:2], data[2:]
        beside = asyncio.ensure_future(self._answer(_BESIDE))
        match kind % 3:
            case 0:
                await self._request(message, leaves_after)
            case 1:
                self._mailbox.inbox.append(message)
            case _:
                self._mailbox.sent.put_nowait(message)
        names_it = b"beside" in message  # who knows its id on these links may end it
        try:
            tokens = await self._until_done(beside)
            assert tokens == self._expected or names_it, f"{tokens}, not {self._expected}"
        except RequestError:
            assert names_it, "the request beside failed"
        await self._calm()

    async def _request(self, message: bytes, leaves_after: int) -> None:
        with suppress(DecodeError):
            request = pb.GenerateRequest.FromString(message)
            reading = asyncio.ensure_future(self._read(request, leaves_after))
            try:
                await self._until_done(reading)
            except RequestError as refused:
                _check_code(refused)

    async def _read(self, request: pb.GenerateRequest, leaves_after: int) -> None:
        """As both calls of the service do, until the reader leaves."""
        answer = Answer()
        asked = read_request(request, None, None)
        async with aclosing(self._gateway.generate(asked)) as chunks:
            async for chunk in chunks:
                answer.add(chunk)
                chunk_message(chunk).SerializeToString()
                leaves_after -= leaves_after < _READS_ALL
                if leaves_after == 0:
                    return
        answer.message().SerializeToString()

    async def _answer(self, request: GenerationRequest) -> list[int]:
        async with aclosing(self._gateway.generate(request)) as chunks:
            return [token_id async for chunk in chunks for token_id in chunk.token_ids]

    async def _alone(self) -> list[int]:
        return await self._until_done(asyncio.ensure_future(self._answer(_BESIDE)))

    async def _until_done(self, task: asyncio.Future) -> object:
        """The leader steps whenever the gateway has had its turn."""
        deadline = time.monotonic() + PATIENCE_S
        while not task.done():
            await asyncio.sleep(0)
            self._step()
            assert not self._receiving.done(), "the gateway's receive loop ended"
            assert time.monotonic() < deadline, "a hang"
            if self._leader._arrivals.preparing or not self._leader.scheduler.has_work:
                await asyncio.sleep(1e-4)  # threads tokenize, or compile a constraint
        return task.result()

    async def _calm(self) -> None:
        """Everything comes to its end, and nothing stays."""
        for _ in range(1000):
            self._step()
            await asyncio.sleep(0)
            busy = self._leader.scheduler.has_work or self._leader._arrivals.preparing
            if not busy and not self._mailbox.inbox and self._mailbox.sent.empty():
                break
            if self._leader._arrivals.preparing:
                await asyncio.sleep(1e-3)
        stats = self._leader.scheduler.stats()
        held = {name: stats[name] for name in ("running", "waiting", "kv_blocks_used")}
        assert not any(held.values()), held
        assert self._gateway.num_in_flight == 0
        assert self._gateway._failure is None
        assert self._gateway.replicas[0].in_flight == 0

    def _step(self) -> None:
        self._leader.step()
        self._leader._stop_requested = False  # frames may say so: that is for a gateway to decide
        arrivals: Arrivals = self._leader._arrivals
        assert len(arrivals._not_started) <= 8, "requests that are gone are remembered"


def _check_code(refused: RequestError) -> None:
    """Requests end for reasons of their own."""
    deserved = any(text in refused.message for text in _UNDEFINED)
    assert refused.code != Code.INTERNAL or deserved, refused
    assert refused.code not in (Code.UNKNOWN, Code.UNAVAILABLE), refused
