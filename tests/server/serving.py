"""A whole front end in this process: gateway and gRPC server in a thread, stub leaders beside it."""

import asyncio
import threading
from contextlib import contextmanager

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cluster.config import ServeConfig
from cluster.server.chat.template import ChatTemplate
from cluster.server.client import Client
from cluster.server.gateway import Gateway
from cluster.server.http.server import HttpServer
from cluster.server.observe.observability import Observability
from cluster.server.request import ModelInfo
from cluster.server.rpc.service import GrpcServer
from cluster.server.security import Credentials
from tests.server.stub_leader import StubLeader

VOCAB_SIZE = 320
MAX_MODEL_LEN = 128
EOS = 3
PATIENCE_S = 20.0


def byte_level_tokenizer():
    """A BPE of 320 tokens: 256 bytes and a few merges, so that characters span tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog ran after the cat"], trainer)
    return tokenizer


class Serving:
    """What a test sees: `client`, `leaders`, `gateway`, `metrics`, and `call` to run in its event loop."""

    def __init__(
        self,
        overrides,
        num_replicas,
        step_s,
        eos_token_ids,
        tokenizer,
        make_rebalancer=None,
        check_constraint=None,
        observer=None,
    ):
        self.config = ServeConfig.from_dict(
            {
                "model": "/models/tiny",
                "parallel": {"num_nodes": num_replicas},
                "server": {"port": 0, "replica_timeout_s": PATIENCE_S},
            },
            overrides,
        )
        self.tokenizer = tokenizer
        self.rebalancer = None
        self._make_rebalancer = make_rebalancer
        self._check_constraint = check_constraint
        self._observer = observer
        self._credentials = Credentials.load(self.config.server)
        self._template = ChatTemplate.load(self.config.model, self.config.chat)
        self.leaders = [
            StubLeader(idx, VOCAB_SIZE, eos_token_ids, step_s) for idx in range(num_replicas)
        ]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="serving", daemon=True)
        self._thread.start()

    async def _start(self):
        model = ModelInfo(
            name="tiny",
            vocab_size=VOCAB_SIZE,
            max_model_len=MAX_MODEL_LEN,
            eos_token_ids=(EOS,),
            architecture="StubForCausalLM",
            dtype="float32",
        )
        self.observability = Observability(self.config, model)
        self.metrics = self.observability.metrics
        self.gateway = Gateway(
            self.config,
            self.tokenizer,
            model,
            observer=self._observer or self.observability.observer,
            chat=self._template,
            check_constraint=self._check_constraint,
        )
        address = await self.gateway.start()
        for idx, leader in enumerate(self.leaders):
            self.gateway.attach(idx, leader.address)
            leader.connect(address)
        if self._make_rebalancer:
            self.rebalancer = self._make_rebalancer(self.config.eplb_config, self.gateway)
            self.rebalancer.start()
        self.observability.watch(self.gateway, self.rebalancer)
        self.server = GrpcServer(self.gateway, self.config, self.rebalancer)
        self.http = None
        if self.config.server.http_port is not None:
            self.http = HttpServer(self.gateway, self.config, self._credentials, self.metrics)
            self.url = f"http://127.0.0.1:{await self.http.start()}"
        return await self.server.start()

    def start(self, ready):
        port = self.call(self._start())
        self.address = f"127.0.0.1:{port}"
        self.client = Client(self.address, timeout_s=PATIENCE_S, max_retries=0)
        if ready:
            self.do(self.gateway.set_ready, True)

    def call(self, coroutine):
        """Run a coroutine in the server's event loop and return its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE_S)

    def do(self, function, *args):
        """The same for a plain function."""

        async def run():
            return function(*args)

        return self.call(run())

    def num_in_flight(self):
        return self.do(lambda: self.gateway.num_in_flight)

    def close(self):
        self.client.close()
        self.call(self.server.stop(0.2))
        if self.http:
            self.call(self.http.stop(0.2))
        if self.rebalancer:
            self.call(self.rebalancer.stop())
        self.call(self.gateway.stop())
        self.call(self.observability.close())
        for leader in self.leaders:
            leader.close()
        if self._template:
            self._template.close()
        self.call(self._loop.shutdown_asyncgens())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE_S)
        self._loop.close()


@contextmanager
def serve(
    *overrides,
    num_replicas=1,
    step_s=0.0,
    eos=(),
    ready=True,
    with_tokenizer=True,
    make_rebalancer=None,
    check_constraint=None,
    observer=None,
):
    """`make_rebalancer(eplb_config, gateway)`, where given, answers for the experts.

    With the override chat.template=plain it takes chats, with server.http_port=0 it has a `url`; only
    this asks for tokens. `observer` takes the place of all that observe otherwise.
    """
    tokenizer = byte_level_tokenizer() if with_tokenizer else None
    serving = Serving(
        overrides,
        num_replicas,
        step_s,
        eos,
        tokenizer,
        make_rebalancer,
        check_constraint,
        observer,
    )
    serving.start(ready)
    try:
        yield serving
    finally:
        serving.close()
