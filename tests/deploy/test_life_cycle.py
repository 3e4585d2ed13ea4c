"""From start to end of a real cluster: what it listens on, how it stops, and that leaving stops requests."""

import http.client
import json
import signal
import threading
import time
from urllib.parse import urlsplit

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.server.client import Client, ClientError
from cluster.server.security import is_loopback
from tests.deploy.conftest import START_TIMEOUT_S
from tests.deploy.processes import EXPERTMESH, running

PROMPT = "It was a bright cold morning, and"
LONG = {"temperature": 0.0, "max_tokens": 2000, "ignore_eos": True}
ONE_RANK = ("parallel.num_nodes=1", "parallel.ranks_per_node=1")


def wait_until(condition, timeout_s=30.0):
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)
    return found


def test_sigterm_lets_requests_finish_and_a_second_one_hurries():
    with running([EXPERTMESH, "serve", *ONE_RANK, "server.drain_timeout_s=300"]) as command:
        endpoint = command.wait_for(r"serving mosaic on (\S+)", START_TIMEOUT_S)[1]
        assert "starting 1 rank processes" in command.output  # which takes the longest
        with Client(endpoint, 120, max_retries=0) as client, grpc.insecure_channel(endpoint) as raw:
            watch = health_pb2_grpc.HealthStub(raw).Watch(
                health_pb2.HealthCheckRequest(service="expertmesh.v1.Inference")
            )
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            endless, short = client.generate_stream(PROMPT, **LONG), []
            next(endless), next(endless)
            answering = threading.Thread(
                target=lambda: short.append(client.generate(PROMPT, **{**LONG, "max_tokens": 40}))
            )
            answering.start()
            wait_until(lambda: client.loads().replicas[0].in_flight == 2)
            command.signal(signal.SIGTERM)
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            with pytest.raises(ClientError, match=r"UNAVAILABLE.*draining"):
                client.generate(PROMPT, max_tokens=1)
            answering.join(120)
            assert len(short[0].token_ids) == 40
            next(endless)
            command.signal(signal.SIGTERM)
            with pytest.raises(ClientError, match=r"UNAVAILABLE.*shutting down"):
                list(endless)
        assert command.wait(60) == 0, command.output


def test_nothing_of_ours_listens_beyond_loopback(served):
    """Ray itself opens one port on all addresses in each of its processes, with its token."""
    processes = psutil.Process(served.process.pid).children(recursive=True)
    kinds = ("ray::Controller", "ray::Worker")
    ours = [p for p in processes if "".join(p.cmdline()).startswith(kinds)]
    assert len(ours) == 5, "a controller and four ranks"
    for process in ours:
        listening = [
            connection.laddr.ip
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        ]
        beyond = [address for address in listening if not is_loopback(address)]
        assert len(listening) >= 2
        assert beyond in ([], ["::"])


def leave_grpc(endpoint, url):
    with Client(endpoint, 120) as client:
        chunks = client.generate_stream(PROMPT, **LONG)
        next(chunks), next(chunks)
        chunks.close()


def leave_http(endpoint, url):
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=120)
    body = {"model": "mosaic", "prompt": PROMPT, "stream": True, **LONG}
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    assert connection.getresponse().readline().startswith(b"data: ")
    connection.close()


@pytest.mark.parametrize("leave", [leave_grpc, leave_http])
def test_a_dropped_stream_gives_back_its_blocks_long_before_its_end(served, endpoint, leave):
    url = urlsplit(served.wait_for(r"over HTTP on (\S+)", 10)[1])

    def held():
        return sum(load.kv_blocks_used for load in client.loads().replicas)

    with Client(endpoint, 120) as client:
        wait_until(lambda: held() == 0)
        before = max(load.step for load in client.loads().replicas)
        leave(endpoint, url)
        wait_until(lambda: held() == 0)
        steps = max(load.step for load in client.loads().replicas) - before
        assert 1 <= steps < LONG["max_tokens"] / 10
