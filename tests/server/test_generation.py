"""What clients get: the leader's tokens, their text, and the same whether streamed or not."""

import asyncio

import pytest

from cluster.server.client import AsyncClient
from cluster.server.proto.expertmesh.v1 import inference_pb2 as pb
from tests.server.serving import EOS, MAX_MODEL_LEN, VOCAB_SIZE, serve
from tests.server.stub_leader import completion

PROMPTS = ["the cat", "孔子曰：學而時習之", "def f(x):\n    return 🙂", "\u0000\n"]


@pytest.fixture(scope="module")
def serving():
    with serve(num_replicas=2) as serving:
        yield serving


def joined(chunks):
    chunks = list(chunks)
    text = "".join(chunk.text for chunk in chunks)
    return text, [i for chunk in chunks for i in chunk.token_ids], chunks


@pytest.mark.parametrize("prompt", PROMPTS)
def test_answer_is_what_the_engine_said(serving, prompt):
    response = serving.client.generate(prompt, max_tokens=40, seed=7)
    prompt_ids = serving.tokenizer.encode(prompt).ids
    expected = completion(prompt_ids, 7, VOCAB_SIZE, 40)
    assert list(response.token_ids) == expected
    assert response.text == serving.tokenizer.decode(prompt_ids + expected).removeprefix(prompt)
    assert response.finish.reason == pb.FinishInfo.LENGTH
    assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (len(prompt_ids), 40)
    assert 0 < response.usage.ttft_ms <= response.usage.total_ms


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 1},
        {"max_tokens": 60},
        {"max_tokens": 100, "stop": ["a", "e", "\ufffd"]},
        {"max_tokens": 100, "stop_token_ids": list(range(0, VOCAB_SIZE, 9))},
    ],
)
def test_streaming_equals_unary(serving, prompt, options):
    unary = serving.client.generate(prompt, seed=3, **options)
    text, token_ids, chunks = joined(serving.client.generate_stream(prompt, seed=3, **options))
    assert (text, token_ids) == (unary.text, list(unary.token_ids))
    assert chunks[0].prompt.num_tokens == unary.prompt.num_tokens
    assert not chunks[0].token_ids
    assert [chunk.HasField("finish") for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].finish == unary.finish
    assert chunks[-1].usage.completion_tokens == len(token_ids)


def test_token_ids_are_a_prompt_too(serving):
    prompt_ids = serving.tokenizer.encode("the cat").ids
    by_text = serving.client.generate("the cat", max_tokens=9, seed=1)
    by_ids = serving.client.generate(prompt_ids, max_tokens=9, seed=1)
    assert by_text.token_ids == by_ids.token_ids
    assert serving.client.tokenize("the cat") == prompt_ids


def test_stop_string_cuts_the_text_and_aborts_the_engine():
    with serve(step_s=0.002) as serving:
        whole = serving.client.generate("the cat", max_tokens=100, seed=5).text
        stop = whole[8:11]
        response = serving.client.generate("the cat", max_tokens=100, seed=5, stop=["absent", stop])
        assert response.text == whole[: whole.index(stop)]
        assert response.finish == pb.FinishInfo(reason=pb.FinishInfo.STOP, stop_string=stop)
        aborted = serving.leaders[0].wait_for("abort")
        assert aborted[-1]["request_id"] == response.prompt.request_id


def test_stop_token_is_counted_but_not_shown(serving):
    expected = completion(serving.tokenizer.encode("the cat").ids, 2, VOCAB_SIZE, 30)
    response = serving.client.generate("the cat", seed=2, stop_token_ids=[expected[4]])
    last = expected.index(expected[4])
    assert list(response.token_ids) == expected[: last + 1]
    assert response.finish.stop_token_id == expected[4]
    free = serving.client.generate("the cat", seed=2, max_tokens=last)
    assert response.text == free.text


def test_eos_ends_unless_ignored():
    every_id = range(0, VOCAB_SIZE, 4)
    with serve(eos=every_id) as serving:
        response = serving.client.generate("the cat", seed=1, max_tokens=50)
        assert response.finish.reason == pb.FinishInfo.STOP
        assert response.finish.eos_token_id == response.token_ids[-1]
        ignoring = serving.client.generate("the cat", seed=1, max_tokens=50, ignore_eos=True)
        assert ignoring.finish.reason == pb.FinishInfo.LENGTH


def test_max_tokens_default_and_clip():
    with serve("server.default_max_tokens=11") as serving:
        prompt_ids = [5] * 100
        assert len(serving.client.generate(prompt_ids).token_ids) == 11
        clipped = serving.client.generate(prompt_ids, max_tokens=10_000)
        assert len(clipped.token_ids) == clipped.prompt.max_tokens == MAX_MODEL_LEN - 100
        assert len(serving.client.generate([5] * (MAX_MODEL_LEN - 1)).token_ids) == 1


def test_seed_is_chosen_and_returned(serving):
    first, second = (serving.client.generate("the cat", max_tokens=20) for _ in range(2))
    assert first.prompt.seed != second.prompt.seed
    again = serving.client.generate("the cat", max_tokens=20, seed=first.prompt.seed)
    assert again.token_ids == first.token_ids


def test_parameters_reach_the_engine_unchanged(serving):
    response = serving.client.generate(
        "the cat",
        temperature=0.1,
        top_p=0.3,
        top_k=5,
        min_p=0.7,
        seed=2**64 - 1,
        max_tokens=2,
        stop=["zzz"],
        stop_token_ids=[EOS],
        ignore_eos=True,
        request_id="mine",
        data_parallel_rank=1,
    )
    assert (response.prompt.request_id, response.prompt.data_parallel_rank) == ("mine", 1)
    (add,) = [m for m in serving.leaders[1].of_type("add") if m["request_id"] == "mine"]
    assert add["sampling"] == {
        "temperature": 0.1,
        "top_p": 0.3,
        "top_k": 5,
        "min_p": 0.7,
        "seed": 2**64 - 1,
        "max_tokens": 2,
        "stop": ["zzz"],
        "stop_token_ids": [EOS],
        "ignore_eos": True,
    }


def test_other_leaders_are_woken():
    with serve(num_replicas=3) as serving:
        serving.client.generate("the cat", max_tokens=1, data_parallel_rank=1)
        assert serving.leaders[0].wait_for("wake")
        assert serving.leaders[2].wait_for("wake")
        assert not serving.leaders[1].of_type("wake")


def test_many_requests_at_once_do_not_mix():
    async def ask_all(address, tokenizer):
        async with AsyncClient(address) as client:
            prompts = [f"the cat number {idx} sat" for idx in range(32)]
            answers = await asyncio.gather(
                *(client.generate(p, max_tokens=60, seed=idx) for idx, p in enumerate(prompts))
            )
        return [
            list(answer.token_ids) == completion(tokenizer.encode(prompt).ids, idx, VOCAB_SIZE, 60)
            for idx, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        ], [answer.prompt.data_parallel_rank for answer in answers]

    with serve(num_replicas=2, step_s=0.002) as serving:
        equal, ranks = serving.call(ask_all(serving.address, serving.tokenizer))
        assert equal == [True] * 32
        assert (ranks.count(0), ranks.count(1)) == (16, 16)
        assert serving.num_in_flight() == 0


def test_a_model_without_tokenizer_takes_and_gives_token_ids():
    with serve(with_tokenizer=False) as serving:
        response = serving.client.generate([1, 2, 3], max_tokens=4, seed=0)
        assert list(response.token_ids) == completion([1, 2, 3], 0, VOCAB_SIZE, 4)
        assert response.text == ""
