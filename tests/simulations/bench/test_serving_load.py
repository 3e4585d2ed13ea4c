"""What a load generator sends."""

import numpy as np
import pytest

from simulations.bench.serving_load import Load
from simulations.serving.arrivals import Lengths

VOCAB, MAX_LEN = 6144, 2048


def load(**changes) -> Load:
    fields = {
        "num_requests": 400, "concurrency": 8, "prompt": Lengths(mean=40, spread=0.4),
        "output": Lengths(mean=20),
    }  # fmt: skip
    return Load(**(fields | changes))


def test_the_same_arguments_give_the_same_requests() -> None:
    assert load().plan(VOCAB, MAX_LEN) == load().plan(VOCAB, MAX_LEN)
    assert load().plan(VOCAB, MAX_LEN) != load(seed=1).plan(VOCAB, MAX_LEN)


def test_lengths_are_as_said() -> None:
    planned = load().plan(VOCAB, MAX_LEN)
    assert np.mean([len(request.token_ids) for request in planned]) == pytest.approx(40, rel=0.05)
    assert {request.max_tokens for request in planned} == {20}
    assert {request.at_s for request in planned} == {0.0}


def test_an_open_loop_is_poisson() -> None:
    """Gaps of a Poisson process: mean 1 / rate, and a standard deviation equal to the mean."""
    planned = load(concurrency=None, rate=50.0, num_requests=4000).plan(VOCAB, MAX_LEN)
    gaps = np.diff([request.at_s for request in planned])
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.05)


def test_prompts_share_prefixes_and_nothing_else() -> None:
    planned = load(num_prefixes=3, prefix_tokens=64, num_requests=60).plan(VOCAB, MAX_LEN)
    assert len({request.token_ids[:64] for request in planned}) == 3
    assert len({request.token_ids[64:72] for request in planned}) == 60


def test_everything_fits_the_model() -> None:
    planned = load(output=Lengths(mean=90)).plan(VOCAB, 64)
    assert all(len(r.token_ids) + r.max_tokens <= 64 and r.max_tokens >= 1 for r in planned)
    assert all(min(r.token_ids) >= 0 and max(r.token_ids) < 20 for r in load().plan(20, MAX_LEN))


@pytest.mark.parametrize(
    "changes",
    [{"concurrency": None}, {"rate": 1.0}, {"concurrency": 0}, {"num_prefixes": 2}, {"rate": -1.0,
     "concurrency": None}],
)  # fmt: skip
def test_what_cannot_be_is_refused(changes) -> None:
    with pytest.raises(ValueError, match=r"concurrency|prefix|rate"):
        load(**changes).plan(VOCAB, MAX_LEN)
