"""HTTP by hand, for what the official client would not send."""

import http.client
import json
from contextlib import closing
from urllib.parse import urlsplit

JSON = {"content-type": "application/json"}


def ask(url, path, body=None, headers=JSON, method="POST"):
    """Status, headers and body of one request; `body` may be an object or bytes."""
    address = urlsplit(url)
    with closing(http.client.HTTPConnection(address.hostname, address.port, timeout=20)) as link:
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        link.request(method, path, data, headers)
        answer = link.getresponse()
        return answer.status, answer.headers, answer.read()


def error_of(answer):
    """The error in a refusal, which has OpenAI's shape."""
    status, _, body = answer
    assert status >= 400, body
    assert set(json.loads(body)) == {"error"}
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return status, error
