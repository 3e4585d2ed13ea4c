"""However a request ends, it ends: for its client with a reason, in the engine with an abort."""

import asyncio
import logging
import threading
import time

import grpc
import msgpack
import pytest

from cluster.server.client import AsyncClient, ClientError
from cluster.server.errors import RequestError
from cluster.server.proto.expertmesh.v1 import inference_pb2 as pb
from cluster.server.proto.expertmesh.v1 import inference_pb2_grpc as pb_grpc
from cluster.server.request import GenerationRequest
from tests.server.serving import VOCAB_SIZE, serve
from tests.server.stub_leader import completion

LONG = {"max_tokens": 120, "ignore_eos": True}
PROMPT = [5, 6, 7]


def wait_until(condition, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.005)


def fails(code, match, function, *args, **kwargs):
    with pytest.raises(ClientError, match=match) as caught:
        list(function(*args, **kwargs))  # a stream fails when it is read
    assert caught.value.code == code
    return caught.value


@pytest.mark.parametrize("num_read", [1, 5])
def test_leaving_a_stream_aborts_the_sequence(num_read):
    with serve(step_s=0.01) as serving:
        stream = serving.client.generate_stream(PROMPT, request_id="left", **LONG)
        for _ in range(num_read):
            next(stream)
        stream.close()
        assert serving.leaders[0].wait_for("abort") == [{"type": "abort", "request_id": "left"}]
        wait_until(lambda: serving.num_in_flight() == 0)


def test_leaving_a_unary_call_aborts_the_sequence():
    with serve() as serving, grpc.insecure_channel(serving.address) as channel:
        serving.leaders[0].held.set()
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT), request_id="left")
        call = pb_grpc.InferenceStub(channel).Generate.future(request, timeout=20)
        serving.leaders[0].wait_for("add")
        call.cancel()
        assert serving.leaders[0].wait_for("abort") == [{"type": "abort", "request_id": "left"}]
        wait_until(lambda: serving.num_in_flight() == 0)


def test_leaving_an_async_stream_aborts_the_sequence():
    async def leave(address):
        async with AsyncClient(address) as client:
            stream = client.generate_stream(PROMPT, **LONG)
            async for _ in stream:
                break
            await stream.aclose()

    with serve(step_s=0.01) as serving:
        serving.call(leave(serving.address))
        assert len(serving.leaders[0].wait_for("abort")) == 1


def test_deadline_leaves_the_queue_early():
    with serve() as serving, grpc.insecure_channel(serving.address) as channel:
        serving.leaders[0].held.set()
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT))
        with pytest.raises(grpc.RpcError) as caught:
            pb_grpc.InferenceStub(channel).Generate(request, timeout=0.3)
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert len(serving.leaders[0].wait_for("abort")) == 1
        wait_until(lambda: serving.num_in_flight() == 0)


def test_deadline_holds_without_grpc():
    async def ask(gateway):
        request = GenerationRequest(prompt=PROMPT, deadline_s=0.1)
        return [chunk async for chunk in gateway.generate(request)]

    with serve() as serving:
        serving.leaders[0].held.set()
        with pytest.raises(RequestError, match=r"DEADLINE_EXCEEDED.*0\.100 s"):
            serving.call(ask(serving.gateway))
        assert len(serving.leaders[0].wait_for("abort")) == 1


def test_silent_replica_is_named_and_avoided():
    with serve("server.replica_timeout_s=0.4", num_replicas=2) as serving:
        serving.leaders[0].silent.set()
        where = {"data_parallel_rank": 0}
        fails(
            "UNAVAILABLE",
            rf"replica 0 \({serving.leaders[0].address}\) has sent nothing .* 0\.4 s",
            serving.client.generate,
            PROMPT,
            **where,
        )
        serving.leaders[0].wait_for("abort")
        # The least loaded replica would be the first one: silence rules it out ...
        answer = serving.client.generate(PROMPT, max_tokens=2)
        assert answer.prompt.data_parallel_rank == 1
        # ... until it speaks again.
        serving.leaders[0].silent.clear()
        wait_until(lambda: not serving.gateway.replicas[0].suspect)
        assert serving.client.generate(PROMPT, max_tokens=2).prompt.data_parallel_rank == 0


def test_silence_in_the_middle_is_aborted_and_keeps_what_came():
    with serve("server.replica_timeout_s=0.4", step_s=0.01) as serving:
        got = []

        def read():
            for chunk in serving.client.generate_stream(PROMPT, seed=0, **LONG):
                got.extend(chunk.token_ids)
                if len(got) > 3:
                    serving.leaders[0].silent.set()
            return ()

        fails("ABORTED", r"replica 0 .* nothing .* tokens had been generated", read)
        assert 3 < len(got) < 120
        assert got == completion(PROMPT, 0, VOCAB_SIZE, 120)[: len(got)]


def test_request_that_a_living_replica_has_lost_does_not_hang():
    with serve("server.replica_timeout_s=0.4") as serving:
        serving.leaders[0].forgetful.set()
        fails("UNAVAILABLE", "nothing for this request", serving.client.generate, PROMPT)


def test_waiting_behind_others_is_not_silence():
    """A busy replica may take longer than the timeout to get to a request."""
    with serve("server.replica_timeout_s=0.3") as serving:
        leader = serving.leaders[0]
        leader.held.set()
        answers = []
        asking = threading.Thread(
            target=lambda: answers.append(serving.client.generate(PROMPT, max_tokens=2))
        )
        asking.start()
        leader.wait_for("add")
        time.sleep(1.0)
        leader.held.clear()
        asking.join(10)
        assert len(answers[0].token_ids) == 2


def test_failed_cluster_ends_everything_with_the_reason():
    with serve(step_s=0.01, num_replicas=2) as serving:
        streams = [serving.client.generate_stream(PROMPT, **LONG) for _ in range(4)]
        for stream in streams:
            next(stream), next(stream)
        serving.leaders[0].held.set()
        serving.leaders[1].held.set()
        fresh = serving.client.generate_stream(PROMPT, **LONG)
        next(fresh)
        serving.do(serving.gateway.fail, "rank 3 died")
        for stream in streams:
            fails("ABORTED", "rank 3 died; .* tokens had been", lambda stream=stream: stream)
        fails("UNAVAILABLE", "rank 3 died", lambda: fresh)
        fails("UNAVAILABLE", "cluster failed: rank 3 died", serving.client.generate, PROMPT)
        assert serving.num_in_flight() == 0


def test_engine_error_ends_that_request_only():
    with serve(step_s=0.01) as serving:
        serving.leaders[0].fail_prompts_with = 9
        good = serving.client.generate_stream(PROMPT, seed=0, max_tokens=40)
        next(good)
        fails("INTERNAL", "logits are NaN", serving.client.generate, [9, 1])
        assert [i for chunk in good for i in chunk.token_ids] == completion(
            PROMPT, 0, VOCAB_SIZE, 40
        )


def test_slow_reader_is_ended_alone_and_gets_what_was_kept():
    got = []

    async def read_late(gateway):
        sampling = {"max_tokens": 100, "seed": 0}
        slow = gateway.generate(GenerationRequest(prompt=PROMPT, sampling=sampling))
        await anext(slow)
        while gateway.num_in_flight:
            await asyncio.sleep(0.01)
        async for chunk in slow:
            got.extend(chunk.token_ids)

    with serve("server.max_buffered_tokens=20") as serving:
        with pytest.raises(RequestError, match=r"RESOURCE_EXHAUSTED.*max_buffered_tokens = 20"):
            serving.call(read_late(serving.gateway))
        assert got == completion(PROMPT, 0, VOCAB_SIZE, 21)
        serving.leaders[0].wait_for("abort")
        assert len(serving.client.generate(PROMPT, max_tokens=100).token_ids) == 100


def test_full_queue_says_when_to_retry():
    with serve("scheduler.max_num_queued_reqs=2", "server.retry_after_s=2.5") as serving:
        serving.leaders[0].held.set()
        streams = [serving.client.generate_stream(PROMPT) for _ in range(2)]
        for stream in streams:
            next(stream)
        error = fails(
            "RESOURCE_EXHAUSTED", "max_num_queued_reqs = 2", serving.client.generate, PROMPT
        )
        assert error.retry_after_s == 2.5
        streams[0].close()
        wait_until(lambda: serving.num_in_flight() == 1)
        serving.leaders[0].held.clear()
        assert serving.client.generate(PROMPT, max_tokens=1).token_ids


def test_request_id_is_unique_only_in_flight():
    with serve(step_s=0.01) as serving:
        stream = serving.client.generate_stream(PROMPT, request_id="same", max_tokens=60)
        next(stream)
        fails(
            "ALREADY_EXISTS",
            "'same'.*in flight",
            serving.client.generate,
            PROMPT,
            request_id="same",
        )
        assert len([i for chunk in stream for i in chunk.token_ids]) == 60
        assert serving.client.generate(PROMPT, request_id="same", max_tokens=1).token_ids


def test_replaced_replica_ends_what_it_had():
    with serve() as serving:
        serving.leaders[0].held.set()
        stream = serving.client.generate_stream(PROMPT)
        next(stream)
        serving.do(serving.gateway.attach, 0, serving.leaders[0].address)
        fails("UNAVAILABLE", "replica 0 was replaced", lambda: stream)


def frame(**changes):
    message = {"type": "step", "replica": 0, "events": [], "stats": {}} | changes
    return msgpack.packb(message)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x80\x80",
        msgpack.packb([1, 2]),
        msgpack.packb({"type": "stop"}),
        frame(replica=99),
        frame(replica=-1),
        frame(events=None),
        frame(events=[[3, 1, None, None, None]]),
        frame(events=[["same", msgpack.ExtType(5, b"x"), None, None, None]]),
        frame(stats={"kv_usage": "high"}),
        frame(stats={1: 2}),
        frame(stats=[]),
    ],
)
def test_malformed_frame_is_dropped(data, caplog):
    with serve(step_s=0.01) as serving, caplog.at_level(logging.WARNING, "cluster.server"):
        stream = serving.client.generate_stream(PROMPT, request_id="same", seed=0, max_tokens=40)
        next(stream)
        serving.leaders[0].raw_frames.append(data)
        token_ids = [i for chunk in stream for i in chunk.token_ids]
        assert token_ids == completion(PROMPT, 0, VOCAB_SIZE, 40)
        wait_until(lambda: any("dropped" in r.getMessage() for r in caplog.records))


@pytest.mark.parametrize(
    "event",
    [
        ["odd", 1],
        ["odd", -5, None, None, None],
        ["odd", True, None, None, None],
        ["odd", 1, 2, None, None],
        ["odd", 1, None, None, None, [1, float("nan"), 1, [], []], [], [], None, None],
    ],
)
def test_malformed_event_ends_its_request_only_here_and_there(event):
    """Other tokens of the same frame arrive; without its own the request would go on wrong."""
    with serve() as serving:
        serving.leaders[0].held.set()
        odd = serving.client.generate_stream(PROMPT, request_id="odd")
        good = serving.client.generate_stream(PROMPT, request_id="good")
        next(odd), next(good)
        others = [["good", 7, None, None, None], ["good", 8, "length", None, None]]
        serving.leaders[0].raw_frames.append(frame(events=[others[0], event, others[1]]))
        assert [i for chunk in good for i in chunk.token_ids] == [7, 8]
        fails("INTERNAL", "malformed", lambda: odd)
        assert [abort["request_id"] for abort in serving.leaders[0].wait_for("abort")] == ["odd"]


def test_unknown_finish_reason_ends_that_request_only():
    with serve() as serving:
        serving.leaders[0].held.set()
        stream = serving.client.generate_stream(PROMPT, request_id="odd")
        next(stream)
        serving.leaders[0].raw_frames.append(frame(events=[["odd", None, "bored", None, None]]))
        fails("INTERNAL", "bored", lambda: stream)
        serving.leaders[0].held.clear()
        assert serving.client.generate(PROMPT, max_tokens=1).token_ids


def test_events_of_another_replica_are_not_believed():
    with serve(num_replicas=2) as serving:
        serving.leaders[0].held.set()
        stream = serving.client.generate_stream(
            PROMPT, request_id="mine", seed=0, max_tokens=5, data_parallel_rank=0
        )
        next(stream)
        serving.leaders[1].raw_frames.append(
            frame(replica=1, events=[["mine", 1, "length", None, None]])
        )
        wait_until(lambda: not serving.leaders[1].raw_frames)
        time.sleep(0.1)
        serving.leaders[0].held.clear()
        token_ids = [i for chunk in stream for i in chunk.token_ids]
        assert token_ids == completion(PROMPT, 0, VOCAB_SIZE, 5)


def test_stopping_tells_the_leaders_and_ends_the_streams():
    with serve(num_replicas=2) as serving:
        serving.leaders[0].held.set()
        stream = serving.client.generate_stream(PROMPT)
        next(stream)
        serving.call(serving.gateway.stop())
        fails("UNAVAILABLE", "the server was stopped", lambda: stream)
        for leader in serving.leaders:
            assert leader.wait_for("stop") == [{"type": "stop"}]
