"""Load windows against numpy on all the batches at once, and what they promise about change."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.load import LoadWindow
from router.share_history import ShareHistory
from router.token_sample import TokenSample


def batches(num, layers=3, experts=32, tokens=4096, jitter=0.0, seed=0, load_seed=0):
    """Counts [num, layers, experts] of one lognormal load."""
    load_LE = np.random.default_rng(load_seed).lognormal(0, 1, (layers, experts))
    rng = np.random.default_rng([seed, load_seed])
    drawn = load_LE * rng.lognormal(0, jitter, (num, layers, experts))
    return rng.multinomial(tokens, drawn / drawn.sum(axis=2, keepdims=True))


def window_of(counts_BLE, **options):
    window = LoadWindow(*counts_BLE.shape[1:], **options)
    for counts_LE in counts_BLE:
        window.add(counts_LE)
    return window


@given(
    sizes=st.lists(st.integers(0, 5000), min_size=2, max_size=8),
    horizon=st.sampled_from([1.5, 4.0, 64.0, 1e12]),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_mean_and_variance_are_numpys(sizes, horizon, seed) -> None:
    """Against numpy's weighted mean and covariance of all shares at once."""
    rng = np.random.default_rng(seed)
    counts_BE = np.stack([rng.multinomial(size, np.ones(5) / 5) for size in sizes]).astype(float)
    history = ShareHistory(1, 5, horizon)
    for counts_E in counts_BE:
        history.add(counts_E[None])
    tokens_B = counts_BE.sum(axis=1)
    weight_B = tokens_B * (1 - 1 / horizon) ** np.arange(len(sizes))[::-1]
    if not weight_B.any():
        assert not history.mean_LE.any()
        return
    shares_BE = counts_BE / np.maximum(tokens_B, 1)[:, None]
    mean_E = np.average(shares_BE, axis=0, weights=weight_B)
    assert np.allclose(history.mean_LE[0], mean_E)
    assert np.allclose(history.weight_L[0], weight_B.sum())
    variance_E = np.cov(shares_BE.T, aweights=weight_B, ddof=0).diagonal()
    assert np.allclose(history.scatter_LE[0] / history.weight_L[0], variance_E)
    assert np.allclose(history.effective_L[0], weight_B.sum() ** 2 / (weight_B**2).sum())


@pytest.mark.parametrize("jitter", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("num", [3, 200])
def test_sigma_is_that_of_the_batches(jitter, num) -> None:
    """Known in closed form: multinomial variance plus that of the lognormal factors."""
    window = window_of(batches(num, 8, 128, 65536, jitter), horizon=1e9)
    load = window.estimate()
    load_LE = np.random.default_rng(0).lognormal(0, 1, (8, 128))
    mean_LE = 65536 * load_LE / load_LE.sum(axis=1, keepdims=True)
    factor = np.expm1(jitter**2) * np.exp(jitter**2)
    sigma_LE = np.sqrt(mean_LE + factor * mean_LE**2)
    assert np.median(load.sigma_LE / sigma_LE) == pytest.approx(1, abs=0.2 if num == 3 else 0.05)
    # The mean is off by the error it claims: half of normal errors are within 0.674 of theirs.
    surprise_LE = abs(load.mean_LE - mean_LE) / window.error_LE()
    assert 0.5 < np.median(surprise_LE) < 0.9


def test_batches_weigh_by_their_tokens() -> None:
    window = LoadWindow(1, 2, horizon=1e9)
    window.add(np.array([[10, 0]]))
    window.add(np.array([[0, 30]]))
    window.add(np.array([[0, 0]]))
    load = window.estimate()
    assert np.allclose(load.mean_LE, [[5, 15]])
    assert window.num_tokens == pytest.approx(40)


@pytest.mark.parametrize("jitter", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("tokens", [64, 4096])
def test_the_same_load_is_no_change(jitter, tokens) -> None:
    window = window_of(batches(150, 4, 64, tokens, jitter), horizon=32)
    assert window.num_changes == 0
    assert window.num_batches > 20


@pytest.mark.parametrize("jitter", [0.0, 0.3])
def test_another_load_replaces_the_history_at_the_second_batch(jitter) -> None:
    before, after = (batches(30, tokens=1024, jitter=jitter, load_seed=n) for n in (1, 2))
    window = window_of(before)
    window.add(after[0])
    assert window.num_changes == 0
    window.add(after[1])
    assert window.num_changes == 1
    assert np.allclose(window.estimate().mean_LE, after[:2].mean(axis=0), rtol=0.05)
    for counts_LE in after[2:]:
        window.add(counts_LE)
    assert window.num_changes == 1


def test_a_single_odd_batch_is_not_a_change() -> None:
    usual, odd = (batches(20, load_seed=n) for n in (1, 2))
    window = window_of(usual)
    for n in range(5):
        window.add(odd[n])
        window.add(usual[n])
    assert window.num_changes == 0


def test_tiny_batches_after_large_ones_are_no_change() -> None:
    """A few tokens are far from any mean, as they must be."""
    window = window_of(batches(20, tokens=65536))
    for counts_LE in batches(50, tokens=3, seed=1):
        window.add(counts_LE)
    assert window.num_changes == 0


@given(
    parts=st.lists(st.integers(0, 40), max_size=6),
    capacity=st.integers(0, 30),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_the_sample_holds_tokens_it_was_given(parts, capacity, seed) -> None:
    sample, given_rows = TokenSample(2, capacity, seed), []
    for part, size in enumerate(parts):
        rows_LMK = np.random.default_rng(part).integers(0, 30000, (2, size, 1 + part % 3))
        sample.add(rows_LMK.astype(np.int16))
        given_rows += [rows_LMK[:, token].tolist() for token in range(size)]
    kept = sample.rows_LMK
    assert kept.shape[1] == min(capacity, sum(parts)) == min(capacity, sample.num_seen)
    for token in range(kept.shape[1]):
        rows = [[e for e in layer if e >= 0] for layer in kept[:, token].tolist()]
        assert rows in given_rows
    again = TokenSample(2, capacity, seed)
    for part, size in enumerate(parts):
        rows_LMK = np.random.default_rng(part).integers(0, 30000, (2, size, 1 + part % 3))
        again.add(rows_LMK.astype(np.int16))
    assert np.array_equal(again.rows_LMK, kept)


def test_every_token_has_the_same_chance_to_be_kept() -> None:
    """Binomial: of 400 samples of 20 of 200 tokens, each token is in 40 +- 5 standard deviations."""
    seen = np.zeros(200)
    for seed in range(400):
        sample = TokenSample(1, 20, seed)
        for part in np.arange(200, dtype=np.int16).reshape(10, 1, 20, 1):
            sample.add(part)
        seen[sample.rows_LMK.ravel()] += 1
    assert abs(seen - 40).max() < 5 * np.sqrt(400 * 0.1 * 0.9)


def test_rows_go_with_the_history() -> None:
    before, after = (batches(10, 1, 32, load_seed=n) for n in (1, 2))
    window = LoadWindow(1, 32, sample_tokens=100)
    for counts_LE in before:
        window.add(counts_LE, np.full((1, 5, 2), 1))
    for counts_LE in after[:3]:
        window.add(counts_LE, np.full((1, 5, 2), 2))
    assert np.array_equal(window.estimate().rows_LMK, np.full((1, 15, 2), 2))


def test_memory_does_not_grow() -> None:
    window, sizes = LoadWindow(2, 16, sample_tokens=50), set()
    for counts_LE in batches(100, 2, 16):
        window.add(counts_LE, np.zeros((2, 30, 4), dtype=np.uint8))
        sizes.add(sum(array.nbytes for array in window.state().values()))
    assert len(sizes) <= 3  # the sample fills up with the second batch
    assert len(window._pending) <= 1


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (np.zeros((2, 9)), r"counts \[2, 9\] are not \[num_layers\(2\), num_experts\(8\)\]"),
        (np.full((2, 8), -1), "numbers >= 0"),
        (np.full((2, 8), np.nan), "numbers >= 0"),
        (np.full((2, 8), "x"), "numbers >= 0"),
        (np.full((2, 8), 1e16), "at most 1e"),
    ],
)
def test_bad_counts_are_named(counts, message) -> None:
    with pytest.raises(ValueError, match=message):
        LoadWindow(2, 8).add(counts)


@pytest.mark.parametrize("rows", [np.zeros((2, 3)), np.full((2, 1, 1), 8), np.full((2, 1, 1), -2)])
def test_bad_rows_are_named(rows) -> None:
    with pytest.raises(ValueError, match="rows"):
        LoadWindow(2, 8).add(np.ones((2, 8)), rows)


def test_an_empty_window_has_no_estimate() -> None:
    with pytest.raises(ValueError, match="empty"):
        LoadWindow(2, 8).estimate()


def test_bad_sizes_are_named() -> None:
    with pytest.raises(ValueError, match=r"num_layers\(0\)"):
        LoadWindow(0, 8)
