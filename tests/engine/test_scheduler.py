"""Single situations of the scheduler, each small enough to follow by hand."""

import subprocess
import sys

import pytest

from cluster.engine.block_manager import BlockManager
from cluster.engine.scheduler import Scheduler, SchedulerConfig
from cluster.engine.sequence import SamplingParams, Sequence, TokenEvent
from tests.engine.fake_model import FakeModel, run_alone, step


def make(**changes) -> Scheduler:
    values = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "block_size": 4,
        "num_blocks": 16,
        "max_model_len": 64,
        **changes,
    }
    return Scheduler(SchedulerConfig(**values))


def request(request_id: str, num_tokens: int, **params) -> Sequence:
    return Sequence(request_id, list(range(num_tokens)), SamplingParams(**params))


def run(scheduler: Scheduler) -> list[TokenEvent]:
    model = FakeModel(scheduler.config.num_blocks, scheduler.config.block_size)
    events: list[TokenEvent] = []
    while scheduler.has_work:
        events += step(scheduler, model)
    return events


def chunks(scheduler: Scheduler) -> list[tuple[int, int, int]]:
    """One step with token 1 for everybody, as (sequence, start, number of tokens)."""
    plan = scheduler.schedule()
    scheduler.update(plan, {item.seq_id: 1 for item in plan.logit_items})
    return [(item.seq_id, item.start, len(item.token_ids)) for item in plan.items]


def test_decodes_come_first_and_prompts_fill_the_budget():
    scheduler = make(max_num_batched_tokens=10)
    scheduler.add(request("a", 4))
    assert chunks(scheduler) == [(0, 0, 4)]
    scheduler.add(request("b", 12))
    scheduler.add(request("c", 3))
    assert chunks(scheduler) == [(0, 4, 1), (1, 0, 9)]
    assert chunks(scheduler) == [(0, 5, 1), (1, 9, 3), (2, 0, 3)]
    assert chunks(scheduler) == [(0, 6, 1), (1, 12, 1), (2, 3, 1)]


def test_nobody_passes_a_head_of_queue_that_does_not_fit():
    scheduler = make(num_blocks=4)
    scheduler.add(request("a", 7))  # 2 of 4 blocks
    scheduler.add(request("large", 12))  # 3 blocks, and one token of headroom
    scheduler.add(request("small", 1))
    assert chunks(scheduler) == [(0, 0, 7)]
    assert [s.request_id for s in scheduler.waiting] == ["large", "small"]


def test_preemption_takes_the_youngest_and_repeats_no_token():
    scheduler = make(num_blocks=5, max_num_seqs=3)
    for name in ("a", "b", "c"):
        scheduler.add(request(name, 3, max_tokens=8))
    events = run(scheduler)
    assert scheduler.num_preemptions > 0
    for name in ("a", "b", "c"):
        tokens = [event.token_id for event in events if event.request_id == name]
        assert tokens == run_alone(range(3), 8)
    finished = [event.request_id for event in events if event.finish_reason]
    assert finished == ["a", "b", "c"]


def test_preempted_sequence_waits_at_the_front_with_its_tokens():
    scheduler = make(num_blocks=3, max_num_seqs=2)
    scheduler.add(request("a", 4))
    scheduler.add(request("b", 3))
    scheduler.add(request("c", 1))
    assert chunks(scheduler) == [(0, 0, 4), (1, 0, 3)]
    assert chunks(scheduler) == [(0, 4, 1), (1, 3, 1)]
    assert chunks(scheduler) == [(0, 5, 1)]  # b needs a second block, and is the youngest itself
    assert [s.request_id for s in scheduler.waiting] == ["b", "c"]
    assert scheduler.waiting.first.token_ids == [0, 1, 2, 1, 1]
    expected = {
        "running": 1,
        "waiting": 2,
        "kv_usage": 2 / 3,
        "kv_blocks_used": 2,
        "preemptions": 1,
    }
    assert expected.items() <= scheduler.stats().items()


@pytest.mark.parametrize(
    ("params", "reason", "count"),
    [
        ({"max_tokens": 5}, "length", 5),
        ({"max_tokens": 1000}, "length", 64 - 3),
        ({"max_tokens": 50, "stop_token_ids": (run_alone(range(3), 4)[-1],)}, "stop", 4),
    ],
)
def test_finish_reasons(params, reason, count):
    scheduler = make()
    scheduler.add(request("a", 3, **params))
    events = run(scheduler)
    assert [event.finish_reason for event in events] == [None] * (count - 1) + [reason]
    assert [event.token_id for event in events] == run_alone(range(3), count)
    assert events[-1].stop_token_id == (events[-1].token_id if reason == "stop" else None)
    assert scheduler.blocks.num_used == 0


def test_end_of_sequence_stops_unless_ignored():
    eos = run_alone(range(3), 6)[-1]
    scheduler = make(eos_token_ids=(eos,))
    scheduler.add(request("a", 3, max_tokens=10))
    scheduler.add(request("b", 3, max_tokens=10, ignore_eos=True))
    last = {event.request_id: event for event in run(scheduler) if event.finish_reason}
    assert last["a"] == TokenEvent("a", eos, "stop", eos)
    assert last["b"].finish_reason == "length"


@pytest.mark.parametrize(
    ("changes", "num_tokens", "message"),
    [
        (
            {},
            64,
            "the prompt has 64 tokens; with one token to generate it exceeds max_model_len = 64",
        ),
        ({"num_blocks": 2}, 8, "exceeds the KV cache: 2 blocks of 4 = 8 tokens"),
        ({"vocab_size": 5}, 6, "prompt token ids must be from 0 to 4, got 5"),
    ],
)
def test_what_can_never_run_is_refused_alone(changes, num_tokens, message):
    scheduler = make(**changes)
    scheduler.add(request("good", 3, max_tokens=2))
    with pytest.raises(ValueError, match=message):
        scheduler.add(request("bad", num_tokens))
    assert [event.token_id for event in run(scheduler)] == run_alone(range(3), 2)


def test_stop_token_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"stop_token_ids\[1\] must be from 0 to 9, got 10"):
        make(vocab_size=10).add(request("a", 3, stop_token_ids=(9, 10)))


def test_outgrowing_the_cache_ends_that_request_alone_with_an_error():
    scheduler = make(num_blocks=3)
    scheduler.add(request("large", 5, max_tokens=40))
    scheduler.add(request("small", 3, max_tokens=3))
    events = run(scheduler)
    large = [event for event in events if event.request_id == "large"]
    assert [event.token_id for event in large] == run_alone(range(5), 8)
    assert large[-1].finish_reason == "error"
    assert "have 13 tokens; one more exceeds the KV cache: 3 blocks of 4 = 12" in large[-1].error
    small = [event for event in events if event.request_id == "small"]
    assert [event.token_id for event in small] == run_alone(range(3), 3)


def test_a_token_that_cannot_be_sampled_ends_that_request_alone():
    scheduler = make()
    scheduler.add(request("bad", 3))
    scheduler.add(request("good", 3))
    bad, good = scheduler.update(scheduler.schedule(), {0: -1, 1: 5})
    assert (bad.request_id, bad.token_id, bad.finish_reason) == ("bad", None, "error")
    assert "no finite logits" in bad.error
    assert good == TokenEvent("good", 5, cached_tokens=0)
    assert list(scheduler.running) == [1]


def test_request_ids_are_free_again_after_the_end():
    scheduler = make()
    scheduler.add(request("a", 3))
    with pytest.raises(ValueError, match="request id 'a' is in use"):
        scheduler.add(request("a", 3))
    assert scheduler.abort("a")
    assert not scheduler.has_work
    scheduler.add(request("a", 3))


def test_an_old_plan_is_noticed():
    scheduler = make()
    scheduler.add(request("a", 3))
    plan = scheduler.schedule()
    scheduler.update(plan, {0: 1})
    with pytest.raises(RuntimeError, match="is not the one to be updated next"):
        scheduler.update(plan, {0: 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_num_batched_tokens": 3}, "max_num_batched_tokens = 3 < max_num_seqs = 4"),
        ({"num_blocks": 0}, "num_blocks must be at least 1, got 0"),
        ({"max_model_len": 1}, "max_model_len must be at least 2, got 1"),
    ],
)
def test_config_errors_show_the_values(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize("token_ids", [[], [-1], [2**31], [1.5], ["a"], [None]])
def test_prompts_must_be_token_ids(token_ids):
    with pytest.raises(ValueError, match="prompt"):
        Sequence("a", token_ids, SamplingParams())


def test_blocks_have_one_owner():
    blocks = BlockManager(num_blocks=4, block_size=2)
    first, second = blocks.allocate(3), blocks.allocate(1)
    assert sorted([*first, *second]) == [0, 1, 2, 3]
    with pytest.raises(RuntimeError, match="1 KV blocks wanted, 0 are available"):
        blocks.allocate(1)
    blocks.free(first)
    with pytest.raises(RuntimeError, match=f"KV block {first[-1]} is freed twice"):
        blocks.free(first)
    assert (blocks.num_available, blocks.num_used) == (3, 1)


def test_planning_needs_no_torch():
    code = "import sys, cluster.engine.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
