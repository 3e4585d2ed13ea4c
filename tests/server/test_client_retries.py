"""Calls that are made again: those that had no effect, not sooner than the server says, in time."""

import asyncio
import inspect
import threading
import time

import pytest

from cluster.server.client import AsyncClient, Client, ClientError
from cluster.server.client.retries import FIRST_PAUSE_S, MAX_PAUSE_S, Attempts
from cluster.server.errors import Code
from tests.server.serving import serve

RETRY_AFTER_S = 0.3


def error(code, retry_after_s=None):
    return ClientError(code, "", retry_after_s)


def test_pauses_grow_up_to_a_limit_and_none_is_too_early():
    attempts = Attempts(timeout_s=1e6, max_retries=12)
    pauses = [attempts.pause_after(error(Code.UNAVAILABLE)) for _ in range(12)]
    for idx, pause_s in enumerate(pauses):
        longest_s = min(MAX_PAUSE_S, FIRST_PAUSE_S * 2**idx)
        assert longest_s / 2 <= pause_s <= longest_s
    with pytest.raises(ClientError):
        attempts.pause_after(error(Code.UNAVAILABLE))
    advised = [
        Attempts(1e6, 1).pause_after(error(Code.RESOURCE_EXHAUSTED, 2.0)) for _ in range(200)
    ]
    assert 2.0 <= min(advised) < max(advised) <= 2.5, "all clients would come back at once"


@pytest.mark.parametrize(
    "code", [c for c in Code if c not in ("UNAVAILABLE", "RESOURCE_EXHAUSTED")]
)
def test_other_errors_are_final(code):
    with pytest.raises(ClientError):
        Attempts(1e6, 5).pause_after(error(code))


def test_limits_without_advice_are_final_and_so_is_the_deadline():
    with pytest.raises(ClientError, match="RESOURCE_EXHAUSTED"):
        Attempts(1e6, 5).pause_after(error(Code.RESOURCE_EXHAUSTED))
    with pytest.raises(ClientError, match="UNAVAILABLE"):
        Attempts(3.0, 5).pause_after(error(Code.UNAVAILABLE, retry_after_s=3.0))


def test_full_queue_is_tried_again_when_the_server_said():
    options = ("scheduler.max_num_queued_reqs=1", f"server.retry_after_s={RETRY_AFTER_S}")
    with serve(*options) as serving, Client(serving.address, 20.0) as client:
        serving.leaders[0].held.set()
        first = client.generate_stream([1], max_tokens=2)
        next(first)
        begun = time.monotonic()
        with pytest.raises(ClientError, match="RESOURCE_EXHAUSTED"):
            Client(serving.address, 20.0, max_retries=0).generate([2])
        threading.Timer(RETRY_AFTER_S / 2, serving.leaders[0].held.clear).start()
        answer = client.generate([2], max_tokens=3)
        assert time.monotonic() - begun >= RETRY_AFTER_S
        assert len(answer.token_ids) == 3
        assert len(list(first)) >= 1


def test_stream_is_tried_again_before_its_first_chunk_only():
    with serve(ready=False) as serving, Client(serving.address, 20.0, max_retries=8) as client:
        threading.Timer(0.2, serving.do, (serving.gateway.set_ready, True)).start()
        chunks = client.generate_stream([1], max_tokens=4)
        assert next(chunks).prompt.num_tokens == 1
        assert sum(len(chunk.token_ids) for chunk in chunks) == 4
        serving.leaders[0].held.set()
        begun = client.generate_stream([1], max_tokens=4)
        next(begun)
        serving.do(serving.gateway.fail, "a test")
        with pytest.raises(ClientError, match="a test"):
            list(begun)
        assert len(serving.leaders[0].of_type("add")) == 2


def test_asyncio_client_tries_again_too():
    async def use(address):
        async with AsyncClient(address, 20.0, max_retries=8) as client:
            asyncio.get_running_loop().call_later(0.2, serving.gateway.set_ready, True)
            answer = await client.generate([1], max_tokens=2)
            serving.gateway.readiness.set(False)
            asyncio.get_running_loop().call_later(0.2, serving.gateway.set_ready, True)
            chunks = [chunk async for chunk in client.generate_stream([1], max_tokens=2)]
            return answer, chunks

    with serve(ready=False) as serving:
        answer, chunks = serving.call(use(serving.address))
        assert len(answer.token_ids) == sum(len(chunk.token_ids) for chunk in chunks) == 2


def test_what_steers_the_server_is_asked_for_once():
    with Client("127.0.0.1:1", 5.0, max_retries=8) as client:
        begun = time.monotonic()
        for ask in (client.flush_cache, client.rebalance, client.drain, client.dump_expert_stats):
            with pytest.raises(ClientError, match="UNAVAILABLE"):
                ask()
        assert time.monotonic() - begun < 4, "it was tried again"


def test_both_clients_can_do_the_same():
    def methods(kind):
        return {
            name: list(inspect.signature(member).parameters.values())
            for name, member in inspect.getmembers(kind, inspect.isfunction)
            if not name.startswith("_")
        }

    assert methods(Client) == methods(AsyncClient)
    assert {"generate", "trace_steps", "flush_cache", "placement"} <= set(methods(Client))
