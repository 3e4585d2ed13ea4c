"""Sampled tokens follow the closed-form distribution, the filters are those of transformers, and a
token depends on its logits, parameters, seed and position alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cluster.engine.draw import FAILED, draw, filtered_weights, pick
from cluster.engine.sampling_params import SamplingParams


def logits_of(seed: int, *shape: int, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def weights_of(logits_V: np.ndarray, params: SamplingParams) -> np.ndarray:
    weights_NV = torch.as_tensor(logits_V)[None].clone().numpy()
    filtered_weights(weights_NV, weights_NV.max(axis=1), [params])
    return weights_NV[0]


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_frequencies_follow_softmax(temperature):
    num, vocab_size = 40_000, 32
    logits_V = logits_of(1, vocab_size, scale=1.0)
    params = SamplingParams(temperature=temperature, seed=99)
    tokens = []
    for start in range(0, num, 4000):
        positions = range(start, start + 4000)
        tokens += draw(logits_V.expand(4000, -1), [params] * 4000, positions)
    counts = np.bincount(tokens, minlength=vocab_size)
    expected = torch.softmax(logits_V.double() / temperature, 0).numpy()
    assert chi_square(counts, expected) < 70.0  # p = 8e-5 at 31 degrees of freedom


def test_frequencies_over_seeds_in_a_vocabulary_of_many_chunks():
    """Rare and frequent tokens in different chunks: both levels of the search are right."""
    vocab_size, num = 1300, 20_000
    logits_V = torch.full((vocab_size,), -12.0)
    some = torch.tensor([0, 3, 511, 512, 513, 1023, 1024, 1299])
    logits_V[some] = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, 1.5, -2.0, 1.0])
    params = [SamplingParams(seed=seed) for seed in range(num)]
    tokens = np.array(draw(logits_V.expand(num, -1), params, [17] * num))
    expected = torch.softmax(logits_V.double(), 0)
    counts = np.array([(tokens == token).sum() for token in some.tolist()])
    rest = num - counts.sum()
    probabilities = np.append(expected[some].numpy(), 1 - expected[some].sum())
    assert chi_square(np.append(counts, rest), probabilities) < 32.0  # p = 1e-4 at 8


def oracle_weights(logits_V: torch.Tensor, params: SamplingParams) -> np.ndarray:
    """transformers' processors in the order in which generate() applies them."""
    processors = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    return torch.softmax(processors(None, logits_V[None].double())[0], 0).numpy()


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocab_size=st.integers(2, 3000),
    scale=st.sampled_from([0.01, 1.0, 3.0, 10.0]),
    temperature=st.floats(0.1, 3),
    top_k=st.integers(0, 200),
    top_p=st.floats(0.01, 1),
    min_p=st.just(0.0) | st.floats(0, 1),
)
def test_filters_are_those_of_transformers(
    seed, vocab_size, scale, temperature, top_k, top_p, min_p
):
    logits_V = logits_of(seed, vocab_size, scale=scale)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    weights_V = weights_of(logits_V, params)
    ours = weights_V.astype(np.float64) / weights_V.sum(dtype=np.float64)
    theirs = oracle_weights(logits_V, params)
    ours[ours < 1e-36] = 0  # beyond fp32: nobody will ever see such a token
    theirs[theirs < 1e-36] = 0
    differ = np.flatnonzero((ours > 0) != (theirs > 0))
    if len(differ):
        # fp32 against fp64 may move a cut by one token: allowed only where the cut is that close.
        loose, tight = (
            oracle_weights(
                logits_V,
                SamplingParams(
                    temperature=temperature,
                    top_k=top_k,
                    top_p=min(1.0, top_p * (1 + sign * 2e-6)),
                    min_p=min(1.0, min_p * (1 - sign * 2e-6)),
                ),
            )
            for sign in (1, -1)
        )
        assert ((ours > 0) <= (loose > 0)).all()
        assert ((ours > 0) >= (tight > 0)).all()
    else:
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-36)


def test_filters_on_numbers_worked_out_by_hand():
    logits_V = np.log(np.array([0.1, 0.4, 0.2, 0.25, 0.05], np.float32))

    def kept(**params):
        return np.flatnonzero(weights_of(logits_V, SamplingParams(**params))).tolist()

    assert kept() == [0, 1, 2, 3, 4]
    assert kept(top_k=2) == [1, 3]
    assert kept(top_p=0.6) == [1, 3]
    assert kept(top_p=0.7) == [1, 2, 3]
    assert kept(top_p=0.01) == [1]
    assert kept(min_p=0.5 - 1e-3) == [1, 2, 3]
    assert kept(min_p=1.0) == [1]
    # top-p goes by what top-k left: 0.4 / 0.65 reaches 0.6 alone.
    assert kept(top_k=2, top_p=0.6) == [1]
    # ... and not by what min-p will leave: 0.4 + 0.25 + 0.2 = 0.85 of the whole.
    assert kept(top_p=0.8, min_p=0.6) == [1, 3]


def test_ties_all_stay_at_top_k_and_lower_ids_first_at_top_p():
    logits_V = np.zeros(10, np.float32)
    for params, expected in [
        (SamplingParams(top_k=3), list(range(10))),
        (SamplingParams(top_p=0.35), [0, 1, 2, 3]),
    ]:
        assert np.flatnonzero(weights_of(logits_V, params)).tolist() == expected


mixed_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 5, 50]),
    top_p=st.sampled_from([0.2, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 2**64 - 1),
)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.tuples(mixed_params, st.integers(0, 2**40)), min_size=1, max_size=12),
    order_seed=st.integers(0, 1000),
    vocab_size=st.sampled_from([7, 512, 1001]),
)
def test_a_row_does_not_depend_on_its_batch(rows, order_seed, vocab_size):
    params, positions = zip(*rows, strict=True)
    logits_NV = logits_of(order_seed, len(rows), vocab_size)
    together = draw(logits_NV, params, positions)
    alone = [draw(logits_NV[i : i + 1], [params[i]], [positions[i]])[0] for i in range(len(rows))]
    assert together == alone
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(order_seed)).tolist()
    shuffled = draw(logits_NV[order], [params[i] for i in order], [positions[i] for i in order])
    assert shuffled == [together[i] for i in order]


def test_weights_have_the_same_bits_at_every_memory_alignment():
    logits_V = logits_of(3, 1001)
    params = SamplingParams(temperature=0.7, top_p=0.95)
    expected = weights_of(logits_V, params)
    for offset in range(1, 17):
        shifted_NV = np.empty(1001 + offset, np.float32)[None, offset:]
        shifted_NV[0] = logits_V
        filtered_weights(shifted_NV, shifted_NV.max(axis=1), [params])
        assert shifted_NV.tobytes() == expected.tobytes()


def test_seed_and_position_decide():
    logits_V = torch.zeros(100_000)
    draws = {
        draw(logits_V[None], [SamplingParams(seed=seed)], [position])[0]
        for seed in (1, 2, 3)
        for position in (0, 1, 2)
    }
    assert len(draws) == 9
    assert draw(logits_V[None], [SamplingParams(seed=1)], [0]) == draw(
        logits_V[None], [SamplingParams(seed=1)], [0]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_takes_the_highest_and_the_lowest_id_on_ties(dtype):
    logits_NV = logits_of(5, 4, 1000).to(dtype)
    logits_NV[0, [900, 17, 400]] = 50.0
    logits_NV[1] = 0.0
    logits_NV[2, 5:] = -torch.inf
    greedy = SamplingParams(temperature=0, top_k=3, top_p=0.5, min_p=0.3)
    tokens = draw(logits_NV, [greedy] * 4, range(4))
    expected = [int(np.argmax(row)) for row in logits_NV.float().numpy()]
    assert tokens == expected
    assert tokens[:2] == [17, 0]


def test_tiny_temperatures_approach_greedy_without_overflow():
    logits_NV = logits_of(6, 3, 100, scale=1000.0)
    expected = logits_NV.argmax(1).tolist()
    for temperature in (1e-300, 1e-6, 1.1e-5, 1e-3):
        assert draw(logits_NV, [SamplingParams(temperature=temperature)] * 3, range(3)) == expected


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0),
        SamplingParams(),
        SamplingParams(top_k=5, top_p=0.7, min_p=0.1, temperature=0.3),
    ],
)
def test_a_row_without_finite_logits_fails_alone(params):
    logits_NV = logits_of(7, 6, 600)
    clean = draw(logits_NV, [params] * 6, range(6))
    logits_NV[1, 599] = torch.nan
    logits_NV[2] = -torch.inf
    logits_NV[3, 0] = torch.inf
    logits_NV[4] = torch.nan
    tokens = draw(logits_NV, [params] * 6, range(6))
    assert tokens == [clean[0], FAILED, FAILED, FAILED, FAILED, clean[5]]


def test_impossible_tokens_are_never_drawn():
    logits_NV = torch.full((200, 1030), -torch.inf)
    logits_NV[:, [513, 1029]] = 0.0
    tokens = draw(logits_NV, [SamplingParams(seed=s) for s in range(200)], [3] * 200)
    assert set(tokens) == {513, 1029}


@pytest.mark.parametrize("first", [0, 511, 512, 1500])
def test_the_ends_of_the_unit_interval_pick_the_first_and_last_possible_token(first):
    weights_V = np.zeros(3000, np.float32)
    weights_V[[first, first + 1, 2048]] = [1 / 3, 1e-20, 0.1]
    numbers = np.array([0.0, 1 - 2.0**-53])
    assert pick(np.stack([weights_V] * 2), numbers).tolist() == [first, 2048]


def test_empty_batch_and_wrong_lengths():
    assert draw(torch.zeros(0, 10), [], []) == []
    with pytest.raises(ValueError, match="2 rows of logits, 1 params, 2 positions"):
        draw(torch.zeros(2, 10), [SamplingParams()], [0, 1])
