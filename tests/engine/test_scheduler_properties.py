"""The scheduler's promises, under any sequence of arrivals, aborts and steps."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from cluster.engine.plan import StepPlan
from cluster.engine.scheduler import Scheduler, SchedulerConfig
from cluster.engine.sequence import SamplingParams, Sequence
from tests.engine.fake_model import VOCAB_SIZE, FakeModel, run_alone

EOS = 7


class SchedulerMachine(RuleBasedStateMachine):
    """Runs the scheduler on a fake model; knows for each request what it must give, alone."""

    @initialize(
        max_num_seqs=st.integers(1, 6),
        spare_budget=st.integers(0, 20),
        block_size=st.sampled_from([1, 2, 4, 8]),
        num_blocks=st.integers(2, 16),
        max_model_len=st.integers(8, 64),
    )
    def start(self, max_num_seqs, spare_budget, block_size, num_blocks, max_model_len):
        self.config = SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + spare_budget,
            block_size=block_size,
            num_blocks=num_blocks,
            max_model_len=max_model_len,
            eos_token_ids=(EOS,),
        )
        self.scheduler = Scheduler(self.config)
        self.model = FakeModel(num_blocks, block_size)
        self.sequences: dict[str, Sequence] = {}
        self.emitted: dict[str, list[int]] = {}
        self.finished: dict[str, str] = {}
        self.num_requests = 0
        self.num_computed: dict[int, int] = {}
        self.bound = 0

    @property
    def capacity(self) -> int:
        return self.config.num_blocks * self.config.block_size

    @rule(
        prompt=st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=40),
        max_tokens=st.integers(1, 30),
        ignore_eos=st.booleans(),
        stop=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=2),
    )
    def add(self, prompt, max_tokens, ignore_eos, stop):
        request_id = f"r{self.num_requests}"
        self.num_requests += 1
        params = SamplingParams(
            max_tokens=max_tokens, ignore_eos=ignore_eos, stop_token_ids=tuple(stop)
        )
        sequence = Sequence(request_id, prompt, params)
        fits = len(prompt) + 1 <= min(self.capacity, self.config.max_model_len)
        if not fits:
            with pytest.raises(ValueError, match=f"the prompt has {len(prompt)} tokens"):
                self.scheduler.add(sequence)
            return
        self.scheduler.add(sequence)
        self.sequences[request_id] = sequence
        self.emitted[request_id] = []
        self.bound += len(prompt) + max_tokens

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def abort(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.sequences)))
        was_alive = request_id not in self.finished
        assert self.scheduler.abort(request_id) == was_alive
        assert not self.scheduler.abort(request_id)
        self.finished.setdefault(request_id, "abort")

    @rule(data=st.data(), abort_between=st.booleans())
    def step(self, data, abort_between):
        plan = self.schedule()
        tokens = self.model.forward(plan)
        if abort_between and plan.items:
            victim = self.scheduler.sequence(data.draw(st.sampled_from(plan.items)).seq_id)
            assert self.scheduler.abort(victim.request_id)
            self.finished[victim.request_id] = "abort"
        self.update(plan, tokens)

    @rule()
    def drain(self):
        """All requests finish, in no more steps than if each ran alone with chunks of one token."""
        steps = 0
        while self.scheduler.has_work:
            plan = self.schedule()
            assert plan.items, "a step with work but without progress"
            self.update(plan, self.model.forward(plan))
            self.no_block_is_lost_or_shared()
            steps += 1
            assert steps <= self.bound
        assert self.scheduler.blocks.num_used == 0
        assert set(self.finished) == set(self.sequences)
        self.bound = 0

    def schedule(self) -> StepPlan:
        before = dict(self.scheduler.running)
        plan = self.scheduler.schedule()
        assert plan.num_tokens <= self.config.max_num_batched_tokens
        assert len(self.scheduler.running) <= self.config.max_num_seqs
        assert len({item.seq_id for item in plan.items}) == len(plan.items)
        if self.scheduler.running:  # no starvation: the oldest request of all always advances
            oldest = min(s.seq_id for r, s in self.sequences.items() if r not in self.finished)
            assert oldest in {item.seq_id for item in plan.items}
        for seq_id in before.keys() - self.scheduler.running.keys():  # preempted
            self.num_computed[seq_id] = 0
        for item in plan.items:
            sequence = self.scheduler.sequence(item.seq_id)
            end = item.start + len(item.token_ids)
            # The chunks of one computation cover the tokens exactly once, in order.
            assert item.start == self.num_computed.get(item.seq_id, 0)
            assert list(item.token_ids) == sequence.token_ids[item.start : end]
            assert bool(item.logits) == (end == sequence.num_tokens)
            assert len(item.block_table) == -(-end // self.config.block_size)
            self.num_computed[item.seq_id] = end
        return StepPlan.decode(plan.encode())

    def update(self, plan: StepPlan, tokens: dict[int, int]) -> None:
        for event in self.scheduler.update(plan, tokens):
            assert event.request_id not in self.finished
            self.emitted[event.request_id].append(event.token_id)
            if event.finish_reason:
                self.finished[event.request_id] = event.finish_reason
                self.check_ending(event)

    def check_ending(self, event) -> None:
        sequence = self.sequences[event.request_id]
        emitted, params = self.emitted[event.request_id], sequence.params
        num_tokens = sequence.num_prompt_tokens + len(emitted)
        stops = {*params.stop_token_ids, *(() if params.ignore_eos else (EOS,))}
        assert event.finish_reason == sequence.finish_reason
        assert (event.stop_token_id is not None) == (event.finish_reason == "stop")
        match event.finish_reason:
            case "stop":
                assert event.token_id == event.stop_token_id == emitted[-1]
                assert emitted[-1] in stops
            case "length":
                full = num_tokens == self.config.max_model_len
                assert len(emitted) == params.max_tokens or full
            case "error":
                assert num_tokens == self.capacity + 1
                assert f"{self.capacity} tokens" in event.error

    @invariant()
    def tokens_are_those_of_the_request_alone(self):
        for request_id, sequence in getattr(self, "sequences", {}).items():
            params = sequence.params
            stops = {*params.stop_token_ids, *(() if params.ignore_eos else (EOS,))}
            prompt = sequence.token_ids[: sequence.num_prompt_tokens]
            expected = run_alone(prompt, params.max_tokens, tuple(stops))
            emitted = self.emitted[request_id]
            assert emitted == expected[: len(emitted)]
            if self.finished.get(request_id) in ("stop", "length"):
                room = self.config.max_model_len - sequence.num_prompt_tokens
                assert emitted == expected[:room]

    @invariant()
    def no_block_is_lost_or_shared(self):
        if not hasattr(self, "scheduler"):
            return
        live = [*self.scheduler.running.values(), *self.scheduler.waiting]
        owned = [block for sequence in live for block in sequence.block_table]
        assert len(owned) == len(set(owned))
        assert len(owned) + self.scheduler.blocks.num_available == self.config.num_blocks
        assert all(not s.block_table for s in self.scheduler.waiting)
        assert all(not s.block_table for r, s in self.sequences.items() if r in self.finished)

    @invariant()
    def order_of_arrival_is_kept(self):
        if hasattr(self, "scheduler"):
            order = [*self.scheduler.running, *(s.seq_id for s in self.scheduler.waiting)]
            assert order == sorted(order)

    def teardown(self):
        if hasattr(self, "scheduler"):
            self.drain()


SchedulerMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=30, deadline=None
)
TestScheduler = SchedulerMachine.TestCase
