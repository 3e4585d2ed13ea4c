"""`X-Request-Timeout`: after so many seconds nobody wants the answer, and no engine works on it."""

import asyncio
import json
import socket
import threading
import time
from urllib.parse import urlsplit

import openai
import pytest

from tests.server.http.conftest import OVERRIDES, official_client
from tests.server.http.raw import JSON, ask, error_of
from tests.server.serving import serve

CHAT = [{"role": "user", "content": "x"}]
PATHS = [
    ("/v1/completions", {"prompt": "x", "max_tokens": 5}),
    ("/v1/chat/completions", {"messages": CHAT, "max_tokens": 5}),
]


@pytest.fixture
def slow_serving():
    with serve(*OVERRIDES, step_s=0.02) as running:
        yield running


def within(seconds):
    return JSON | {"X-Request-Timeout": str(seconds)}


@pytest.mark.parametrize(("path", "body"), PATHS)
def test_in_time_it_changes_nothing(serving, path, body):
    body = body | {"seed": 1}
    texts = []
    for headers in (JSON, within(20), within("86400"), within("1.5e1")):
        status, _, answer = ask(serving.url, path, body, headers)
        assert status == 200
        texts.append(json.loads(answer)["choices"])
    assert all(text == texts[0] for text in texts)


@pytest.mark.parametrize(("path", "body"), PATHS)
def test_too_late_is_504_and_ends_the_sequences(slow_serving, path, body):
    leader = slow_serving.leaders[0]
    assert ask(slow_serving.url, path, body)[0] == 200  # the first chat starts a process
    leader.held.set()
    began = time.monotonic()
    status, error = error_of(ask(slow_serving.url, path, body | {"n": 2}, within(1)))
    assert 1 <= time.monotonic() - began < 10
    assert (status, error["code"], error["type"]) == (504, "deadline_exceeded", "server_error")
    assert "not finished within" in error["message"]
    leader.wait_for("abort", 2)
    assert slow_serving.num_in_flight() == 0


def test_a_stream_ends_with_the_error(slow_serving):
    with official_client(slow_serving) as api:
        stream = api.completions.create(
            model="tiny", prompt="x", max_tokens=100, stream=True,
            extra_headers={"X-Request-Timeout": "0.5"}, extra_body={"return_token_ids": True},
        )  # fmt: skip
        got = []
        with pytest.raises(openai.APIError, match="not finished within") as caught:
            got.extend(stream)
    assert caught.value.code == "deadline_exceeded"
    assert 1 <= len(got) < 100
    slow_serving.leaders[0].wait_for("abort")


@pytest.mark.parametrize("bad", ["", "soon", "0", "-1", "nan", "inf", "86401", "1s", "0x10"])
def test_what_is_no_time_is_refused(serving, bad):
    for path, body in PATHS:
        status, error = error_of(ask(serving.url, path, body, within(bad)))
        assert (status, error["code"]) == (400, "invalid_argument")
        assert f"x-request-timeout = {bad!r}: must be seconds" in error["message"]


def test_the_time_of_the_body_counts(serving):
    address = urlsplit(serving.url)
    body = json.dumps(PATHS[0][1]).encode()
    head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n"
    head += "x-request-timeout: 0.2\r\n"
    with socket.create_connection((address.hostname, address.port), timeout=20) as link:
        link.sendall(f"POST /v1/completions HTTP/1.1\r\nhost: x\r\n{head}\r\n".encode())
        time.sleep(0.4)
        link.sendall(body)
        answer = b"".join(iter(lambda: link.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 504")
    assert b"the body took longer than x-request-timeout = 0.2 s" in answer


def test_what_comes_before_the_engine_counts_too():
    """A constraint that takes long to try: whoever waits is told in time."""
    tried = threading.Event()

    async def never(constraint):
        tried.set()
        await asyncio.sleep(20)

    with serve(*OVERRIDES, check_constraint=never) as serving:
        body = PATHS[0][1] | {"guided_regex": "a+"}
        began = time.monotonic()
        status, error = error_of(ask(serving.url, "/v1/completions", body, within(0.3)))
        assert tried.is_set()
        assert time.monotonic() - began < 10
        assert (status, error["code"]) == (504, "deadline_exceeded")
        assert serving.num_in_flight() == 0
