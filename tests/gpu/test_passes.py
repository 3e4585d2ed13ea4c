"""What all ranks agree on in a pass: how many rows, and with which buffers it begins; plain torch."""

from dataclasses import replace

import pytest
import torch

from cluster.model.batch import ForwardBatch
from cluster.model.cuda.graphs import ROWS, padded
from cluster.model.routing import recorded
from tests.gpu.test_model_plain import BLOCK_SIZE, load_plain, prompt
from tests.model.solo import make_batch


class FakeExchange:
    """Of three layers, say, over two buffers."""

    forms = 2

    def __init__(self):
        self.passes, self.checks = [], 0

    def expect(self, num_rows, form=0):
        self.passes.append((num_rows, form))

    def check(self):
        self.checks += 1


@pytest.fixture
def ranked(tiny_checkpoint):
    """A model that believes that it has peers."""
    return replace(load_plain(tiny_checkpoint("deepseek_v3_qlora")), exchange=FakeExchange())


def test_rows_follow_from_the_most_that_any_rank_has(ranked):
    batch = make_batch([(prompt(ranked.config, 3), 0, [0], [2])], BLOCK_SIZE)
    kv = ranked.new_cache(2, BLOCK_SIZE)
    for most in (None, 20, 512, 700):
        assert ranked.forward(batch, kv, most).shape == (1, ranked.config.vocab_size)
    assert ranked.exchange.passes == [(4, 0), (24, 1), (512, 0), (700, 1)]
    assert ranked.exchange.checks == 4
    assert [padded(n) for n in (1, 3, *ROWS[-2:], 513)] == [1, 4, *ROWS[-2:], 513]


def test_a_rank_without_tokens_takes_part(ranked):
    kv = ranked.new_cache(2, BLOCK_SIZE)
    before = [layer.keys[:, :2].clone() for layer in kv.layers]
    assert ranked.forward(ForwardBatch.empty(), kv, 9).shape == (0, ranked.config.vocab_size)
    assert ranked.forward(ForwardBatch.empty(), kv, 0).shape == (0, ranked.config.vocab_size)
    assert ranked.exchange.passes == [(16, 0)], "with nobody's tokens there is no pass"
    assert all(torch.equal(a, b.keys[:, :2]) for a, b in zip(before, kv.layers, strict=True))
    assert ranked.expert_load() == [0] * len(ranked.moe_layers)


def test_other_ranks_tokens_change_nothing(ranked):
    ids = prompt(ranked.config, 5)
    batch = make_batch([(ids, 0, [0], range(5))], BLOCK_SIZE)
    alone, among = (
        ranked.forward(batch, ranked.new_cache(2, BLOCK_SIZE), most) for most in (None, 300)
    )
    assert torch.equal(alone, among)


def test_choices_are_those_of_own_tokens(ranked):
    batch = make_batch([(prompt(ranked.config, 3), 0, [0], [2])], BLOCK_SIZE)
    with recorded(ranked.moe_layers) as choices:
        ranked.forward(batch, ranked.new_cache(2, BLOCK_SIZE), 100)
    top_k = ranked.config.gate.num_experts_per_token
    assert [[ids_TK.shape for ids_TK in chosen] for chosen in choices] == [
        [(3, top_k)] for _ in ranked.moe_layers
    ]
