"""Calls about ranks, experts and steps, by a client that knows only what the cluster says of itself."""

import base64
import io
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest

from tests.server.reflection_client import ReflectionClient

INFERENCE, CONTROL = "expertmesh.v1.Inference", "expertmesh.v1.Control"
NUM_RANKS, NUM_LAYERS, NUM_EXPERTS = 4, 5, 32
PROMPT = {"text": "It was a bright cold morning, and"}


@pytest.fixture
def client(endpoint: str) -> Iterator[ReflectionClient]:
    with ReflectionClient(endpoint, timeout_s=120) as client:
        yield client


def joined(chunks: list[dict[str, Any]]) -> bytes:
    return b"".join(base64.b64decode(chunk["data"]) for chunk in chunks)


def plan(client: ReflectionClient) -> dict[str, Any]:
    """As soon as enough load has been seen."""
    deadline = time.monotonic() + 60
    while True:
        client.call(INFERENCE, "Generate", text=PROMPT["text"] * 20, sampling={"max_tokens": 2})
        try:
            return client.call(CONTROL, "Rebalance", dry_run=True)
        except grpc.RpcError as error:
            if "not enough load" not in error.details() or time.monotonic() > deadline:
                raise


def test_inference(client: ReflectionClient) -> None:
    request = PROMPT | {"sampling": {"temperature": 0, "max_tokens": 6}}
    whole = client.call(INFERENCE, "Generate", **request)
    chunks = client.call(INFERENCE, "GenerateStream", **request)
    assert "".join(chunk.get("text", "") for chunk in chunks) == whole["text"]
    assert len(whole["token_ids"]) == whole["usage"]["completion_tokens"] == 6
    tokens = client.call(INFERENCE, "Tokenize", **PROMPT)["token_ids"]
    assert whole["prompt"]["num_tokens"] == len(tokens)


def test_facts_and_loads(client: ReflectionClient) -> None:
    info = client.call(CONTROL, "GetServerInfo")
    assert (info["num_nodes"], info["ranks_per_node"], info["num_replicas"]) == (2, 2, 2)
    assert client.call(CONTROL, "GetModelInfo")["model"] == info["model"] == "mosaic"
    replicas = client.call(CONTROL, "GetLoads")["replicas"]
    assert len(replicas) == 2
    assert all(replica["kv_blocks_total"] > 0 for replica in replicas)
    assert client.call(CONTROL, "FlushCache") == {"num_replicas": 2}
    assert client.call(CONTROL, "Abort", request_id="nobody") == {}


def test_experts_and_their_balance(client: ReflectionClient) -> None:
    placement = client.call(CONTROL, "GetExpertPlacement")
    assert placement["num_ranks"] == NUM_RANKS
    for layer in placement["layers"]:
        assert set(layer["experts"]) - {-1} == set(range(NUM_EXPERTS))
    planned = plan(client)
    assert len(client.call(CONTROL, "GetBalance")["ranks"]) == NUM_RANKS
    assert not planned.get("started")
    assert planned["reason"]
    dumped = np.load(io.BytesIO(joined(client.call(CONTROL, "DumpExpertStats"))))
    assert any(NUM_LAYERS in dumped[name].shape for name in dumped.files)


def test_steps(client: ReflectionClient) -> None:
    with ThreadPoolExecutor(1) as threads:
        busy = threads.submit(
            client.call, INFERENCE, "Generate", **PROMPT,
            sampling={"max_tokens": 40, "ignore_eos": True},
        )  # fmt: skip
        data = joined(client.call(CONTROL, "TraceSteps", num_steps=2, timeout_s=60))
        busy.result()
    events = json.loads(data)["traceEvents"]
    assert len({event["pid"] for event in events}) >= NUM_RANKS
