"""The shipped clients: waiting for a server, and errors that a person understands."""

import socket
import threading
import time

import pytest

from cluster.config import ConfigError, ServeConfig
from cluster.server.client import AsyncClient, Client, ClientError
from cluster.server.gateway import Gateway
from cluster.server.request import ModelInfo
from cluster.server.rpc.service import GrpcServer
from tests.server.serving import serve


def test_wait_ready_returns_when_the_server_becomes_ready():
    with serve(ready=False) as serving:
        with pytest.raises(TimeoutError, match="answers but is not ready"):
            serving.client.wait_ready(0.2)
        with pytest.raises(ClientError, match="starting and not ready") as caught:
            serving.client.generate([1])
        assert caught.value.code == "UNAVAILABLE"
        later = threading.Timer(0.2, serving.do, (serving.gateway.set_ready, True))
        later.start()
        serving.client.wait_ready(10)
        later.join()
        assert serving.client.generate([1], max_tokens=1).token_ids


def test_wait_ready_without_a_server_says_so():
    with socket.socket() as taken:  # bound but not listening: nobody else gets the port
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with Client(address, max_retries=0) as client:
            with pytest.raises(TimeoutError, match=rf"{address} was not ready .*UNAVAILABLE"):
                client.wait_ready(0.5)
            with pytest.raises(ClientError) as caught:
                client.generate("x")
            assert caught.value.code == "UNAVAILABLE"


def test_async_client_does_the_same():
    async def use(address):
        async with AsyncClient(address) as client:
            with pytest.raises(TimeoutError, match="answers but is not ready"):
                await client.wait_ready(0.1)
            serving.gateway.set_ready(True)
            await client.wait_ready(10)
            assert (await client.server_info()).ready
            assert await client.tokenize("the cat") == serving.tokenizer.encode("the cat").ids
            streamed = [
                chunk.text async for chunk in client.generate_stream("cat", seed=1, max_tokens=20)
            ]
            assert "".join(streamed) == (await client.generate("cat", seed=1, max_tokens=20)).text
            with pytest.raises(ClientError, match="temperature") as caught:
                await client.generate("cat", temperature=-1.0)
            assert caught.value.code == "INVALID_ARGUMENT"
            with pytest.raises(ClientError, match="temperature"):
                _ = [chunk async for chunk in client.generate_stream("cat", temperature=-1.0)]

    with serve(ready=False) as serving:
        serving.call(use(serving.address))


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ([-1], {}),
        ([2**32], {}),
        (["a"], {}),
        (3.5, {}),
        ("x", {"temprature": 1.0}),
        ("x", {"seed": -1}),
        ("x", {"max_tokens": 2**31}),
        ("x", {"temperature": "hot"}),
        ("x", {"stop": [3]}),
    ],
)
def test_what_no_message_can_hold_is_refused_before_sending(prompt, options):
    with Client("127.0.0.1:1") as client, pytest.raises(ClientError, match="a prompt of") as caught:
        client.generate(prompt, **options)
    assert caught.value.code == "INVALID_ARGUMENT"


def test_one_stop_string_may_be_given_bare():
    with serve() as serving:
        whole = serving.client.generate("the cat", seed=5, max_tokens=50).text
        cut = serving.client.generate("the cat", seed=5, max_tokens=50, stop=whole[5:9])
        assert cut.finish.stop_string == whole[5:9]


def test_port_that_is_taken_is_named():
    with serve() as serving:
        port = serving.address.rpartition(":")[2]
        config = ServeConfig.from_dict({"model": "m"}, [f"server.port={port}"])
        second = GrpcServer(serving.gateway, config)
        with pytest.raises(ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{port}"):
            serving.call(second.start())


@pytest.mark.parametrize("host", ["0.0.0.0", "*", "::", ""])
def test_gateway_never_listens_on_every_address(host):
    async def start():
        model = ModelInfo(name="m", vocab_size=10, max_model_len=10)
        await Gateway(ServeConfig.from_dict({"model": "m"}), None, model, bind_host=host).start()

    with serve() as serving, pytest.raises(ValueError, match="must be one address of this host"):
        serving.call(start())


def test_startup_and_shutdown_leave_no_thread():
    before = set(threading.enumerate())
    with serve(num_replicas=2) as serving:
        serving.client.generate([1], max_tokens=1)
    deadline = time.monotonic() + 10
    while left := [t for t in set(threading.enumerate()) - before if "serving" in t.name]:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)
