"""Whatever a client sends, it alone is told what is wrong with it, and never by a 500."""

import json
import re
import socket
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.server.http.models import ChatCompletionBody, CompletionBody
from tests.server.http.raw import JSON, ask, error_of

OURS = {"prompt": "x", "max_tokens": 2}
CHAT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "prompt.*required|must be a JSON object"),
        (b"{", "not JSON"),
        (b'{"prompt": "x"', "not JSON"),
        (b"\xff\xfe", "."),
        (b"[]", "must be a JSON object"),
        (b"7", "must be a JSON object"),
        (b'{"prompt": ' + b"[" * 100_000, "."),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "."),
        (b'{"prompt": "x", "temperature": NaN}', "temperature"),
        (b'{"prompt": "x", "temperature": 1e999}', "temperature"),
        (rb'{"prompt": "\ud800"}', "lone surrogates"),
        (b'{"prompt": "x", "prompt": 7}', "prompt"),
        (b"{}", "prompt: this field is required"),
    ],
)
def test_malformed(serving, body, words):
    status, error = error_of(ask(serving.url, "/v1/completions", body))
    assert status == 400
    assert re.search(words, error["message"]), error


@pytest.mark.parametrize(
    ("more", "param", "words"),
    [
        ({"temprature": 1}, "temprature", "there is no such field"),
        ({"temperature": "1"}, "temperature", 'temperature = "1": Input should be a valid number'),
        ({"temperature": True}, "temperature", "valid number"),
        ({"temperature": -1}, "temperature", "at least 0"),
        ({"max_tokens": 1.5}, "max_tokens", "valid integer"),
        ({"max_tokens": 0}, "max_tokens", "from 1"),
        ({"n": 0}, "n", "in [1, server.max_choices = 16]"),
        ({"n": 10**30}, "n", "in [1, server.max_choices = 16]"),
        ({"seed": -1}, "seed", "from 0"),
        ({"seed": 2**64}, "seed", "from 0"),
        ({"stop": 7}, "stop", "valid string; or Input should be a valid list"),
        ({"stop": ["a"] * 17}, "stop", "at most 16 entries"),
        ({"logit_bias": {"cat": 1}}, "logit_bias", "logit_bias must have ids"),
        ({"logit_bias": {"320": 1}}, "logit_bias", "to 319"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "100"),
        ({"logprobs": 21}, "logprobs", "20"),
        ({"logprobs": -1}, "logprobs", "0"),
        ({"prompt": ""}, "prompt", "at least one character"),
        ({"prompt": []}, "prompt", "prompt must have 1 to 16 texts"),
        ({"prompt": ["x"] * 17}, "prompt", "prompt must have 1 to 16 texts"),
        ({"prompt": [1, "x"]}, "prompt", "prompt"),
        ({"prompt": [320]}, "prompt", "in [0, 319]"),
        ({"prompt": [-1]}, "prompt", "in [0, 319]"),
        ({"prompt": [1] * 128}, None, "at most max_model_len - 1 = 127"),
        ({"best_of": 2}, "best_of", "the same as n"),
        ({"suffix": "x"}, "suffix", "suffix"),
        ({"stream": True, "echo": True, "logprobs": 1}, None, "stream to false"),
        ({"response_format": {"type": "xml"}}, "response_format", "json_object"),
        ({"guided_regex": "a", "guided_json": {}}, None, "are both given"),
        ({"priority": 2**40}, "priority", "2147483647"),
        ({"cache_salt": "x" * 300}, "cache_salt", "256"),
    ],
)
def test_values(serving, more, param, words):
    status, error = error_of(ask(serving.url, "/v1/completions", OURS | more))
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert words in error["message"]
    assert error["param"] == param


class TestEnvelope:
    def test_larger_than_allowed(self, serving):
        body = {"prompt": "x" * (4 << 20)}
        status, error = error_of(ask(serving.url, "/v1/completions", body))
        assert status == 413
        assert "server.max_message_mib = 4" in error["message"]

    def test_not_declared_as_json(self, serving):
        """A page of another site can send forms to a server on loopback, but no JSON."""
        for headers in ({}, {"content-type": "text/plain"}):
            answer = ask(serving.url, "/v1/completions", OURS, headers)
            status, error = error_of(answer)
            assert status == 415
            assert "content-type: application/json" in error["message"]

    def test_header_larger_than_allowed(self, serving):
        address = urlsplit(serving.url)
        with socket.create_connection((address.hostname, address.port), timeout=20) as link:
            link.sendall(b"GET /health HTTP/1.1\r\nx-long: " + b"x" * (17 << 10))
            assert link.recv(12) == b"HTTP/1.1 400"

    @pytest.mark.parametrize(
        ("method", "path", "expected"),
        [("GET", "/v1/none", 404), ("GET", "/v1/completions", 405), ("POST", "/v1/models", 405)],
    )
    def test_no_such_route(self, serving, method, path, expected):
        status, error = error_of(ask(serving.url, path, None, {}, method))
        assert status == expected
        assert error["type"] == "invalid_request_error"

    def test_request_ids_go_in_and_out(self, serving):
        _, headers, body = ask(
            serving.url, "/v1/completions", OURS, JSON | {"x-request-id": "mine-1"}
        )
        assert headers["x-request-id"] == "mine-1"
        assert json.loads(body)["id"] == "cmpl-mine-1"
        assert serving.leaders[0].of_type("add")[-1]["request_id"] == "mine-1"
        _, first, _ = ask(serving.url, "/health", None, {}, "GET")
        _, second, _ = ask(serving.url, "/health", None, {}, "GET")
        assert first["x-request-id"] != second["x-request-id"]
        answer = ask(serving.url, "/v1/completions", OURS, JSON | {"x-request-id": "x" * 300})
        assert error_of(answer)[0] == 400


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


def bodies(model, valid):
    """Bodies that are valid but for some fields, which hold anything."""
    names = st.sampled_from([field.alias or name for name, field in model.model_fields.items()])
    return st.dictionaries(names | st.text(max_size=6), json_values, max_size=4).map(
        lambda odd: {**valid, **odd}
    )


@settings(max_examples=150, deadline=None)
@given(body=bodies(CompletionBody, OURS))
def test_no_completion_is_an_internal_error(serving, body):
    _check(ask(serving.url, "/v1/completions", body))


@settings(max_examples=150, deadline=None)
@given(body=bodies(ChatCompletionBody, CHAT))
def test_no_chat_is_an_internal_error(serving, body):
    _check(ask(serving.url, "/v1/chat/completions", body))


@settings(max_examples=50, deadline=None)
@given(path=st.sampled_from(["/tokenize", "/detokenize"]), body=json_values)
def test_no_other_body_is_an_internal_error(serving, path, body):
    _check(ask(serving.url, path, body))


def _check(answer):
    status, _, body = answer
    if status == 200 and body.startswith(b"data:"):
        events = [line.removeprefix(b"data: ") for line in body.split(b"\n\n")]
        assert events[-2:] == [b"[DONE]", b""]
        assert b"internal error" not in body
    elif status == 200:
        assert "usage" in json.loads(body) or "tokens" in json.loads(body) or body
    else:
        assert error_of(answer)[0] in (400, 404, 409, 429)
