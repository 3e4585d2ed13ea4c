"""The official OpenAI client against a real cluster over HTTP, beside our own over gRPC."""

import asyncio
import json
import time

import openai
import pytest

from cluster.server.client import Client
from tests.deploy.processes import Command

PROMPT = "It was a bright cold morning, and"
GREEDY = {"temperature": 0.0, "max_tokens": 24}
SEEDED = {"temperature": 0.9, "top_p": 0.95, "seed": 7, "max_tokens": 24}
CHAT = [{"role": "user", "content": "What is 12 + 30?"}]


@pytest.fixture(scope="module")
def url(served: Command) -> str:
    return served.wait_for(r"over HTTP on (http://\S+)", 10)[1] + "/v1"


@pytest.fixture(scope="module")
def api(url):
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture
def ours(endpoint):
    with Client(endpoint, timeout_s=120) as client:
        yield client


@pytest.mark.parametrize("options", [GREEDY, SEEDED])
@pytest.mark.parametrize("stream", [False, True])
def test_the_same_text_as_over_grpc(api, ours, options, stream):
    expected = ours.generate(PROMPT, **options)
    answer = api.completions.create(model="mosaic", prompt=PROMPT, stream=stream, **options)
    parts = list(answer) if stream else [answer]
    assert "".join(part.choices[0].text for part in parts) == expected.text != ""
    assert len(parts) > 1 or not stream


def test_chats_with_a_preset(api, ours):
    expected = ours.generate(CHAT, preset="math-tutor", **SEEDED)
    asked = {"model": "mosaic:math-tutor", "messages": CHAT, **SEEDED}
    answer = api.chat.completions.create(**asked)
    streamed = api.chat.completions.create(stream=True, **asked)
    assert answer.choices[0].message.content == expected.text
    assert answer.usage.prompt_tokens == expected.prompt.num_tokens > 100
    text = "".join(part.choices[0].delta.content or "" for part in streamed)
    assert text == expected.text


def test_greedy_tokens_are_the_likeliest(api):
    answer = api.chat.completions.create(
        model="mosaic", messages=CHAT, logprobs=True, top_logprobs=5, **GREEDY
    )
    for entry in answer.choices[0].logprobs.content:
        top = [other.logprob for other in entry.top_logprobs]
        assert top == sorted(top, reverse=True)
        assert entry.logprob == top[0] <= 0


def test_what_is_asked_to_be_json_is_json(api):
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["ann", "bob"]}, "old": {"type": "boolean"}},
        "required": ["name", "old"],
        "additionalProperties": False,
    }
    answer = api.chat.completions.create(
        model="mosaic",
        messages=CHAT,
        n=3,
        seed=1,
        max_tokens=250,  # white space between the parts, too
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    )
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        value = json.loads(choice.message.content)
        assert value.keys() == {"name", "old"}
        assert value["name"] in ("ann", "bob")
        assert value["old"] in (True, False)


def test_choices_of_one_request_are_those_of_their_seeds(api):
    together = api.completions.create(model="mosaic", prompt=PROMPT, n=3, **SEEDED)
    for idx, choice in enumerate(together.choices):
        alone = api.completions.create(model="mosaic", prompt=PROMPT, **SEEDED | {"seed": 7 + idx})
        assert alone.choices[0].text == choice.text


def test_readers_that_leave_free_their_sequences(url, ours):
    async def leave(client):
        stream = await client.completions.create(
            model="mosaic", prompt=PROMPT, max_tokens=1500, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        async for _ in stream:
            break
        await stream.close()

    async def leave_all():
        options = {"api_key": "none", "max_retries": 0, "timeout": 120}
        async with openai.AsyncOpenAI(base_url=url, **options) as client:
            await asyncio.gather(*(leave(client) for _ in range(24)))

    asyncio.run(leave_all())
    deadline = time.monotonic() + 20  # 1,500 tokens would take a minute
    while any(load.running or load.waiting for load in ours.loads().replicas):
        assert time.monotonic() < deadline, ours.loads()
        time.sleep(0.05)
