"""All that a request asks of its tokens at once; and a row owes nothing to its company."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.engine.draw import FAILED, draw
from cluster.engine.sampler import Sampler
from cluster.engine.sampling_params import SamplingParams
from cluster.engine.sequence import Sequence

V = 130


def logits_of(seed: int, num_rows: int) -> torch.Tensor:
    return torch.randn(num_rows, V, generator=torch.Generator().manual_seed(seed)) * 2


def sequence(prompt=(1, 2), completion=(), **params) -> Sequence:
    made = Sequence("any", list(prompt), SamplingParams(**params))
    made.token_ids.extend(completion)
    return made


def sampled(logits_NV, rows):
    return Sampler(V, [0]).sample(logits_NV, rows)


wishes = st.fixed_dictionaries(
    {"seed": st.integers(0, 2**64 - 1)},
    optional={
        "temperature": st.sampled_from([0.0, 0.5, 1.0, 1.9]),
        "top_k": st.integers(0, 9),
        "top_p": st.sampled_from([0.3, 0.9, 1.0]),
        "min_p": st.sampled_from([0.0, 0.1]),
        "repetition_penalty": st.floats(0.5, 2),
        "presence_penalty": st.floats(-2, 2),
        "bad_words": st.just([[3], [5, 6]]),
        "logit_bias": st.dictionaries(st.integers(0, V - 1), st.floats(-9, 9), max_size=3),
        "logprobs": st.integers(0, 4),
    },
)


@settings(deadline=None)
@given(
    rows=st.lists(
        st.tuples(wishes, st.lists(st.integers(0, V - 1), max_size=6)), min_size=1, max_size=10
    ),
    seed=st.integers(0, 99),
)
def test_a_row_does_not_depend_on_its_batch(rows, seed):
    logits_NV = logits_of(seed, len(rows))
    before_NV = logits_NV.clone()

    def fresh(row):
        return sequence(completion=rows[row][1], **rows[row][0])

    together = sampled(logits_NV, [fresh(row) for row in range(len(rows))])
    alone = [sampled(logits_NV[i : i + 1], [fresh(i)])[0] for i in range(len(rows))]
    assert together == alone
    assert torch.equal(logits_NV, before_NV)
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    assert sampled(logits_NV[order], [fresh(i) for i in order]) == [together[i] for i in order]


def test_a_sequence_goes_on_the_same_after_its_state_is_lost():
    """Preempted or moved: a new object with the same tokens samples the same ones."""
    wish = {"seed": 5, "presence_penalty": 1.5, "repetition_penalty": 1.2, "bad_words": [[3, 4]]}
    sampler, steady, tokens = Sampler(V, [0]), sequence(**wish), []
    for step in range(40):
        logits_NV = logits_of(step, 1)
        (one,) = sampler.sample(logits_NV, [steady])
        (other,) = sampler.sample(logits_NV, [sequence(completion=tokens, **wish)])
        assert one == other
        tokens.append(one.token_id)
        steady.token_ids.append(one.token_id)


def test_rules_decide_before_the_filters():
    """Greedy takes the best of what is allowed; top_k counts only what is allowed."""
    logits_NV = logits_of(1, 1)
    best = logits_NV[0].argsort(descending=True).tolist()
    for params in ({"temperature": 0}, {"top_k": 1}):
        assert sampled(logits_NV, [sequence(**params)])[0].token_id == best[0]
        banned = sequence(**params, bad_words=[[best[0]]])
        assert sampled(logits_NV, [banned])[0].token_id == best[1]


def test_without_rules_the_token_is_that_of_draw():
    logits_NV = logits_of(2, 9)
    rows = [sequence(seed=seed, top_p=0.9) for seed in range(9)]
    expected = draw(logits_NV, [row.params for row in rows], [2] * 9)
    assert [s.token_id for s in sampled(logits_NV, rows)] == expected


def test_logprobs_are_the_models_own_whatever_the_rules_say():
    logits_NV = logits_of(3, 1)
    best = int(logits_NV.argmax())
    row = sequence(temperature=0, bad_words=[[best]], logprobs=2)
    (one,) = sampled(logits_NV, [row])
    expected_V = torch.log_softmax(logits_NV[0].double(), 0)
    assert one.logprob.logprob == pytest.approx(float(expected_V[one.token_id]), abs=1e-6)
    assert one.logprob.top_ids == (best, one.token_id)
    assert one.logprob.rank == 2


def test_rules_that_leave_nothing_fail_alone_and_say_so():
    logits_NV = logits_of(4, 4)
    logits_NV[2, 7] = torch.nan
    impossible = sequence(allowed_token_ids=[9], bad_words=[[9]])
    # What the model gave is no distribution, though the rules hide where it is not.
    hidden = sequence(allowed_token_ids=[9])
    rows = [sequence(seed=1), impossible, hidden, sequence(seed=2, logprobs=0)]
    first, second, third, fourth = sampled(logits_NV, rows)
    assert (second.token_id, third.token_id) == (FAILED, FAILED)
    assert "no token is left" in second.error
    assert third.error is None
    assert first == sampled(logits_NV[:1], rows[:1])[0]
    assert fourth.logprob.token_id == fourth.token_id
