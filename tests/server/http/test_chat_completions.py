"""Chats: templates and presets by way of the official client."""

import openai
import pytest

from cluster.server.chat.presets import BUILT_IN

MESSAGES = [{"role": "user", "content": "the cat"}]
ASKED = {"model": "tiny", "messages": MESSAGES, "max_tokens": 16, "seed": 5}
RENDERED = "User: the cat\n\nAssistant:"


def expected(serving, prompt=RENDERED, seed=5):
    return serving.client.generate(prompt, max_tokens=16, seed=seed, stop=["\nUser:"])


def test_message(serving, api):
    answer = api.chat.completions.create(**ASKED)
    choice = answer.choices[0]
    assert choice.message.content == expected(serving).text
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert answer.object == "chat.completion"
    assert answer.usage.completion_tokens == 16
    assert answer.usage.prompt_tokens == len(serving.tokenizer.encode(RENDERED).ids)


def test_stream(serving, api):
    options = {"include_usage": True}
    chunks = list(api.chat.completions.create(stream=True, n=2, stream_options=options, **ASKED))
    *chunks, last = chunks
    for index in range(2):
        mine = [c.choices[0] for c in chunks if c.choices[0].index == index]
        assert mine[0].delta.role == "assistant"
        text = "".join(choice.delta.content or "" for choice in mine)
        assert text == expected(serving, seed=5 + index).text
        assert [choice.finish_reason for choice in mine if choice.finish_reason] == ["length"]
    assert (last.choices, last.usage.completion_tokens) == ([], 32)


def test_the_clients_own_accumulator(serving, api):
    """`chat.completions.stream` of the client puts the events together, and would object to odd ones."""
    text = expected(serving).text
    stop = next(char for char in text[3:] if char.isascii())
    with api.chat.completions.stream(**ASKED, logprobs=True, stop=stop) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content == text[: text.index(stop)]
    assert len(final.choices[0].logprobs.content) > 2


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_join_to_the_bytes_of_the_text(serving, api, stream):
    answer = api.chat.completions.create(logprobs=True, top_logprobs=2, stream=stream, **ASKED)
    parts = [p.choices[0].logprobs for p in (answer if stream else [answer])]
    entries = [entry for part in parts if part for entry in part.content]
    whole = expected(serving)
    joined = b"".join(bytes(entry.bytes) for entry in entries)
    assert joined.decode(errors="replace") == serving.tokenizer.decode(list(whole.token_ids))
    assert [entry.logprob for entry in entries] == [-i / 8 for i in whole.token_ids]
    assert [[top.logprob for top in entry.top_logprobs] for entry in entries] == [
        [0, -1 / 8]
    ] * len(entries)


def test_presets_are_models(serving, api):
    prompt = f"{BUILT_IN['translator'].system}\n\n{RENDERED}"
    asked = ASKED | {"messages": MESSAGES}
    serving.leaders[0].received.clear()
    with pytest.raises(openai.BadRequestError, match="the prompt has"):
        api.chat.completions.create(**asked | {"model": "tiny:translator"})
    # The stub model is short; what would have been the prompt is told by /tokenize.
    body = {"messages": MESSAGES, "model": "tiny:translator"}
    answer = api.post("/../tokenize", body=body, cast_to=dict[str, object])
    assert answer["tokens"] == serving.tokenizer.encode(prompt).ids


def test_presets_set_what_the_request_leaves_open(serving, api):
    system = [{"role": "system", "content": "x"}, *MESSAGES]
    for more, temperature in (({}, 0.2), ({"temperature": 0.75}, 0.75)):
        asked = {"model": "tiny:math-tutor", "messages": system, "max_tokens": 1, **more}
        answer = api.chat.completions.create(**asked)
        sent = serving.leaders[0].of_type("add")[-1]["sampling"]
        assert (sent["temperature"], sent["top_p"]) == (temperature, 0.95)
        assert answer.model == "tiny:math-tutor"
    asked = {"model": "tiny", "messages": system, "max_tokens": 1}
    api.chat.completions.create(**asked, extra_body={"preset": "math-tutor"})
    assert serving.leaders[0].of_type("add")[-1]["sampling"]["temperature"] == 0.2


def test_parts_of_text_and_earlier_answers(serving, api):
    earlier = api.chat.completions.create(**ASKED).choices[0].message
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]
    messages = [{"role": "user", "content": parts}, earlier, *MESSAGES]
    answer = api.chat.completions.create(**ASKED | {"messages": messages})
    prompt = f"User: the cat\n\nAssistant: {earlier.content}\n\n{RENDERED}"
    assert answer.choices[0].message.content == expected(serving, prompt).text


def test_max_completion_tokens(serving, api):
    answer = api.chat.completions.create(
        model="tiny", messages=MESSAGES, max_completion_tokens=3, seed=1
    )
    assert answer.usage.completion_tokens == 3


def test_what_a_template_is_given(serving, api):
    body = {"messages": MESSAGES, "add_generation_prompt": False}
    answer = api.post("/../tokenize", body=body, cast_to=dict[str, object])
    assert answer["tokens"] == serving.tokenizer.encode("User: the cat\n\n").ids


@pytest.mark.parametrize(
    ("more", "param", "words"),
    [
        ({"messages": []}, "messages", "must be one message"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages", "role 'robot' is not"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "text"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 99}, "logprobs", "at most 20|from 0 to 20"),
        ({"tools": [{"type": "function"}]}, "tools", "tools"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "needs a schema"),
        ({"extra_body": {"preset": "poet"}}, None, "preset 'poet' is not known"),
        ({"extra_body": {"chat_template_kwargs": {"messages": 1}}}, None, "not the client's"),
    ],
)
def test_refusals(api, more, param, words):
    with pytest.raises(openai.APIStatusError, match=words) as caught:
        api.chat.completions.create(**ASKED | more)
    assert caught.value.status_code in (400, 404)
    assert caught.value.param == param


def test_models(api):
    models = {model.id: model for model in api.models.list()}
    assert models.keys() == {"tiny", *(f"tiny:{preset}" for preset in BUILT_IN)}
    assert models["tiny"].max_model_len == 128
    assert api.models.retrieve("tiny:translator").parent == "tiny"
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("tiny:poet")
