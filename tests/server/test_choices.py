"""Several completions of one prompt: each what it would be alone, all of them one request."""

import msgpack
import pytest

from cluster.server.client import ClientError
from cluster.server.proto.expertmesh.v1 import inference_pb2 as pb
from tests.server.serving import VOCAB_SIZE, serve
from tests.server.stub_leader import completion
from tests.server.test_endings import fails, wait_until

PROMPT = [5, 6, 7]


def choices_of(response):
    return [response, *response.more_choices]


@pytest.fixture(scope="module")
def serving():
    with serve(num_replicas=2) as serving:
        yield serving


@pytest.mark.parametrize("seed", [7, 2**64 - 2])
def test_choice_i_is_the_answer_to_seed_plus_i(serving, seed):
    together = serving.client.generate("the cat", n=4, seed=seed, max_tokens=30)
    assert [choice.index for choice in together.more_choices] == [1, 2, 3]
    for idx, choice in enumerate(choices_of(together)):
        alone = serving.client.generate("the cat", seed=(seed + idx) % 2**64, max_tokens=30)
        assert (choice.text, choice.token_ids) == (alone.text, alone.token_ids)
        assert choice.finish == alone.finish
    num_prompt = len(serving.tokenizer.encode("the cat").ids)
    assert together.usage.prompt_tokens == together.prompt.num_tokens == num_prompt
    assert together.usage.completion_tokens == 4 * 30


def test_streamed_choices_are_the_same(serving):
    options = {"n": 3, "seed": 1, "max_tokens": 40, "stop": ["a", "e"]}
    whole = serving.client.generate("the cat", **options)
    chunks = list(serving.client.generate_stream("the cat", **options))
    for idx, choice in enumerate(choices_of(whole)):
        mine = [chunk for chunk in chunks[1:] if chunk.index == idx]
        assert "".join(chunk.text for chunk in mine) == choice.text
        assert [i for chunk in mine for i in chunk.token_ids] == list(choice.token_ids)
        assert [chunk.HasField("finish") for chunk in mine] == [False] * (len(mine) - 1) + [True]
        assert mine[-1].finish == choice.finish
    assert [chunk.HasField("usage") for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_all_choices_go_to_one_replica_under_ids_of_their_own():
    with serve(num_replicas=2) as serving:
        for leader in serving.leaders:
            leader.held.set()
        stream = serving.client.generate_stream(PROMPT, n=3, request_id="mine")
        replica = next(stream).prompt.data_parallel_rank
        adds = serving.leaders[replica].wait_for("add", 3)
        assert [add["request_id"] for add in adds] == ["mine", "mine#1", "mine#2"]
        assert [load.in_flight for load in serving.client.loads().replicas] == [
            3 if idx == replica else 0 for idx in range(2)
        ]
        # The next one goes where fewer choices are, not fewer requests.
        other = serving.client.generate_stream(PROMPT)
        assert next(other).prompt.data_parallel_rank == 1 - replica
        stream.close()
        aborted = serving.leaders[replica].wait_for("abort", 3)
        assert [abort["request_id"] for abort in aborted] == ["mine", "mine#1", "mine#2"]
        other.close()
        wait_until(lambda: sum(x.in_flight for x in serving.client.loads().replicas) == 0)


def test_abort_finishes_every_choice_that_has_not():
    with serve(step_s=0.01) as serving:
        stop_at = completion(PROMPT, 1, VOCAB_SIZE, 3)[-1]  # ends choice 1, of seed 0 + 1
        stream = serving.client.generate_stream(
            PROMPT, n=3, seed=0, max_tokens=120, stop_token_ids=[stop_at], request_id="mine"
        )
        chunks = []
        for chunk in stream:
            chunks.append(chunk)
            if chunk.index == 1 and chunk.HasField("finish"):
                break
        assert chunks[-1].finish.stop_token_id == stop_at
        assert not chunks[-1].HasField("usage")
        assert serving.do(serving.gateway.abort, "mine")
        rest = list(stream)
        ended = {chunk.index: chunk.finish.reason for chunk in rest if chunk.HasField("finish")}
        assert ended == {0: pb.FinishInfo.ABORT, 2: pb.FinishInfo.ABORT}
        assert rest[-1].HasField("usage")
        assert [a["request_id"] for a in serving.leaders[0].wait_for("abort", 2)] == [
            "mine",
            "mine#2",
        ]


def test_a_stop_string_ends_its_choice_alone():
    with serve(step_s=0.002) as serving:
        alone = serving.client.generate("the cat", seed=1, max_tokens=100).text
        stop = alone[8:12]
        other = serving.client.generate("the cat", seed=0, max_tokens=100).text
        assert stop not in other, "chosen so that only choice 1 has it"
        response = serving.client.generate("the cat", n=2, seed=0, max_tokens=100, stop=[stop])
        assert response.text == other
        assert response.more_choices[0].text == alone[: alone.index(stop)]
        assert response.more_choices[0].finish.stop_string == stop
        (abort,) = serving.leaders[0].wait_for("abort")
        assert abort["request_id"] == f"{response.prompt.request_id}#1"


def test_one_failing_choice_fails_the_request():
    with serve() as serving:
        leader = serving.leaders[0]
        leader.held.set()
        stream = serving.client.generate_stream(PROMPT, n=3, request_id="mine")
        next(stream)
        event = ["mine#1", None, "error", None, "logits are NaN"]
        message = {"type": "step", "replica": 0, "events": [event], "stats": {}}
        leader.raw_frames.append(msgpack.packb(message))
        fails("INTERNAL", "logits are NaN", lambda: stream)
        aborted = {abort["request_id"] for abort in leader.wait_for("abort", 2)}
        assert aborted >= {"mine", "mine#2"}
        assert serving.num_in_flight() == 0
        leader.held.clear()
        assert len(choices_of(serving.client.generate(PROMPT, n=3, max_tokens=2))) == 3


def test_each_choice_takes_a_place_of_the_queue():
    with serve("scheduler.max_num_queued_reqs=4") as serving:
        serving.leaders[0].held.set()
        first = serving.client.generate_stream(PROMPT, n=3)
        next(first)
        error = fails("RESOURCE_EXHAUSTED", "n = 2", serving.client.generate, PROMPT, n=2)
        assert error.retry_after_s is not None
        second = serving.client.generate_stream(PROMPT)
        next(second)
        first.close()
        wait_until(lambda: serving.num_in_flight() == 1)
        serving.leaders[0].held.clear()
        assert len(serving.client.generate(PROMPT, n=3, max_tokens=1).more_choices) == 2
        fails("INVALID_ARGUMENT", "n = 5", serving.client.generate, PROMPT, n=5)


def test_a_choice_is_never_taken_for_another_request():
    with serve() as serving:
        serving.leaders[0].held.set()
        stream = serving.client.generate_stream(PROMPT, request_id="mine#1")
        next(stream)
        fails("ALREADY_EXISTS", "'mine'", serving.client.generate, PROMPT, n=2, request_id="mine")
        pair = serving.client.generate_stream(PROMPT, request_id="other", n=2)
        next(pair)
        fails("ALREADY_EXISTS", "'other#1'", serving.client.generate, PROMPT, request_id="other#1")
        assert not serving.do(serving.gateway.abort, "other#1")
        serving.leaders[0].held.clear()
        assert list(stream)[-1].usage.completion_tokens
        assert list(pair)[-1].usage.completion_tokens


@pytest.mark.parametrize("n", [0, 3, 2**32 - 1])
def test_number_of_choices_is_limited(n):
    allowed = rf"n = {n}: must be in \[1, .*max_choices = 2\]"
    with serve("server.max_choices=2") as serving, pytest.raises(ClientError, match=allowed):
        serving.client.generate(PROMPT, n=n)


def test_prompt_tokens_of_the_queue_are_limited():
    with serve("scheduler.max_num_queued_tokens=10") as serving:
        serving.leaders[0].held.set()
        # Alone, a request is let in whatever its length.
        streams = [serving.client.generate_stream(PROMPT * 4)]
        next(streams[0])
        error = fails(
            "RESOURCE_EXHAUSTED",
            r"12 prompt tokens in flight .* max_num_queued_tokens = 10",
            serving.client.generate,
            PROMPT,
        )
        assert error.retry_after_s is not None
        streams[0].close()
        wait_until(lambda: serving.num_in_flight() == 0)
        streams = [serving.client.generate_stream(PROMPT, n=2), serving.client.generate_stream([1])]
        for stream in streams:
            next(stream)
        fails(
            "RESOURCE_EXHAUSTED",
            "7 prompt tokens in flight and at least 6",
            serving.client.generate,
            PROMPT * 2,
        )
        serving.leaders[0].held.clear()
        for stream in streams:
            list(stream)
        assert serving.client.generate(PROMPT * 4, max_tokens=1).token_ids
