"""The scheduler's promises, under any sequence of arrivals, aborts, flushes and steps.

Each run is with or without a prefix cache, priorities, and planning ahead. The model computes what the
plans say in a simulated paged cache, so whatever is shared wrongly changes tokens.
"""

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
from cluster.engine.plan_draft import PENDING
from cluster.engine.scheduler import Scheduler, SchedulerConfig
from cluster.engine.sequence import SamplingParams, Sequence
from tests.engine.fake_model import VOCAB_SIZE, FakeModel, run_alone

EOS = 7
PROMPTS = st.one_of(
    st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=40),
    # Many with a common beginning.
    st.builds(
        lambda shared, own: [*range(shared), *own],
        st.integers(0, 30),
        st.lists(st.integers(0, 1), min_size=1, max_size=6),
    ),
)


class SchedulerMachine(RuleBasedStateMachine):
    """Runs the scheduler on a fake model; knows for each request what it must give, alone."""

    @initialize(
        max_num_seqs=st.integers(1, 6),
        spare_budget=st.integers(0, 20),
        block_size=st.sampled_from([1, 2, 4, 8]),
        num_blocks=st.integers(2, 16),
        max_model_len=st.integers(8, 64),
        caching=st.booleans(),
        ahead=st.booleans(),
        num_priorities=st.integers(1, 3),
    )
    def start(
        self,
        max_num_seqs,
        spare_budget,
        block_size,
        num_blocks,
        max_model_len,
        caching,
        ahead,
        num_priorities,
    ):
        self.config = SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + spare_budget,
            block_size=block_size,
            num_blocks=num_blocks,
            max_model_len=max_model_len,
            eos_token_ids=(EOS,),
            enable_prefix_caching=caching,
        )
        self.ahead, self.num_priorities = ahead, num_priorities
        self.scheduler = Scheduler(self.config)
        self.model = FakeModel(num_blocks, block_size)
        self.in_flight: tuple[StepPlan, dict[int, int]] | None = None
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
        prompt=PROMPTS,
        max_tokens=st.integers(1, 30),
        ignore_eos=st.booleans(),
        stop=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=2),
        priority=st.integers(0, 2),
        salt=st.sampled_from(["", "", "other"]),
        asks_of_prompt=st.sampled_from([None, None, 3]),
    )
    def add(self, prompt, max_tokens, ignore_eos, stop, priority, salt, asks_of_prompt):
        request_id = f"r{self.num_requests}"
        self.num_requests += 1
        params = SamplingParams(
            max_tokens=max_tokens,
            ignore_eos=ignore_eos,
            stop_token_ids=tuple(stop),
            prompt_logprobs=asks_of_prompt,
        )
        sequence = Sequence(
            request_id,
            prompt,
            params,
            priority=priority % self.num_priorities,
            cache_salt=salt,
        )
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

    @rule()
    def flush(self):
        self.scheduler.forget_cache()
        assert self.scheduler.blocks.num_cached == 0

    @rule(data=st.data(), abort_between=st.booleans())
    def step(self, data, abort_between):
        plan = self.schedule()
        self.collect()
        if self.ahead:
            plan = self.scheduler.complete(plan)
        self.check_tokens(plan)
        tokens = self.model.forward(StepPlan.decode(plan.encode()))
        if abort_between and plan.items:
            victim = self.scheduler.sequence(data.draw(st.sampled_from(plan.items)).seq_id)
            assert self.scheduler.abort(victim.request_id)
            self.finished[victim.request_id] = "abort"
        self.in_flight = (plan, tokens) if plan.items else None
        if not self.ahead:
            self.collect()

    def collect(self) -> None:
        """Only then the scheduler learns of the tokens that the model computed meanwhile."""
        if self.in_flight is not None:
            (plan, tokens), self.in_flight = self.in_flight, None
            self.update(plan, tokens)

    @precondition(lambda self: self.in_flight is None and self.scheduler.has_work)
    @rule()
    def lose_a_step(self):
        """Planned, but never computed: nothing of it is missing afterwards."""
        plan = self.schedule()
        self.scheduler.take_back(plan)
        self.num_computed |= {item.seq_id: item.start for item in plan.items}

    @rule()
    def drain(self):
        """All requests finish, in no more steps than if each ran alone with chunks of one token."""
        steps = 0
        while self.scheduler.has_work or self.in_flight:
            plan = self.schedule()
            progress = bool(plan.items) or self.in_flight is not None
            assert progress, "a step with work but without progress"
            self.collect()
            if self.ahead:
                plan = self.scheduler.complete(plan)
            tokens = self.model.forward(plan)
            self.in_flight = (plan, tokens) if plan.items else None
            if not self.ahead:
                self.collect()
            self.every_block_is_used_cached_or_free()
            steps += 1
            # Ahead a sequence that was preempted comes back a step later, and the end is a step more.
            assert steps <= (2 * self.bound + 1 if self.ahead else self.bound)
        assert self.scheduler.blocks.num_used == 0
        assert set(self.finished) == set(self.sequences)
        self.bound = 0

    def schedule(self) -> StepPlan:
        before = {s.seq_id for s in self.scheduler.running}
        first = self.most_urgent()
        plan = self.scheduler.schedule()
        assert plan.num_tokens <= self.config.max_num_batched_tokens
        assert len(self.scheduler.running) <= self.config.max_num_seqs
        assert len({item.seq_id for item in plan.items}) == len(plan.items)
        if first is not None and not self.in_flight:  # no starvation: it always advances
            assert first.seq_id in plan.seq_ids
        for seq_id in before - {s.seq_id for s in self.scheduler.running}:  # preempted
            self.num_computed.pop(seq_id, None)
        for item in plan.items:
            sequence = self.scheduler.sequence(item.seq_id)
            end = item.start + len(item.token_ids)
            # The chunks of one computation cover the tokens exactly once, in order; what is not
            # computed at all is whole blocks of the beginning, and never the last token.
            if item.seq_id not in self.num_computed:
                assert item.start % self.config.block_size == 0
                assert item.start < sequence.num_tokens
                assert item.start == 0 or self.config.enable_prefix_caching
                assert item.start == 0 or sequence.params.prompt_logprobs is None
            else:
                assert item.start == self.num_computed[item.seq_id]
            assert bool(item.logits) >= (end >= sequence.num_tokens)
            assert len(item.block_table) == -(-end // self.config.block_size)
            self.num_computed[item.seq_id] = end
        return plan

    def most_urgent(self) -> Sequence | None:
        live = [s for r, s in self.sequences.items() if r not in self.finished]
        return min(live, key=lambda s: (s.priority, s.seq_id), default=None)

    def check_tokens(self, plan: StepPlan) -> None:
        assert PENDING not in plan.token_ids
        for item in plan.items:
            sequence = self.scheduler.sequence(item.seq_id)
            end = item.start + len(item.token_ids)
            assert list(item.token_ids) == sequence.token_ids[item.start : end]

    def update(self, plan: StepPlan, tokens: dict[int, int]) -> None:
        for event in self.scheduler.update(plan, tokens):
            assert event.request_id not in self.finished
            assert (event.cached_tokens is None) == bool(self.emitted[event.request_id])
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
    def every_block_is_used_cached_or_free(self):
        if not hasattr(self, "scheduler"):
            return
        blocks, total = self.scheduler.blocks, self.config.num_blocks
        holders = [0] * total
        for sequence in self.scheduler.running:
            assert len(set(sequence.block_table)) == len(sequence.block_table)
            for block in sequence.block_table:
                holders[block] += 1
        assert list(blocks.holders()) == holders
        assert blocks.num_used == total - holders.count(0)
        assert blocks.num_available - blocks.num_cached >= 0
        assert blocks.num_used + blocks.num_available == total
        if not self.config.enable_prefix_caching:
            assert max(holders) <= 1
            assert blocks.num_cached == 0
        assert all(not s.block_table for s in self.scheduler.waiting)
        assert all(not s.block_table for r, s in self.sequences.items() if r in self.finished)

    @invariant()
    def equals_keep_their_order(self):
        """Nobody waits while one of equal priority that came later runs."""
        if hasattr(self, "scheduler"):
            for waiting in self.scheduler.waiting:
                for running in self.scheduler.running:
                    assert running.urgency < waiting.urgency or waiting.priority < running.priority

    def teardown(self):
        if hasattr(self, "scheduler"):
            self.drain()


SchedulerMachine.TestCase.settings = settings(
    max_examples=200, stateful_step_count=30, deadline=None
)
TestScheduler = SchedulerMachine.TestCase
