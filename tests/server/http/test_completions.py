"""The official client gets over HTTP what ours gets over gRPC."""

import asyncio

import openai
import pytest

from tests.server.http.conftest import official_client
from tests.server.serving import VOCAB_SIZE
from tests.server.stub_leader import completion, logprob_of

PROMPT = "the cat sat"
ASKED = {"model": "tiny", "max_tokens": 24, "seed": 7}


def expected_text(serving, prompt=PROMPT, seed=7, **options):
    return serving.client.generate(prompt, max_tokens=24, seed=seed, **options)


def test_text_tokens_and_usage(serving, api):
    answer = api.completions.create(prompt=PROMPT, **ASKED, extra_body={"return_token_ids": True})
    expected = expected_text(serving)
    choice = answer.choices[0]
    assert choice.text == expected.text
    assert choice.token_ids == list(expected.token_ids)
    assert (choice.finish_reason, choice.stop_reason, choice.logprobs) == ("length", None, None)
    assert (answer.model, answer.object) == ("tiny", "text_completion")
    assert answer.usage.prompt_tokens == expected.prompt.num_tokens
    assert answer.usage.completion_tokens == 24
    assert answer.usage.total_tokens == expected.prompt.num_tokens + 24
    assert answer.usage.prompt_tokens_details.cached_tokens == expected.usage.cached_tokens


def test_streams_join_to_the_whole(serving, api):
    chunks = list(
        api.completions.create(
            prompt=PROMPT,
            stream=True,
            n=3,
            **ASKED,
            stream_options={"include_usage": True},
            extra_body={"return_token_ids": True},
        )
    )
    *chunks, last = chunks
    whole = api.completions.create(prompt=PROMPT, n=3, **ASKED)
    for index in range(3):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(choice.text for choice in mine) == whole.choices[index].text
        expected = completion(
            serving.tokenizer.encode(PROMPT).ids, 7 + index, VOCAB_SIZE, max_tokens=24
        )
        assert [i for choice in mine for i in choice.token_ids] == expected
        assert [choice.finish_reason for choice in mine if choice.finish_reason] == ["length"]
    assert {chunk.id for chunk in chunks} == {last.id}
    assert {chunk.usage for chunk in chunks} == {None}
    assert last.choices == []
    assert last.usage.completion_tokens == 3 * 24
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts(serving, api, stream):
    """Choices are numbered prompt by prompt, whichever prompt is answered first."""
    prompts = [PROMPT, "a dog", "x"]
    answer = api.completions.create(prompt=prompts, n=2, stream=stream, **ASKED)
    texts = dict.fromkeys(range(6), "")
    for part in answer if stream else [answer]:
        for choice in part.choices:
            texts[choice.index] += choice.text
    assert texts == {
        2 * idx + extra: expected_text(serving, prompt, seed=7 + extra).text
        for idx, prompt in enumerate(prompts)
        for extra in range(2)
    }


@pytest.mark.parametrize("prompt", [[5, 6, 7], [[5, 6, 7]]])
def test_token_ids_as_prompt(serving, api, prompt):
    answer = api.completions.create(prompt=prompt, **ASKED)
    assert answer.choices[0].text == expected_text(serving, [5, 6, 7]).text


def test_stop_strings_and_tokens(serving, api):
    text = expected_text(serving).text
    letter = next(char for char in text[3:] if char.isascii())
    answer = api.completions.create(prompt=PROMPT, stop=letter, **ASKED)
    kept = api.completions.create(
        prompt=PROMPT, stop=[letter], **ASKED, extra_body={"include_stop_str_in_output": True}
    )
    assert answer.choices[0].text == text[: text.index(letter)]
    assert kept.choices[0].text == text[: text.index(letter) + 1]
    assert (answer.choices[0].finish_reason, answer.choices[0].stop_reason) == ("stop", letter)
    tenth = expected_text(serving).token_ids[9]
    answer = api.completions.create(prompt=PROMPT, **ASKED, extra_body={"stop_token_ids": [tenth]})
    assert (answer.choices[0].finish_reason, answer.choices[0].stop_reason) == ("stop", tenth)


class TestLogprobs:
    @pytest.mark.parametrize("stream", [False, True])
    def test_of_the_completion(self, serving, api, stream):
        answer = api.completions.create(prompt=PROMPT, logprobs=3, stream=stream, **ASKED)
        parts = [p.choices[0].logprobs for p in (answer if stream else [answer])]
        shown = {
            name: [item for part in parts if part for item in getattr(part, name)]
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }
        token_ids = expected_text(serving).token_ids
        decoded = [serving.tokenizer.decode([i], skip_special_tokens=False) for i in token_ids]
        assert shown["tokens"] == decoded
        assert shown["token_logprobs"] == [logprob_of(i, 3).logprob for i in token_ids]
        assert shown["text_offset"] == [len("".join(decoded[:i])) for i in range(len(decoded))]
        top = {serving.tokenizer.decode([i]): -i / 8 for i in (2, 1, 0)}
        assert shown["top_logprobs"] == [top] * len(token_ids)

    def test_of_the_prompt_with_echo(self, serving, api):
        answer = api.completions.create(prompt=PROMPT, echo=True, logprobs=0, n=2, **ASKED)
        assert answer.choices[1].logprobs.tokens[:2] == answer.choices[0].logprobs.tokens[:2]
        expected = expected_text(serving)
        prompt_ids = serving.tokenizer.encode(PROMPT).ids
        shown = answer.choices[0].logprobs
        assert answer.choices[0].text == PROMPT + expected.text
        assert "".join(shown.tokens[: len(prompt_ids)]) == PROMPT
        assert shown.token_logprobs == [
            None,
            *(logprob_of(i, 0).logprob for i in [*prompt_ids[1:], *expected.token_ids]),
        ]

    @pytest.mark.parametrize("prompt", [PROMPT, [5, 6, 7]])
    def test_echo_is_streamed_once_for_each_choice(self, api, prompt):
        texts = ["", ""]
        for chunk in api.completions.create(prompt=prompt, echo=True, n=2, stream=True, **ASKED):
            texts[chunk.choices[0].index] += chunk.choices[0].text
        whole = api.completions.create(prompt=prompt, echo=True, n=2, **ASKED)
        assert texts == [choice.text for choice in whole.choices]

    def test_of_the_prompt_as_vllm_shows_them(self, serving, api):
        answer = api.completions.create(prompt=PROMPT, **ASKED, extra_body={"prompt_logprobs": 1})
        first, *others = answer.choices[0].prompt_logprobs
        assert first is None
        for token_id, shown in zip(serving.tokenizer.encode(PROMPT).ids[1:], others, strict=True):
            text = serving.tokenizer.decode([token_id])
            expected = {"logprob": -token_id / 8, "rank": token_id + 1, "decoded_token": text}
            assert shown[str(token_id)] == expected
            assert shown["0"]["rank"] == 1


def test_every_parameter_reaches_the_engine(serving, api):
    api.completions.create(
        model="tiny",
        prompt=PROMPT,
        max_tokens=2,
        temperature=0.5,
        top_p=0.75,
        seed=3,
        stop=["x"],
        frequency_penalty=-1.5,
        presence_penalty=1.5,
        logit_bias={"17": -3.5},
        user="somebody",
        extra_body={
            "top_k": 5,
            "min_p": 0.25,
            "repetition_penalty": 1.25,
            "min_tokens": 1,
            "ignore_eos": True,
            "stop_token_ids": [9],
            "skip_special_tokens": False,
            "include_stop_str_in_output": True,
            "allowed_token_ids": [17, 18, 19],
            "bad_words": ["cat"],
            "prompt_logprobs": 0,
            "priority": -4,
            "cache_salt": "salt",
        },
    )
    message = serving.leaders[0].of_type("add")[-1]
    sent = message["sampling"]
    assert sent["logit_bias"] == [[17, -3.5]]
    assert sent["bad_words"]
    assert (message["priority"], message["cache_salt"]) == (-4, "salt")
    expected = {
        "temperature": 0.5,
        "top_p": 0.75,
        "seed": 3,
        "frequency_penalty": -1.5,
        "presence_penalty": 1.5,
        "top_k": 5,
        "min_p": 0.25,
        "repetition_penalty": 1.25,
        "min_tokens": 1,
        "ignore_eos": True,
        "stop_token_ids": [9],
        "allowed_token_ids": [17, 18, 19],
        "prompt_logprobs": 0,
    }
    assert {name: sent[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("asked", "constraint"),
    [
        ({"response_format": {"type": "json_object"}}, ("json_schema", '{"type": "object"}')),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {"type": "integer"}, "strict": True},
                }
            },
            ("json_schema", '{"type": "integer"}'),
        ),
        ({"guided_json": {"type": "null"}}, ("json_schema", '{"type": "null"}')),
        ({"guided_json": "{}"}, ("json_schema", "{}")),
        ({"guided_regex": "a+"}, ("regex", "a+")),
        ({"guided_choice": ["a", "b"]}, ("choices", '["a", "b"]')),
        ({"guided_grammar": 'root ::= "a"'}, ("grammar", 'root ::= "a"')),
        ({"structured_outputs": {"regex": "b+"}}, ("regex", "b+")),
        ({"structured_outputs": {"json": {"type": "null"}}}, ("json_schema", '{"type": "null"}')),
    ],
)
def test_constraints_reach_the_engine(serving, api, asked, constraint):
    api.completions.create(model="tiny", prompt=PROMPT, max_tokens=1, extra_body=asked)
    kind, text = constraint
    assert serving.leaders[0].of_type("add")[-1]["sampling"]["constraint"] == {
        "kind": kind,
        "text": text,
    }


def test_defaults_are_those_of_grpc(serving, api):
    api.completions.create(model="tiny", prompt=PROMPT, seed=1)
    mine = serving.leaders[0].of_type("add")[-1]
    serving.client.generate(PROMPT, seed=1)
    theirs = serving.leaders[0].of_type("add")[-1]
    assert mine.pop("request_id") != theirs.pop("request_id")
    assert mine == theirs


def test_many_at_once_with_the_async_client(serving):
    async def ask(client, seed):
        if seed % 2:
            answer = await client.completions.create(
                model="tiny", prompt=PROMPT, max_tokens=24, seed=seed
            )
            return answer.choices[0].text
        stream = await client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=24, seed=seed, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def ask_all():
        async with official_client(serving, openai.AsyncOpenAI) as client:
            return await asyncio.gather(*(ask(client, seed) for seed in range(64)))

    prompt_ids = serving.tokenizer.encode(PROMPT).ids
    for seed, text in enumerate(asyncio.run(ask_all())):
        token_ids = completion(prompt_ids, seed, VOCAB_SIZE, max_tokens=24)
        # Joined to the prompt, for the text of a token may depend on those before it.
        whole = serving.tokenizer.decode([*prompt_ids, *token_ids])
        assert whole == PROMPT + text
    assert serving.num_in_flight() == 0
