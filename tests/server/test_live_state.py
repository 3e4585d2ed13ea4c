"""What the live page is told: counts that clients can check, and never a word of what they said."""

import asyncio
import json

import pytest

from tests.server.serving import serve

SAMPLES = 3


@pytest.fixture
def serving():
    with serve("server.http_port=0", num_replicas=2, step_s=0.02) as serving:
        yield serving


def samples(serving, count):
    async def take():
        return [await serving.observability.live.next_sample() for _ in range(count)]

    return serving.call(take())


def now(serving):
    return serving.do(serving.observability.live.now)


def test_tokens_of_all_samples_are_those_that_clients_got(serving):
    before = samples(serving, 1)  # so that nothing comes before the first
    answers = [serving.client.generate("the cat", max_tokens=n, seed=n) for n in (5, 9, 21)]
    taken = samples(serving, SAMPLES)
    assert before[0]["tokens_per_s"] == 0
    for name, wanted in (
        ("tokens_per_s", sum(answer.usage.completion_tokens for answer in answers)),
        ("prompt_tokens_per_s", sum(answer.usage.prompt_tokens for answer in answers)),
        ("ended_per_s", len(answers)),
    ):
        history = serving.do(serving.observability.live.everything)["history"]
        # A sample's rate times its length; lengths differ from a second by how busy the machine is.
        assert sum(sample[name] for sample in history) == pytest.approx(wanted, rel=0.2)
    assert taken[-1]["ttft_ms"] > 0
    assert taken[-1]["tpot_ms"] >= 0


def test_a_request_in_flight_is_shown_without_its_words(serving):
    for leader in serving.leaders:
        leader.held.set()
    stream = serving.client.generate_stream("a secret", max_tokens=7, request_id="shown")
    assert next(stream).prompt.request_id == "shown"
    (shown,) = now(serving)["requests"]
    assert (shown["id"], shown["tokens"], shown["max_tokens"]) == ("shown", 0, 7)
    assert shown["prompt_tokens"] > 0
    assert "secret" not in json.dumps(serving.do(serving.observability.live.everything))
    for leader in serving.leaders:
        leader.held.clear()
    assert sum(len(chunk.token_ids) for chunk in stream) == 7
    assert now(serving)["requests"] == []


def test_refusals_and_failures_are_counted(serving):
    live = serving.observability.live
    serving.do(serving.gateway.set_ready, False)
    with pytest.raises(Exception, match="not ready"):
        serving.client.generate("the cat")
    assert now(serving)["state"] == "not ready"
    assert sum(sample["refused_per_s"] for sample in samples(serving, 2)) > 0
    assert serving.do(live.everything)["num_replicas"] == 2


def test_what_cannot_be_sampled_once_is_sampled_again(serving, monkeypatch):
    live = serving.observability.live
    fine = live._sample
    broken = []

    def fail_once(per_s):
        if not broken:
            broken.append(per_s)
            raise RuntimeError("this once")
        return fine(per_s)

    monkeypatch.setattr(live, "_sample", fail_once)
    assert samples(serving, 1)[0]["running"] == 0
    assert broken


def test_whoever_waits_for_a_sample_is_not_held_up_by_one_who_left(serving):
    async def leave_and_stay():
        live = serving.observability.live
        leaving = asyncio.create_task(live.next_sample())
        staying = asyncio.create_task(live.next_sample())
        await asyncio.sleep(0)
        leaving.cancel()
        return await staying

    assert serving.call(leave_and_stay())["at"] > 0
