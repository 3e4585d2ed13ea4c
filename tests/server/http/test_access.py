"""Who gets in over HTTP, and ports and libraries that are missing."""

import contextlib
import json
import socket
import ssl
import sys
import time

import openai
import pytest

from cluster.config import ConfigError
from cluster.server.http import server
from cluster.server.http.server import HttpServer
from cluster.server.security import EVERYBODY
from tests.server.http.conftest import OVERRIDES, official_client
from tests.server.http.raw import JSON, ask, error_of
from tests.server.serving import serve
from tests.server.tls import Authority

GUARDED = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/metrics"),
    ("GET", "/live/data/state"),
    ("GET", "/none"),
]
OPEN = ["/health", "/version", "/openapi.json"]


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "tokens"
    path.write_text("first-token\nsecond-token\n")
    path.chmod(0o600)
    return path


class TestTokens:
    def test_strangers_are_refused(self, token_file):
        with serve(*OVERRIDES, f"server.token_file={token_file}") as serving:
            for method, path in GUARDED:
                for sent in ({}, {"authorization": "Bearer no"}, {"authorization": "first-token"}):
                    answer = ask(serving.url, path, b"{", JSON | sent, method)
                    status, error = error_of(answer)
                    assert (path, status, error["type"]) == (path, 401, "authentication_error")
                    assert answer[1]["www-authenticate"] == "Bearer"
            for path in OPEN:
                assert ask(serving.url, path, None, {}, "GET")[0] == 200

    def test_every_token_of_the_file_opens(self, token_file):
        with serve(*OVERRIDES, f"server.token_file={token_file}") as serving:
            for token in ("first-token", "second-token"):
                with official_client(serving, api_key=token) as api:
                    assert len(list(api.models.list())) > 1
                    assert api.completions.create(model="tiny", prompt="x", max_tokens=1).usage


def trusting_client(serving, context):
    return official_client(serving, http_client=openai.DefaultHttpxClient(verify=context))


class TestTls:
    def test_only_over_tls(self, tmp_path):
        authority = Authority(tmp_path)
        cert, key = authority.issue("server")
        files = (f"server.tls_cert_file={cert}", f"server.tls_key_file={key}")
        with serve(*OVERRIDES, *files) as serving:
            with pytest.raises(OSError):  # noqa: PT011 - whatever a closed connection makes of it
                ask(serving.url, "/health", None, {}, "GET")
            serving.url = serving.url.replace("http:", "https:")
            trusting = ssl.create_default_context(cafile=str(authority.ca))
            with trusting_client(serving, trusting) as api:
                assert api.completions.create(model="tiny", prompt="x", max_tokens=1).usage
            with official_client(serving) as api, pytest.raises(openai.APIConnectionError):
                api.models.list()

    def test_clients_show_a_certificate_where_asked(self, tmp_path):
        authority = Authority(tmp_path)
        cert, key = authority.issue("server")
        files = {"cert": cert, "key": key, "client_ca": authority.ca}
        overrides = [f"server.tls_{name}_file={path}" for name, path in files.items()]
        with serve(*OVERRIDES, *overrides) as serving:
            serving.url = serving.url.replace("http:", "https:")
            for known in (True, False):
                context = ssl.create_default_context(cafile=str(authority.ca))
                if known:
                    context.load_cert_chain(*authority.issue("client"))
                refused = (
                    contextlib.nullcontext() if known else pytest.raises(openai.APIConnectionError)
                )
                with trusting_client(serving, context) as api, refused:
                    assert list(api.models.list())


class TestStarting:
    def test_a_port_in_use_is_named(self, serving):
        port = int(serving.url.rpartition(":")[2])
        config = serving.config.model_copy(
            update={"server": serving.config.server.model_copy(update={"http_port": port})}
        )
        with pytest.raises(ConfigError, match=f"http_port: cannot listen on 127.0.0.1:{port}"):
            serving.call(HttpServer(serving.gateway, config, EVERYBODY).start())

    def test_a_missing_library_names_its_extra(self, serving, monkeypatch):
        monkeypatch.setitem(sys.modules, "uvicorn", None)
        with pytest.raises(ConfigError, match=r"needs uvicorn: pip install 'expertmesh\[http\]'"):
            serving.call(HttpServer(serving.gateway, serving.config, EVERYBODY).start())

    def test_who_begins_no_request_is_not_waited_for(self, serving, monkeypatch):
        monkeypatch.setattr(server, "_HEADERS_TIMEOUT_S", 0.3)
        hasty = HttpServer(serving.gateway, serving.config, EVERYBODY)
        port = serving.call(hasty.start())
        with contextlib.ExitStack() as stack:
            idle, slow = (
                stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
                for _ in range(2)
            )
            slow.sendall(b"GET /health HTTP/1.1\r\nx-slow: ")
            with contextlib.suppress(ConnectionError):
                for _ in range(400):
                    slow.sendall(b"x")
                    time.sleep(0.05)
                pytest.fail("a header may take 20 s")
            assert idle.recv(1) == b""
        for _ in range(2):  # neither the request nor the pause between two takes part in it
            assert ask(f"http://127.0.0.1:{port}", "/health", None, {}, "GET")[0] == 200
        serving.call(hasty.stop())

    def test_who_takes_nothing_is_not_waited_for(self, serving, monkeypatch):
        monkeypatch.setattr(server, "_UNREAD_TIMEOUT_S", 0.5)
        hasty = HttpServer(serving.gateway, serving.config, EVERYBODY)
        port = serving.call(hasty.start())
        body = json.dumps({"prompt": "x" * 100, "echo": True, "n": 16, "logprobs": 20}).encode()
        with socket.socket() as link:
            link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            link.settimeout(20)
            link.connect(("127.0.0.1", port))
            head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            for _ in range(16):  # pipelined: more than all buffers hold
                link.sendall(f"POST /v1/completions HTTP/1.1\r\nhost: x\r\n{head}".encode() + body)
            deadline = time.monotonic() + 20
            for num_connections in (1, 0):
                while hasty.num_connections != num_connections:
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
        serving.call(hasty.stop())

    def test_stopping_what_never_started(self, serving):
        serving.call(HttpServer(serving.gateway, serving.config, EVERYBODY).stop())


def test_metrics_count_what_came_over_http(serving, api):
    def count():
        _, headers, body = ask(serving.url, "/metrics", None, {}, "GET")
        assert headers["content-type"].startswith("text/plain")
        name = 'expertmesh:generation_tokens_total{engine="0",model_name="tiny"} '
        return sum(float(x.split()[-1]) for x in body.decode().splitlines() if x.startswith(name))

    before = count()
    api.completions.create(model="tiny", prompt="x", max_tokens=9)
    assert count() == before + 9


def test_tokens_there_and_back(serving):
    text = "the cat 🦆"
    _, _, body = ask(serving.url, "/tokenize", {"prompt": text})
    tokens = json.loads(body)
    assert tokens["tokens"] == serving.tokenizer.encode(text).ids
    assert (tokens["count"], tokens["max_model_len"]) == (len(tokens["tokens"]), 128)
    _, _, body = ask(serving.url, "/detokenize", {"tokens": tokens["tokens"]})
    assert json.loads(body) == {"prompt": text}
    for path, bad in (
        ("/detokenize", {"tokens": [320]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "x", "messages": []}),
        ("/tokenize", {"prompt": "x", "model": "other"}),
    ):
        assert error_of(ask(serving.url, path, bad))[0] in (400, 404)


def test_without_a_tokenizer_ids_are_served(tmp_path):
    with serve(*OVERRIDES, with_tokenizer=False) as serving:
        with official_client(serving) as api:
            answer = api.completions.create(
                model="tiny", prompt=[5, 6], max_tokens=3, logprobs=1,
                extra_body={"return_token_ids": True},
            )  # fmt: skip
            assert len(answer.choices[0].token_ids) == 3
            with pytest.raises(openai.BadRequestError, match="no tokenizer"):
                api.completions.create(model="tiny", prompt="x")
        assert error_of(ask(serving.url, "/detokenize", {"tokens": [1]}))[0] == 400
