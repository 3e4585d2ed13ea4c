"""The load generator against a real gRPC server whose leaders follow a known rule."""

import pytest

from cluster.server.client import ClientError
from simulations.bench.load_process import LoadProcess
from simulations.bench.serving_load import Load
from simulations.bench.serving_outcomes import Slo, summary
from simulations.serving.arrivals import Lengths
from tests.server.serving import MAX_MODEL_LEN, VOCAB_SIZE, serve
from tests.server.stub_leader import completion


def load(**changes) -> Load:
    fields = {
        "num_requests": 24, "concurrency": 6, "prompt": Lengths(mean=12, spread=0.5),
        "output": Lengths(mean=9, spread=0.5), "keep_tokens": 24,
    }  # fmt: skip
    return Load(**(fields | changes))


def test_every_request_is_sent_once_and_answered_in_full() -> None:
    for changes in ({}, {"concurrency": None, "rate": 200.0}):
        sends = load(**changes)
        with serve(num_replicas=2) as serving, LoadProcess(serving.address) as generator:
            sent = generator.run(sends)
        planned = sends.plan(VOCAB_SIZE, MAX_MODEL_LEN)
        assert sorted(outcome.idx for outcome in sent.outcomes) == list(range(24))
        for outcome in sent.outcomes:
            asked = planned[outcome.idx]
            expected = completion(asked.token_ids, asked.seed, VOCAB_SIZE, asked.max_tokens)
            assert outcome.token_ids == expected
            assert outcome.num_ends == 1
            assert 0 < outcome.ttft_s <= outcome.end_s
        assert not sent.interrupted


def test_users_of_a_closed_loop_are_as_many_as_said() -> None:
    with serve(step_s=0.01) as serving, LoadProcess(serving.address) as generator:
        sent = generator.run(load())
    sent_at = sorted(outcome.sent_s for outcome in sent.outcomes)
    ended_at = sorted(outcome.sent_s + outcome.end_s for outcome in sent.outcomes)
    assert all(began >= ended for began, ended in zip(sent_at[6:], ended_at, strict=False))


def test_refusals_are_told_from_failures() -> None:
    with serve("scheduler.max_num_queued_reqs=2") as serving:
        serving.leaders[0].held.set()
        with LoadProcess(serving.address) as generator:
            sent = generator.run(
                load(concurrency=None, rate=500.0), serve_after(serving.leaders[0])
            )
    figures = summary(sent.outcomes, sent.seconds, Slo())
    assert figures["requests"] == {"ok": 2, "rejected": 22, "failed": 0}
    assert figures["errors"] == {"RESOURCE_EXHAUSTED": 22}


def serve_after(leader):
    """Progress comes when all 24 have been sent: a quarter of a second later."""
    return lambda progress: leader.held.clear() if progress.num_ended == 22 else None


def test_ctrl_c_keeps_what_there_is() -> None:
    with serve("scheduler.max_num_queued_reqs=10") as serving:
        with LoadProcess(serving.address) as generator:
            serving.leaders[0].held.set()
            sent = generator.run(load(), interrupt)
            assert sent.interrupted
            assert {outcome.code for outcome in sent.outcomes} == {"CANCELLED"}
            serving.leaders[0].held.clear()
            assert all(outcome.ok for outcome in generator.run(load()).outcomes)
        assert serving.num_in_flight() == 0


def interrupt(progress) -> None:
    if progress.num_sent == 6 and not interrupted:
        interrupted.append(progress)
        raise KeyboardInterrupt


interrupted: list = []


def test_nobody_there_is_said() -> None:
    with pytest.raises(ClientError, match="UNAVAILABLE"):
        LoadProcess("127.0.0.1:1")


def test_a_thousand_streams_at_once() -> None:
    """All are open together, since no leader gives tokens before the last has come."""
    sends = load(
        num_requests=1000, concurrency=1000, prompt=Lengths(mean=5), output=Lengths(mean=4),
        keep_tokens=1000,
    )  # fmt: skip
    seen = []

    def release_when_all_wait(progress) -> None:
        seen.append(serving.num_in_flight())
        if seen[-1] == 1000:
            for leader in serving.leaders:
                leader.held.clear()

    with serve("scheduler.max_num_queued_reqs=1000", num_replicas=2) as serving:
        for leader in serving.leaders:
            leader.held.set()
        with LoadProcess(serving.address) as generator:
            sent = generator.run(sends, release_when_all_wait)
        planned = sends.plan(VOCAB_SIZE, MAX_MODEL_LEN)
        for outcome in sent.outcomes:
            asked = planned[outcome.idx]
            expected = completion(asked.token_ids, asked.seed, VOCAB_SIZE, asked.max_tokens)
            assert outcome.token_ids == expected
        assert max(seen) == 1000
        assert serving.num_in_flight() == 0
        loads = [leader.of_type("add") for leader in serving.leaders]
    assert [len(adds) for adds in loads] == [500, 500]
