"""Drawn counts against plain loops and closed forms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulations.scoreboard.routing import PROMPT_JITTER, Routing, imbalance

UNIFORM = Routing(
    num_experts=256,
    num_slots=256,
    num_ranks=64,
    top_k=8,
    num_layers=8,
    tokens=64 * 128,
    balance="random",
)


def test_chance_alone_is_what_throwing_tokens_one_by_one_gives() -> None:
    rng = np.random.default_rng(1)
    ratios = []
    for _ in range(40):
        counts = np.bincount(rng.integers(64, size=64 * 128 * 8), minlength=64)
        ratios.append(counts.max() / counts.mean())
    drawn = imbalance(UNIFORM.draw(rng, 8), 64)
    assert drawn == pytest.approx(np.mean(ratios), rel=0.01)
    assert drawn == pytest.approx(1.074, rel=0.01)


def test_exact_balance_has_no_chance() -> None:
    tokens = replace(UNIFORM, balance="exact").draw(np.random.default_rng(1), 2)
    assert tokens.shape == (2, 8, 256)
    assert (tokens == 256).all()


@pytest.mark.parametrize("balance", ["none", "eplb", "random"])
def test_every_token_is_somewhere(balance: str) -> None:
    routing = replace(UNIFORM, balance=balance, num_slots=320)  # type: ignore[arg-type]
    tokens = routing.draw(np.random.default_rng(1), 3)
    assert tokens.shape == (3, 8, 320)
    assert (tokens.sum(axis=2) == 64 * 128 * 8).all()


def test_without_balance_the_first_experts_copies_share_their_load_evenly() -> None:
    routing = replace(UNIFORM, balance="none", num_slots=320, tokens=1_000_000)
    tokens = routing.draw(np.random.default_rng(1), 1)
    assert tokens[..., :64] == pytest.approx(tokens[..., 256:], rel=0.1, abs=100)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 1000), tokens=st.integers(1000, 100_000))
def test_eplb_never_makes_it_worse_than_no_balance(seed: int, tokens: int) -> None:
    drawn = {
        balance: imbalance(
            replace(UNIFORM, balance=balance, num_slots=320, tokens=tokens).draw(
                np.random.default_rng(seed), 2
            ),
            64,
        )
        for balance in ("none", "eplb")
    }
    assert 1 <= drawn["eplb"] < drawn["none"]


def test_prompts_scatter_as_simulating_each_of_them_says() -> None:
    """The load of one expert, chosen by an eighth of the tokens, in batches of 16 prompts."""
    rng, prompts, length, chosen = np.random.default_rng(3), 16, 100, 0.125
    jitter = rng.lognormal(-(PROMPT_JITTER**2) / 2, PROMPT_JITTER, (4000, prompts))
    plain = rng.binomial(length, chosen * jitter) / (length * chosen)
    routing = replace(
        UNIFORM,
        num_experts=64,
        num_slots=64,
        distinct_prompts=prompts,
        prompt_tokens=length,
    )
    load_LE = np.ones((8, 64))
    drawn = routing._favourites(rng, 400, load_LE)
    assert drawn.mean() == pytest.approx(1, abs=0.005)
    # Of a batch: the mean over its prompts. A binomial's chance grows a little with its jitter.
    assert drawn.std() == pytest.approx(plain.mean(axis=1).std(), rel=0.06)
