"""What comes with tokens (log probabilities, experts, cache hits) stays with them up to the client."""

import struct

import msgpack
import pytest

from cluster.server.errors import Code, RequestError
from cluster.server.request import GenerationRequest
from tests.server.serving import VOCAB_SIZE, serve
from tests.server.stub_leader import (
    BLOCK,
    NUM_CHOSEN,
    NUM_LAYERS,
    QUEUE_MS,
    completion,
    logprob_of,
)
from tests.server.test_endings import fails, wait_until

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13]


@pytest.fixture(scope="module")
def serving():
    with serve() as serving:
        yield serving


def plain(logprobs):
    return [
        (p.token_id, p.logprob, p.rank, tuple(p.top_ids), tuple(p.top_logprobs)) for p in logprobs
    ]


def joined(chunks, field, index=0):
    return [one for chunk in chunks if chunk.index == index for one in getattr(chunk, field)]


@pytest.mark.parametrize("num_top", [0, 3])
def test_every_token_has_its_log_probability(serving, num_top):
    options = {"seed": 1, "max_tokens": 30, "logprobs": num_top}
    whole = serving.client.generate(PROMPT, **options)
    assert plain(whole.logprobs) == [logprob_of(i, num_top) for i in whole.token_ids]
    for chunk in serving.client.generate_stream(PROMPT, **options):
        assert plain(chunk.logprobs) == [logprob_of(i, num_top) for i in chunk.token_ids]
    assert not serving.client.generate(PROMPT, seed=1, max_tokens=3).logprobs


def test_they_stay_aligned_with_tokens_whose_text_is_held_back_or_cut():
    with serve(step_s=0.002) as serving:
        text = serving.client.generate("the cat", seed=5, max_tokens=100).text
        # The first stop string holds text back until it turns out not to come.
        options = {
            "seed": 5,
            "max_tokens": 100,
            "logprobs": 1,
            "stop": [text[3:6] + "!", text[9:12]],
        }
        chunks = list(serving.client.generate_stream("the cat", **options))
        assert chunks[-1].finish.stop_string == text[9:12]
        assert "".join(chunk.text for chunk in chunks) == text[: text.index(text[9:12])]
        for chunk in chunks:
            assert plain(chunk.logprobs) == [logprob_of(i, 1) for i in chunk.token_ids]
        assert joined(chunks, "token_ids")


def test_prompt_log_probabilities_come_once(serving):
    expected = [logprob_of(i, 2) for i in PROMPT[1:]]
    options = {"max_tokens": 4, "prompt_logprobs": 2, "n": 2}
    whole = serving.client.generate(PROMPT, **options)
    assert plain(whole.prompt_logprobs) == expected
    chunks = list(serving.client.generate_stream(PROMPT, **options))
    assert plain(joined(chunks, "prompt_logprobs")) == expected
    assert not joined(chunks, "prompt_logprobs", index=1)


def test_log_probabilities_are_limited():
    with serve("server.max_logprobs=2") as serving:
        for name in ("logprobs", "prompt_logprobs"):
            fails("INVALID_ARGUMENT", f"{name} must be from 0 to 2", serving.client.generate,
                  PROMPT, **{name: 3})  # fmt: skip


def test_routed_experts_cover_every_token_that_was_computed(serving):
    options = {"seed": 1, "max_tokens": 6, "return_routed_experts": True, "n": 2}
    whole = serving.client.generate(PROMPT, **options)
    streamed = list(serving.client.generate_stream(PROMPT, **options))
    for index, choice in enumerate((whole, *whole.more_choices)):
        experts = []
        for one in choice.routed_experts:
            assert one.start == len(experts) // (NUM_LAYERS * NUM_CHOSEN)
            assert (one.num_layers, one.experts_per_token) == (NUM_LAYERS, NUM_CHOSEN)
            experts += struct.unpack(f"<{len(one.ids) // 2}H", one.ids)
        computed = [*PROMPT, *choice.token_ids[:-1]]
        assert experts == [i for i in computed for _ in range(NUM_LAYERS * NUM_CHOSEN)]
        assert joined(streamed, "routed_experts", index) == list(choice.routed_experts)


def test_usage_tells_of_the_cache_and_the_queue():
    with serve() as serving:
        cached = [
            serving.client.generate(PROMPT, max_tokens=1, **options).usage.cached_tokens
            for options in ({}, {}, {"cache_salt": "mine"}, {"cache_salt": "mine"})
        ]
        assert cached == [0, len(PROMPT) // BLOCK * BLOCK, 0, len(PROMPT) // BLOCK * BLOCK]
        serving.client.flush_cache()
        # Of the first choice: the second finds what the first has just put there.
        usage = serving.client.generate(PROMPT, max_tokens=1, n=2).usage
        assert usage.cached_tokens == 0
        assert QUEUE_MS <= usage.queue_ms <= usage.ttft_ms + QUEUE_MS


def test_the_stop_string_is_shown_on_request(serving):
    whole = serving.client.generate("the cat", seed=5, max_tokens=100).text
    stop = whole[8:11]
    for options in ({}, {"include_stop_string": True}):
        answer = serving.client.generate("the cat", seed=5, max_tokens=100, stop=[stop], **options)
        assert answer.finish.stop_string == stop
        assert answer.text == whole[: whole.index(stop)] + (stop if options else "")


def test_what_the_first_min_tokens_say_is_no_stop_string(serving):
    prompt_ids = serving.tokenizer.encode("the cat").ids
    token_ids = completion(prompt_ids, 5, VOCAB_SIZE, 100)
    free = serving.client.generate("the cat", seed=5, max_tokens=100)
    stop = free.text[2]
    first = serving.client.generate("the cat", seed=5, max_tokens=100, stop=[stop])
    late = serving.client.generate("the cat", seed=5, max_tokens=100, stop=[stop], min_tokens=40)
    assert first.text == free.text[: free.text.index(stop)]
    assert len(late.token_ids) >= 40
    assert late.text.startswith(first.text + stop)
    assert list(late.token_ids) == token_ids[: len(late.token_ids)]


def test_bad_words_need_a_tokenizer_and_some_letters(serving):
    fails("INVALID_ARGUMENT", r"bad_words\[1\]", serving.client.generate, PROMPT,
          bad_words=["a", "  "])  # fmt: skip
    with serve("server.max_bad_words=1", with_tokenizer=False) as other:
        fails("FAILED_PRECONDITION", "no tokenizer", other.client.generate, PROMPT, bad_words=["a"])
        fails("INVALID_ARGUMENT", "at most 1", other.client.generate, PROMPT, bad_words=["a", "b"])


def test_a_constraint_is_tried_before_the_engine_sees_it():
    async def check(constraint):
        if constraint.text == "(":
            raise RequestError(Code.INVALID_ARGUMENT, f"{constraint.kind}: unclosed")

    with serve(check_constraint=check) as serving:
        fails("INVALID_ARGUMENT", "regex: unclosed", serving.client.generate, PROMPT, regex="(")
        assert not serving.leaders[0].of_type("add")
        assert serving.num_in_flight() == 0
        assert serving.client.generate(PROMPT, regex="a", max_tokens=1).token_ids


def test_chats_need_a_template(serving):
    messages = [{"role": "user", "content": "hello"}]
    fails("FAILED_PRECONDITION", r"chat\.template", serving.client.generate, messages)
    with serve("chat.template=plain") as other:
        fails("INVALID_ARGUMENT", "role 'tree'", other.client.generate,
              [{"role": "tree", "content": "hello"}])  # fmt: skip
        fails("NOT_FOUND", "preset 'none'", other.client.generate, messages, preset="none")
        assert other.num_in_flight() == 0
        answer = other.client.generate(messages, max_tokens=2)
        assert answer.prompt.text == "User: hello\n\nAssistant:"


def test_a_late_word_of_an_aborted_request_is_not_taken_for_its_successor():
    """A client tries again at once, with the same id, when the engine has just made another token."""
    with serve() as serving:
        leader = serving.leaders[0]
        leader.held.set()
        options = {"request_id": "same", "n": 2, "seed": 7, "max_tokens": 3}
        first = serving.client.generate_stream(PROMPT, **options)
        next(first)
        first.close()
        wait_until(lambda: serving.num_in_flight() == 0)
        second = serving.client.generate_stream(PROMPT, **options)
        assert next(second).prompt.request_id == "same"
        late = [[name, 1, None, None, None] for name in ("same", "same#1")]
        leader.raw_frames.append(
            msgpack.packb({"type": "step", "replica": 0, "events": late, "stats": {}})
        )
        wait_until(lambda: not leader.raw_frames)
        leader.held.clear()
        chunks = list(second)
        for index in range(2):
            expected = completion(PROMPT, 7 + index, VOCAB_SIZE, 3)
            assert joined(chunks, "token_ids", index) == expected


def test_an_expired_deadline_is_refused_at_once(serving):
    async def ask():
        request = GenerationRequest(prompt=PROMPT, deadline_s=0.0)
        return [chunk async for chunk in serving.gateway.generate(request)]

    num_adds = len(serving.leaders[0].of_type("add"))
    with pytest.raises(RequestError, match=r"DEADLINE_EXCEEDED.*passed on arrival"):
        serving.call(ask())
    assert len(serving.leaders[0].of_type("add")) == num_adds
