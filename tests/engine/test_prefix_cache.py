"""Blocks of equal beginnings are computed once, and never confused. On the fake model of the paged cache."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.engine.block_hash import extend, prompt_digests
from cluster.engine.block_manager import BlockManager
from cluster.engine.scheduler import Scheduler, SchedulerConfig
from cluster.engine.sequence import SamplingParams, Sequence
from tests.engine.fake_model import FakeModel, run_alone, step

BLOCK = 4


class Engine:
    """A scheduler with a prefix cache, and the fake model."""

    def __init__(self, **changes) -> None:
        values = {
            "max_num_seqs": 4,
            "max_num_batched_tokens": 64,
            "block_size": BLOCK,
            "num_blocks": 32,
            "max_model_len": 100,
            "enable_prefix_caching": True,
        }
        self.scheduler = Scheduler(SchedulerConfig(**values | changes))
        self.model = FakeModel(self.scheduler.config.num_blocks, BLOCK)
        self._names = itertools.count()

    def run(self, *prompts, max_tokens=3, **kind) -> list[tuple[int, list[int]]]:
        """(cached tokens, tokens) of each prompt, all at once."""
        sequences = [self.add(prompt, max_tokens, **kind) for prompt in prompts]
        while self.scheduler.has_work:
            step(self.scheduler, self.model)
        for prompt, sequence in zip(prompts, sequences, strict=True):
            assert sequence.token_ids[len(prompt) :] == run_alone(prompt, max_tokens)
        return [sequence.num_cached_tokens for sequence in sequences]

    def add(self, prompt, max_tokens=3, prompt_logprobs=None, **kind) -> Sequence:
        params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=prompt_logprobs)
        sequence = Sequence(f"r{next(self._names)}", prompt, params, **kind)
        self.scheduler.add(sequence)
        return sequence


def test_whole_blocks_are_found_and_the_last_token_is_always_computed():
    engine = Engine()
    assert engine.run(range(16)) == [0]
    assert engine.run(range(16)) == [12]
    assert engine.run(range(17)) == [16]
    assert engine.run([*range(11), 0, 0, 0]) == [8]
    assert engine.run([1, *range(1, 16)]) == [0]
    stats = engine.scheduler.stats()
    assert (stats["prefix_queries"], stats["prefix_hits"]) == (16 + 16 + 17 + 14 + 16, 36)
    assert stats["kv_blocks_used"] == 0
    assert stats["kv_blocks_cached"] > 4


def test_a_conversation_goes_on_from_its_completion():
    engine = Engine()
    engine.run(range(6), max_tokens=12)
    said = run_alone(range(6), 12)
    # 6 + 12 tokens, of which the last was never computed: 4 whole blocks of 17.
    assert engine.run([*range(6), *said, 1, 2, 3]) == [16]


def test_other_salts_find_nothing():
    engine = Engine()
    engine.run(range(16), cache_salt="a")
    assert engine.run(range(16)) == [0]
    assert engine.run(range(16), cache_salt="b") == [0]
    assert engine.run(range(16), cache_salt="a") == [12]


@pytest.mark.parametrize("kind", [{"prompt_logprobs": 0}, {"wants_routed_experts": True}])
def test_who_asks_of_every_token_computes_every_token_and_fills_the_cache(kind):
    engine = Engine()
    assert engine.run(range(16), **kind) == [0]
    assert engine.run(range(16), **kind) == [0]
    assert engine.run(range(16)) == [12]


def test_equal_prompts_at_once_end_up_sharing_blocks():
    """Both are computed, for neither was there; then one copy is kept."""
    engine = Engine()
    assert engine.run(range(16), range(16)) == [0, 0]
    # 16 prompt tokens and 2 of 3 emitted ones: 4 whole blocks.
    assert engine.scheduler.blocks.num_cached == 4


def test_running_sequences_share_what_they_found():
    engine = Engine()
    engine.run(range(17))
    first, second = engine.add(range(17)), engine.add(range(17))
    step(engine.scheduler, engine.model)
    assert first.block_table[:4] == second.block_table[:4]
    assert first.block_table[4] != second.block_table[4]
    assert engine.scheduler.stats()["kv_blocks_used"] == 6


def test_forgotten_blocks_are_not_found_and_running_ones_name_none():
    engine = Engine()
    engine.run(range(16))
    running = engine.add(range(20), max_tokens=20)
    step(engine.scheduler, engine.model)
    assert engine.scheduler.forget_cache() == 0  # all that there is is in use
    assert engine.run(range(20)) == [0]
    assert running.finish_reason == "length"
    # Only what ran after the flush is found: 20 tokens and 2 of its completion.
    assert engine.run([*range(20), *run_alone(range(20), 20)]) == [20]


def test_a_preempted_sequence_finds_its_own_blocks():
    engine = Engine(num_blocks=10, max_num_seqs=2)
    engine.add(range(16), max_tokens=8)
    young = engine.add(range(50, 66), max_tokens=20)
    starts = []
    while engine.scheduler.has_work:
        plan = engine.scheduler.schedule()
        starts += [i.start for i in plan.items if i.seq_id == young.seq_id]
        engine.scheduler.update(plan, engine.model.forward(plan))
    assert engine.scheduler.num_preemptions == 1
    assert young.token_ids[16:] == run_alone(range(50, 66), 20)
    # It had 5 full blocks, of which the older one took the last.
    assert starts == [0, *range(16, 20), 16, *range(21, 35)]


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=20),
    st.lists(st.integers(0, 5), min_size=1, max_size=20),
    st.sampled_from(["", "x"]),
)
def test_names_are_equal_where_all_tokens_up_to_there_are(one, other, salt):
    names = [prompt_digests([*tokens, 0], 2, s) for tokens, s in ((one, ""), (other, salt))]
    equal = sum(a == b for a, b in zip(*names, strict=False))
    common = sum(
        1 for _ in itertools.takewhile(lambda p: p[0] == p[1], zip(one, other, strict=False))
    )
    assert equal == (0 if salt else common // 2)
    in_parts: list[bytes] = []
    for num_blocks in range(len(one) // 2 + 1):
        extend(in_parts, one, 2, "", num_blocks)
    assert in_parts == names[0]


def test_a_block_is_not_forgotten_before_those_that_follow_it():
    """Four chains with a common root fill a cache of 16; it is taken back block by block."""
    blocks = BlockManager(16, 2)
    chains = [[b"root", *(bytes([c, i]) for i in range(3))] for c in range(4)]
    tables = []
    for chain in chains:
        found = blocks.find(chain)
        blocks.hold(found)
        table = found + blocks.allocate(4 - len(found))
        for idx in range(len(found), 4):
            table[idx] = blocks.name(table[idx], chain[idx])
        tables.append(table)
    for table in (tables[2], tables[0], tables[3], tables[1]):
        blocks.free(table)
    assert (blocks.num_cached, blocks.num_used) == (13, 0)
    for left in range(12, -1, -1):
        blocks.allocate(4 if left == 12 else 1)  # the first three are the free ones
        found = [len(blocks.find(chain)) for chain in chains]
        assert sum(found) - (sum(n > 0 for n in found) - 1 if any(found) else 0) == left
    with pytest.raises(RuntimeError, match="1 KV blocks wanted, 0 are available"):
        blocks.allocate(1)
