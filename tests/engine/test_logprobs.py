"""Log probabilities are torch.log_softmax, ranks and the likeliest those of a stable sort."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.engine.logprobs import prompt_logprobs, token_logprobs


def logits_of(seed: int, num_rows: int, vocab_size: int, levels: int | None) -> torch.Tensor:
    """Normal logits, or of so few levels that many are equal."""
    rng = np.random.default_rng(seed)
    if levels:
        return torch.from_numpy(rng.integers(0, levels, (num_rows, vocab_size)).astype(np.float32))
    return torch.from_numpy((rng.standard_normal((num_rows, vocab_size)) * 5).astype(np.float32))


@settings(deadline=None)
@given(
    seed=st.integers(0, 999),
    vocab_size=st.sampled_from([3, 512, 1000]),
    levels=st.sampled_from([None, 1, 4]),
    k=st.lists(st.integers(0, 20), min_size=1, max_size=9),
)
def test_the_numbers_are_those_of_torch(seed, vocab_size, levels, k):
    logits_NV = logits_of(seed, len(k), vocab_size, levels)
    token_ids = np.random.default_rng(seed).integers(0, vocab_size, len(k)).tolist()
    expected_NV = torch.log_softmax(logits_NV.double(), dim=1)
    order_NV = torch.sort(logits_NV, dim=1, descending=True, stable=True).indices
    found = token_logprobs(logits_NV, token_ids, k)
    for row, (logprob, wanted) in enumerate(zip(found, k, strict=True)):
        assert logprob.token_id == token_ids[row]
        assert logprob.logprob == pytest.approx(float(expected_NV[row, token_ids[row]]), abs=1e-6)
        assert order_NV[row, logprob.rank - 1] == token_ids[row]
        top = order_NV[row, :wanted].tolist()
        assert list(logprob.top_ids) == top
        assert logprob.top_logprobs == pytest.approx(expected_NV[row, top].tolist(), abs=1e-6)


def test_a_row_does_not_depend_on_its_batch():
    logits_NV = logits_of(1, 700, 1201, None)
    ids, k = list(range(700)), [row % 6 for row in range(700)]
    together = token_logprobs(logits_NV, ids, k)
    alone = [token_logprobs(logits_NV[i : i + 1], [ids[i]], [k[i]])[0] for i in range(700)]
    assert together == alone


def test_probabilities_of_a_whole_vocabulary_add_up_to_one():
    (found,) = prompt_logprobs(logits_of(2, 1, 5000, None), [0], 5000)
    assert math.fsum(map(math.exp, found.top_logprobs)) == pytest.approx(1, abs=1e-7)


def test_impossible_tokens_and_rows_that_are_no_distribution():
    logits_NV = torch.zeros(4, 6)
    logits_NV[0, 2:] = -torch.inf
    logits_NV[1] = torch.nan
    logits_NV[2, 0] = torch.inf
    possible, nan, inf, last = prompt_logprobs(logits_NV, [3, 1, 1, 5], 3)
    assert possible.logprob == -math.inf
    assert possible.top_logprobs == pytest.approx((-math.log(2), -math.log(2), -math.inf))
    assert math.isnan(nan.logprob)
    assert math.isnan(inf.logprob)
    assert (last.rank, last.top_ids) == (6, (0, 1, 2))
