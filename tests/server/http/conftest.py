"""One front end with HTTP for tests that only ask it, and the official client for it."""

import openai
import pytest

from tests.server.serving import serve

OVERRIDES = ("server.http_port=0", "chat.template=plain")


@pytest.fixture(scope="package")
def serving():
    with serve(*OVERRIDES) as running:
        yield running


@pytest.fixture(scope="package")
def api(serving):
    with official_client(serving) as client:
        yield client


def official_client(serving, kind=openai.OpenAI, **options):
    options = {"api_key": "none", "max_retries": 0, "timeout": 20, **options}
    return kind(base_url=f"{serving.url}/v1", **options)
