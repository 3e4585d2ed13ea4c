"""Penalties, masks and biases are those of transformers and OpenAI, and a function of the tokens."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from cluster.engine.logit_rules import LogitRules, has_rules
from cluster.engine.sampling_params import SamplingParams

V = 40
tokens = st.lists(st.integers(0, V - 1), max_size=30)


def logits_of(seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(V) * 3).astype(np.float32)


def applied(logits_V, prompt, completion, stop_token_ids=(), **params) -> np.ndarray:
    ruled_V = logits_V.copy()
    rules = LogitRules(SamplingParams(**params), len(prompt), stop_token_ids)
    rules.apply(ruled_V, [*prompt, *completion])
    return ruled_V


def oracle(logits_V, token_ids, *processors) -> np.ndarray:
    ids = torch.tensor([token_ids], dtype=torch.int64)
    return LogitsProcessorList(processors)(ids, torch.tensor(logits_V)[None])[0].numpy()


@settings(deadline=None)
@given(st.integers(0, 99), tokens.filter(bool), tokens, st.floats(0.1, 3))
def test_repetition_penalty_is_that_of_transformers(seed, prompt, completion, penalty):
    logits_V = logits_of(seed)
    ours = applied(logits_V, prompt, completion, repetition_penalty=penalty)
    theirs = oracle(
        logits_V, [*prompt, *completion], RepetitionPenaltyLogitsProcessor(float(penalty))
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@settings(deadline=None)
@given(st.integers(0, 99), tokens, tokens, st.floats(-2, 2), st.floats(-2, 2))
def test_frequency_and_presence_follow_the_formula_of_openai(
    seed, prompt, completion, frequency, presence
):
    """logit - count * frequency - [count > 0] * presence, of the completion alone."""
    logits_V = logits_of(seed)
    ours = applied(
        logits_V, [1, *prompt], completion, frequency_penalty=frequency, presence_penalty=presence
    )
    counts_V = np.bincount(np.array(completion, np.int64), minlength=V)
    expected_V = logits_V.astype(np.float64) - counts_V * frequency - (counts_V > 0) * presence
    np.testing.assert_allclose(ours, expected_V, rtol=1e-5, atol=1e-5)


words = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), min_size=1, max_size=6)


@settings(max_examples=300, deadline=None)
@given(words, st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_bad_words_are_those_of_transformers(bad_words, completion):
    """Of few tokens, so that beginnings do occur; a word that only the prompt begins is let be."""
    logits_V = logits_of(1)
    ours = applied(logits_V, [0, 1, 2, 3], completion, bad_words=bad_words)
    theirs = oracle(logits_V, completion, NoBadWordsLogitsProcessor(bad_words, eos_token_id=V))
    np.testing.assert_array_equal(ours, theirs)


def test_a_bad_word_may_begin_in_the_prompt_but_not_in_the_completion():
    logits_V = logits_of(1)
    assert np.isfinite(applied(logits_V, [7, 8], [], bad_words=[[8, 9]])).all()
    assert np.isfinite(applied(logits_V, [7, 8], [9], bad_words=[[8, 9, 3]])).all()
    assert np.flatnonzero(np.isinf(applied(logits_V, [7], [8], bad_words=[[8, 9]]))) == [9]


@settings(deadline=None)
@given(tokens.filter(bool), tokens, st.integers(0, 30), st.sets(st.integers(0, V - 1), min_size=1))
def test_min_tokens_is_that_of_transformers(prompt, completion, min_tokens, stops):
    logits_V = logits_of(2)
    ours = applied(logits_V, prompt, completion, stops, min_tokens=min_tokens)
    processor = MinNewTokensLengthLogitsProcessor(len(prompt), min_tokens, list(stops))
    np.testing.assert_array_equal(ours, oracle(logits_V, [*prompt, *completion], processor))


def test_bias_is_that_of_transformers_and_comes_before_the_penalties():
    logits_V = logits_of(3)
    bias = {3: 5.0, 7: -100.0, 9: 0.5}
    processors = [
        SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()]),
        RepetitionPenaltyLogitsProcessor(1.7),
    ]
    ours = applied(logits_V, [3, 4], [9], logit_bias=bias, repetition_penalty=1.7)
    np.testing.assert_allclose(ours, oracle(logits_V, [3, 4, 9], *processors), rtol=1e-6)


def test_allowed_tokens_leave_no_other_and_keep_their_logits():
    logits_V = logits_of(4)
    ours = applied(logits_V, [1], [], allowed_token_ids=[5, 6, 39])
    assert np.flatnonzero(np.isfinite(ours)).tolist() == [5, 6, 39]
    np.testing.assert_array_equal(ours[[5, 6, 39]], logits_V[[5, 6, 39]])


rules = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.floats(0.5, 2),
        "frequency_penalty": st.floats(-2, 2),
        "presence_penalty": st.floats(-2, 2),
        "bad_words": words,
        "min_tokens": st.integers(0, 20),
        "logit_bias": st.dictionaries(st.integers(0, V - 1), st.floats(-100, 100), max_size=3),
        "allowed_token_ids": st.lists(st.integers(0, V - 1), max_size=10),
    },
)


@settings(deadline=None)
@given(rules, tokens.filter(bool), tokens)
def test_what_is_kept_is_a_function_of_the_tokens(params, prompt, completion):
    """Token by token, or all at once as after a preemption: the same bits."""
    logits_V = logits_of(5)
    whole = applied(logits_V, prompt, completion, [4], **params)
    steps = LogitRules(SamplingParams(**params), len(prompt), [4])
    for end in range(len(completion) + 1):
        ruled_V = logits_V.copy()
        steps.apply(ruled_V, [*prompt, *completion[:end]])
    assert ruled_V.tobytes() == whole.tobytes()


@pytest.mark.parametrize("count", [63, 64, 65, 300])
def test_any_number_of_different_tokens_is_counted(count):
    logits_V = np.zeros(400, np.float32)
    ours = applied(logits_V, [0], list(range(count)) * 2, frequency_penalty=1.0)
    np.testing.assert_array_equal(ours, np.where(np.arange(400) < count, -2.0, 0.0))


def test_defaults_are_no_rules():
    assert not has_rules(SamplingParams(logprobs=5, top_k=3, stop_token_ids=(1,)))
    assert has_rules(SamplingParams(presence_penalty=0.1))
