"""Readers that leave, read slowly or are told of an error in the middle of a stream."""

import http.client
import json
import socket
import threading
import time
from contextlib import closing
from urllib.parse import urlsplit

import openai
import pytest

from tests.server.http.conftest import OVERRIDES, official_client
from tests.server.http.raw import JSON, ask, error_of
from tests.server.serving import serve

ASKED = {"prompt": "x", "max_tokens": 100}
PATIENCE_S = 10


def eventually(condition, what):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


@pytest.fixture
def slow_serving():
    """Its leader takes 20 ms a token, or does nothing while `held`."""
    with serve(*OVERRIDES, step_s=0.02) as running:
        yield running


def begin(serving, body):
    """A request that has been sent and not been read from."""
    address = urlsplit(serving.url)
    link = http.client.HTTPConnection(address.hostname, address.port, timeout=20)
    link.request("POST", "/v1/completions", json.dumps(body), JSON)
    return link


class TestReadersThatLeave:
    @pytest.mark.parametrize("stream", [True, False])
    @pytest.mark.parametrize("prompts", [1, 3])
    def test_before_the_first_token(self, slow_serving, stream, prompts):
        leader = slow_serving.leaders[0]
        leader.held.set()
        link = begin(slow_serving, ASKED | {"stream": stream, "prompt": ["x"] * prompts, "n": 2})
        leader.wait_for("add", 2 * prompts)
        link.close()
        asked = {message["request_id"] for message in leader.of_type("add")}
        leader.wait_for("abort", 2 * prompts)
        assert {message["request_id"] for message in leader.of_type("abort")} == asked
        eventually(lambda: slow_serving.num_in_flight() == 0, "still in flight")

    def test_in_the_middle(self, slow_serving):
        leader = slow_serving.leaders[0]
        with official_client(slow_serving) as api:
            for idx, _ in enumerate(
                api.completions.create(model="tiny", prompt="x", max_tokens=100, stream=True)
            ):
                if idx == 3:
                    break
        leader.wait_for("abort")  # of sequences that have ended none is sent
        assert slow_serving.num_in_flight() == 0

    def test_without_any_trace_after_many(self, slow_serving, caplog):
        leader = slow_serving.leaders[0]
        leader.held.set()
        links = [begin(slow_serving, ASKED | {"stream": idx % 2 == 0}) for idx in range(40)]
        leader.wait_for("add", 40)
        for link in links:
            link.close()
        leader.wait_for("abort", 40)
        leader.held.clear()
        eventually(lambda: slow_serving.num_in_flight() == 0, "still in flight")
        with official_client(slow_serving) as api:
            assert api.completions.create(model="tiny", prompt="x", max_tokens=2).usage
        # (The client tells of its requests too, where something has turned logging on.)
        assert [record for record in caplog.records if not record.name.startswith("httpx")] == []


def test_a_slow_reader_is_cut_off_and_holds_up_nobody():
    """Tokens are kept for it up to a limit; other streams go on meanwhile."""
    with serve(*OVERRIDES, "server.max_buffered_tokens=8", step_s=0.002) as serving:
        address = urlsplit(serving.url)
        with socket.socket() as link:
            link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            link.settimeout(PATIENCE_S)
            link.connect((address.hostname, address.port))
            body = ASKED | {"n": 16, "logprobs": 20, "stream": True}
            data = json.dumps(body).encode()
            head = f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
            link.sendall(f"POST /v1/completions HTTP/1.1\r\nhost: x\r\n{head}".encode() + data)
            eventually(lambda: serving.leaders[0].of_type("abort"), "was not cut off")
            with official_client(serving) as api:
                assert api.completions.create(model="tiny", prompt="x", max_tokens=20).usage
            answer = b""
            while b"[DONE]" not in answer[-100:]:
                answer += link.recv(1 << 16)
    assert b'"code":"resource_exhausted"' in answer
    assert serving.leaders[0].of_type("abort")


def test_trace_context_is_passed_on(slow_serving):
    slow_serving.leaders[0].held.set()
    sent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    address = urlsplit(slow_serving.url)
    with closing(http.client.HTTPConnection(address.hostname, address.port)) as link:
        headers = JSON | {"traceparent": sent, "x-request-id": "traced"}
        link.request("POST", "/v1/completions", json.dumps(ASKED), headers)
        slow_serving.leaders[0].wait_for("add")
        request = slow_serving.do(slow_serving.gateway._requests.get, "traced")
        assert request.traceparent == sent


class TestErrorsInTheMiddle:
    def test_end_the_stream_with_an_error(self, slow_serving):
        with official_client(slow_serving) as api:
            stream = api.completions.create(model="tiny", prompt="x", max_tokens=100, stream=True)
            next(iter(stream))
            slow_serving.do(slow_serving.gateway.fail, "rank 3 ended: killed")
            with pytest.raises(openai.APIError, match="rank 3 ended") as caught:
                for _ in stream:
                    pass
        assert caught.value.code == "aborted"

    def test_of_the_engine_fail_one_request_alone(self, slow_serving):
        slow_serving.leaders[0].fail_prompts_with = 7
        answers = {}

        def send(prompt):
            body = {"prompt": [prompt, 9], "max_tokens": 10}
            answers[prompt] = ask(slow_serving.url, "/v1/completions", body)

        threads = [threading.Thread(target=send, args=(prompt,)) for prompt in (7, 8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        status, error = error_of(answers[7])
        assert (status, error["type"]) == (500, "server_error")
        assert "NaN" in error["message"]
        assert answers[8][0] == 200


class TestOverload:
    def test_a_full_queue_is_429_with_retry_after(self):
        with serve(*OVERRIDES, "scheduler.max_num_queued_reqs=1") as serving:
            serving.leaders[0].held.set()
            with closing(begin(serving, ASKED)):
                serving.leaders[0].wait_for("add")
                answer = ask(serving.url, "/v1/completions", ASKED | {"stream": True})
                status, error = error_of(answer)
                assert (status, error["type"]) == (429, "rate_limit_error")
                assert int(answer[1]["retry-after"]) >= 1

    def test_prompts_are_admitted_together_or_not_at_all(self):
        with serve(*OVERRIDES, "scheduler.max_num_queued_reqs=2") as serving:
            serving.leaders[0].held.set()
            answer = ask(serving.url, "/v1/completions", ASKED | {"prompt": ["a", "b", "c"]})
            assert error_of(answer)[0] == 429
            assert serving.num_in_flight() == 0


class TestLife:
    def test_not_ready_then_ready_then_draining(self):
        with serve(*OVERRIDES, ready=False) as serving:
            assert ask(serving.url, "/health", None, {}, "GET")[0] == 503
            status, error = error_of(ask(serving.url, "/v1/completions", ASKED))
            assert (status, error["code"]) == (503, "unavailable")
            serving.do(serving.gateway.set_ready, True)
            assert ask(serving.url, "/health", None, {}, "GET")[0] == 200
            serving.call(serving.gateway.drain())
            assert ask(serving.url, "/health", None, {}, "GET")[0] == 503
            assert "draining" in error_of(ask(serving.url, "/v1/completions", ASKED))[1]["message"]

    def test_stopping_cuts_off_after_the_grace(self, slow_serving):
        slow_serving.leaders[0].held.set()
        with closing(begin(slow_serving, ASKED | {"stream": True})) as link:
            slow_serving.leaders[0].wait_for("add")
            begun = time.monotonic()
            slow_serving.call(slow_serving.http.stop(0.1))
            assert time.monotonic() - begun < PATIENCE_S
            answer = link.getresponse()
            with pytest.raises(http.client.IncompleteRead):
                answer.read()
        eventually(lambda: slow_serving.num_in_flight() == 0, "still in flight")
