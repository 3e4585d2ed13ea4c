"""Experts move on a real cluster while it answers, and the answers do not change."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from cluster.server.client import Client
from cluster.server.errors import Code, RequestError
from cluster.server.proto.expertmesh.v1 import control_pb2 as pb

PROMPTS = ("It was a bright cold morning, and", "def fib(n):", "从前有一个", "12 + 35 =")
PATIENCE_S = 120


def generate(client: Client, prompt: str, max_tokens: int = 64) -> list[int]:
    chunks = client.generate_stream(prompt, temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return [token_id for chunk in chunks for token_id in chunk.token_ids]


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def enough_recorded(client: Client) -> bool:
    try:
        client.rebalance(dry_run=True)
    except RequestError as error:
        if error.code != Code.FAILED_PRECONDITION:
            raise
        return False
    return True


def rows(placement: pb.GetExpertPlacementResponse) -> list[list[int]]:
    return [list(layer.experts) for layer in placement.layers]


def test_streams_do_not_notice_that_experts_move(endpoint: str) -> None:
    with Client(endpoint, timeout_s=PATIENCE_S) as client, ThreadPoolExecutor() as threads:
        before, was = client.placement(), client.balance().rebalances
        still = list(threads.map(lambda prompt: generate(client, prompt), PROMPTS))
        wait_until(lambda: enough_recorded(client))
        assert client.placement() == before, "a dry run changes nothing"

        streams = [threads.submit(generate, client, prompt) for prompt in PROMPTS]
        wait_until(lambda: any(load.running for load in client.loads().replicas))
        answer = client.rebalance(from_scratch=True)
        assert answer.started, answer.reason
        wait_until(lambda: client.placement().epoch > before.epoch)
        assert not any(stream.done() for stream in streams), "they ended before anything moved"
        wait_until(lambda: not client.balance().rebalances.running)
        assert [stream.result() for stream in streams] == still

        stats = client.balance().rebalances
        assert stats.finished == was.finished + 1, stats.last_error
        assert (stats.started, stats.abandoned) == (was.started + 1, was.abandoned)
        assert stats.moves - was.moves == sum(effect.moves for effect in answer.layers) > 0
        after = client.placement()
        changed = [a != b for a, b in zip(rows(before), rows(after), strict=True)]
        assert after.epoch - before.epoch == sum(changed) > 0
        for row in rows(after):
            assert set(row) - {-1} == set(range(after.num_experts)), "an expert is gone"
            for rank in np.array(row).reshape(after.num_ranks, -1):
                assert len(set(rank)) == len(rank), "two copies on one rank"
        again = list(threads.map(lambda prompt: generate(client, prompt, 16), PROMPTS))
        assert again == [tokens[:16] for tokens in still]

        # The ranks' own word: what they fetched is what the plan said.
        wait_until(lambda: client.balance().rebalances.bytes - was.bytes >= answer.bytes)
        assert client.balance().rebalances.bytes - was.bytes == answer.bytes
        assert client.server_info().ready
