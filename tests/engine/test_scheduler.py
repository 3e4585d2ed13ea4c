"""Single situations of the scheduler, each small enough to follow by hand."""

import subprocess
import sys

import pytest

from cluster.engine.block_manager import BlockManager
from cluster.engine.plan import Logits
from cluster.engine.plan_draft import PENDING
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


def request(request_id: str, num_tokens: int, priority: int = 0, **params) -> Sequence:
    params = SamplingParams(**params)
    return Sequence(request_id, list(range(num_tokens)), params, priority=priority)


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


def test_the_urgent_are_admitted_first_and_equals_in_order_of_arrival():
    scheduler = make(max_num_seqs=1)
    for name, priority in (("a", 0), ("b", 2), ("c", 1), ("d", 2), ("e", -1)):
        scheduler.add(request(name, 3, priority=priority, max_tokens=1))
    ended = [event.request_id for event in run(scheduler)]
    assert ended == ["e", "a", "c", "b", "d"]


def test_the_urgent_take_places_and_blocks_of_the_less_urgent():
    scheduler = make(max_num_seqs=2, num_blocks=4)
    scheduler.add(request("old", 3, priority=1))
    scheduler.add(request("young", 3, priority=1))
    assert chunks(scheduler) == [(0, 0, 3), (1, 0, 3)]
    scheduler.add(request("equal", 3, priority=1))
    assert chunks(scheduler) == [(0, 3, 1), (1, 3, 1)]
    scheduler.add(request("urgent", 9, priority=0))  # a place and 3 of 4 blocks
    assert chunks(scheduler) == [(3, 0, 9)]
    assert [s.request_id for s in scheduler.waiting] == ["old", "young", "equal"]
    scheduler.abort("urgent")
    assert chunks(scheduler) == [(0, 0, 5), (1, 0, 5)]


def test_the_urgent_get_the_token_of_the_sequence_whose_place_they_take():
    scheduler = make(max_num_seqs=2, max_num_batched_tokens=2)
    scheduler.add(request("old", 1, priority=1))
    scheduler.add(request("young", 1, priority=1))
    assert chunks(scheduler) == [(0, 0, 1), (1, 0, 1)]
    scheduler.add(request("urgent", 3, priority=0))
    assert chunks(scheduler) == [(0, 1, 1), (2, 0, 1)]


def test_planned_ahead_a_preempted_sequence_takes_no_blocks():
    """The second takes the block of the third, whose turn in the same step comes after that."""
    scheduler = make(block_size=1, num_blocks=4)
    for name in ("a", "b", "c"):
        scheduler.add(request(name, 1))
    first = scheduler.schedule()
    ahead = scheduler.schedule()
    assert (list(first.seq_ids), list(ahead.seq_ids)) == ([0, 1, 2], [0, 1])
    assert [s.request_id for s in scheduler.waiting] == ["c"]
    # The token of the third is not lost: it goes on from there once there is room.
    assert [e.token_id for e in scheduler.update(first, {0: 5, 1: 6, 2: 7})] == [5, 6, 7]
    assert scheduler.waiting.first.token_ids == [0, 7]


def test_an_urgent_prompt_is_not_held_up_by_chunks_of_another():
    scheduler = make(max_num_batched_tokens=8)
    scheduler.add(request("long", 40, priority=1))
    assert chunks(scheduler) == [(0, 0, 8)]
    scheduler.add(request("urgent", 6, priority=0))
    assert chunks(scheduler) == [(1, 0, 6), (0, 8, 2)]


def test_rows_of_logits_for_prompts_that_are_asked_about():
    scheduler = make(max_num_batched_tokens=5, vocab_size=64)
    scheduler.add(request("asks", 8, prompt_logprobs=0))
    first = scheduler.schedule()
    assert [item.logits for item in first.items] == [Logits.ALL]
    assert scheduler.update(first, {}) == []
    scheduler.sequence(0).num_prompt_logprobs = 5
    assert [item.logits for item in scheduler.schedule().items] == [Logits.ALL]


def test_planned_ahead_a_plan_gets_its_tokens_and_loses_who_ended():
    eos = run_alone(range(3), 1)[0]
    scheduler = make(eos_token_ids=(eos,))
    for name, length in (("ends", 3), ("goes on", 4), ("at its length", 5)):
        scheduler.add(request(name, length, max_tokens=1 if length == 5 else 9))
    first = scheduler.schedule()
    ahead = scheduler.schedule()
    assert list(ahead.seq_ids) == [0, 1]
    assert list(ahead.token_ids) == [PENDING, PENDING]
    scheduler.update(first, {0: eos, 1: 33, 2: 34})
    plan = scheduler.complete(ahead)
    assert [(item.seq_id, item.token_ids, item.start) for item in plan.items] == [(1, (33,), 4)]
    [event] = scheduler.update(plan, {1: 35})
    assert event == TokenEvent("goes on", 35)


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
    assert [s.seq_id for s in scheduler.running] == [1]


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
