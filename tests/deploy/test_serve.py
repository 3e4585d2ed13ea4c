"""A real cluster on a real Ray, asked by real clients over real sockets."""

import math
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tokenizers import Tokenizer

from cluster.server.client import Client
from cluster.server.errors import Code, RequestError
from cluster.worker import NICENESS
from deploy.settings import BUNDLED_MODELS
from tests.deploy.conftest import START_TIMEOUT_S
from tests.deploy.processes import EXPERTMESH, Command, Traces, running, workers_below

PROMPT = "It was a bright cold morning, and"
GREEDY = {"temperature": 0.0, "max_tokens": 24}
SEEDED = {"temperature": 0.9, "top_p": 0.95, "seed": 7, "max_tokens": 24}


@pytest.fixture
def client(endpoint: str) -> Client:
    with Client(endpoint, timeout_s=120) as client:
        yield client


def test_stream_is_the_unary_answer_in_pieces(client: Client) -> None:
    whole = client.generate(PROMPT, **GREEDY)
    chunks = list(client.generate_stream(PROMPT, **GREEDY))
    assert "".join(chunk.text for chunk in chunks) == whole.text != ""
    assert [t for chunk in chunks for t in chunk.token_ids] == list(whole.token_ids)
    assert sum(bool(chunk.token_ids) for chunk in chunks) > 1, "it came in one piece"
    assert whole.usage.completion_tokens == len(whole.token_ids) == 24
    assert whole.usage.prompt_tokens == len(client.tokenize(PROMPT))


def test_text_is_what_the_tokenizer_says(client: Client) -> None:
    tokenizer = Tokenizer.from_file(str(BUNDLED_MODELS["mosaic"] / "tokenizer.json"))
    answer = client.generate(PROMPT, **GREEDY)
    prompt_ids = tokenizer.encode(PROMPT).ids
    everything = tokenizer.decode(prompt_ids + list(answer.token_ids))
    assert everything == tokenizer.decode(prompt_ids) + answer.text


def test_ranks_give_way_to_the_gateway(client: Client, served: Command) -> None:
    client.generate(PROMPT, max_tokens=1)
    ours = [psutil.Process(served.process.pid), *psutil.Process(served.process.pid).children(True)]

    def niceness(title: str) -> set[int]:
        """Of the thread of each process that has computed most."""
        found = [process for process in ours if "".join(process.cmdline()[:1]).startswith(title)]
        busiest = [max(p.threads(), key=lambda thread: thread.user_time).id for p in found]
        return {os.getpriority(os.PRIO_PROCESS, thread) for thread in busiest}

    assert niceness("ray::Controller") == {ours[0].nice()}
    assert niceness("ray::Worker") == {min(19, ours[0].nice() + NICENESS)}


def test_same_request_same_tokens_in_any_company(client: Client) -> None:
    """Ring 1: alone and among others, greedy and seeded, on whichever replica."""
    requests: list[tuple[str, dict[str, Any]]] = [
        (text * n, options) for text in ("Alas, ", "def f(x):") for n in (1, 30)
        for options in (GREEDY, SEEDED)
    ]  # fmt: skip
    alone = [client.generate(text, **options).token_ids for text, options in requests]
    with ThreadPoolExecutor(len(requests)) as threads:
        together = list(threads.map(lambda r: client.generate(r[0], **r[1]).token_ids, requests))
    assert [list(ids) for ids in together] == [list(ids) for ids in alone]


def test_stop_string_ends_the_text_before_it(client: Client) -> None:
    text = client.generate(PROMPT, **GREEDY).text
    stop = text[8:12]
    answer = client.generate(PROMPT, **GREEDY, stop=[stop])
    assert answer.text == text[: text.index(stop)]
    assert answer.finish.stop_string == stop


@pytest.mark.parametrize(
    ("prompt", "options", "code", "names"),
    [
        ("", {}, Code.INVALID_ARGUMENT, "text"),
        ([], {}, Code.INVALID_ARGUMENT, "the prompt is empty"),
        ([10**6], {}, Code.INVALID_ARGUMENT, "token_ids"),
        ([1] * 100_000, {}, Code.INVALID_ARGUMENT, "max_model_len"),
        (PROMPT, {"temperature": -1.0}, Code.INVALID_ARGUMENT, "temperature"),
        (PROMPT, {"temperature": math.nan}, Code.INVALID_ARGUMENT, "temperature"),
        (PROMPT, {"top_p": math.inf}, Code.INVALID_ARGUMENT, "top_p"),
        (PROMPT, {"min_p": -0.1}, Code.INVALID_ARGUMENT, "min_p"),
        (PROMPT, {"top_k": -1}, Code.INVALID_ARGUMENT, "top_k"),
        (PROMPT, {"max_tokens": -5}, Code.INVALID_ARGUMENT, "max_tokens"),
        (PROMPT, {"stop_token_ids": [10**6]}, Code.INVALID_ARGUMENT, "stop_token_ids"),
        (PROMPT, {"model": "no-such-model"}, Code.NOT_FOUND, "no-such-model"),
    ],
)
def test_bad_request_fails_alone(
    client: Client, prompt: Any, options: dict[str, Any], code: Code, names: str
) -> None:
    """While a good request streams: the bad one is refused by name, the good one is unharmed."""
    good = client.generate_stream(PROMPT, **GREEDY)
    first = [next(good), next(good)]
    with pytest.raises(RequestError) as refused:
        client.generate(prompt, **options)
    assert refused.value.code == code
    assert names in refused.value.message
    tokens = [t for chunk in [*first, *good] for t in chunk.token_ids]
    assert tokens == list(client.generate(PROMPT, **GREEDY).token_ids)


def test_health_and_reflection(endpoint: str) -> None:
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
        ProtoReflectionDescriptorDatabase,
    )

    with grpc.insecure_channel(endpoint) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="expertmesh.v1.Inference")
        assert health.Check(request, timeout=10).status == health_pb2.HealthCheckResponse.SERVING
        services = ProtoReflectionDescriptorDatabase(channel).get_services()
    assert {"expertmesh.v1.Inference", "expertmesh.v1.Control", "grpc.health.v1.Health"} <= set(
        services
    )


def test_server_info_tells_the_layout(client: Client) -> None:
    info = client.server_info()
    assert (info.num_nodes, info.ranks_per_node, info.num_replicas) == (2, 2, 2)
    assert info.ready


def test_sigterm_stops_cleanly_and_leaves_nothing() -> None:
    before = Traces.now()
    with running([EXPERTMESH, "serve", "parallel.num_nodes=1"]) as command:
        endpoint = command.wait_for(r"serving mosaic on (\S+)", START_TIMEOUT_S)[1]
        with Client(endpoint) as client:
            assert client.generate(PROMPT, **GREEDY).text
        command.signal(signal.SIGTERM)
        assert command.wait(60) == 0, command.output
    assert Traces.now().left_since(before) == {}


def test_lost_rank_ends_the_cluster_by_name_and_leaves_nothing() -> None:
    """kill -9 of one rank: streams end with an error that names it, nothing hangs."""
    before = Traces.now()
    with running([EXPERTMESH, "serve", "parallel.num_nodes=1"]) as command:
        endpoint = command.wait_for(r"serving mosaic on (\S+)", START_TIMEOUT_S)[1]
        with Client(endpoint, timeout_s=60) as client:
            stream = client.generate_stream(PROMPT, temperature=0.0, max_tokens=1000)
            next(stream)
            victim = workers_below(command.process.pid)[1]
            victim.kill()
            with pytest.raises(RequestError, match=r"rank \d ended") as lost:
                list(stream)
        assert lost.value.code in (Code.ABORTED, Code.UNAVAILABLE)
        assert command.wait(60) == 1, command.output
        assert "the cluster failed: rank" in command.output
    assert Traces.now().left_since(before) == {}
