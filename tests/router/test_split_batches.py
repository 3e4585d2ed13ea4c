"""Batches divided together: the same optimum as one by one, and divisions that reach it."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.forest import Forest
from router.rooted_trees import TwoCyclesError
from router.split import LayerSplit
from router.split_batches import BatchSplit
from tests.router.test_split import layer_of, path_layer, random_layer, rank_loads


def ring_layer(num_ranks, singles=1, pendant=False):
    """Hub r is on ranks r and r + 1 mod num_ranks; `pendant`: and hub 0 on one more rank."""
    rows = []
    for rank in range(num_ranks):
        first = num_ranks + rank * singles
        rows.append([rank, (rank - 1) % num_ranks, *range(first, first + singles)])
    if pendant:
        rows.append([0, num_ranks * (1 + singles), *[-1] * singles])
    experts = num_ranks * (1 + singles) + pendant
    return layer_of(list(itertools.chain(*rows)), experts, len(rows))


@st.composite
def cases(draw):
    """(layer, counts_BE): forests, rings with trees on them, and graphs with many cycles."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    kind = draw(st.sampled_from(["forest", "any", "ring", "pendant", "path"]))
    num_ranks = draw(st.integers(2 if kind != "pendant" else 3, 12))
    if kind in ("forest", "any"):
        slots = draw(st.integers(1, 4))
        spare = draw(st.integers(0, num_ranks if kind == "forest" else num_ranks * slots - 1))
        experts = max(1, num_ranks * slots - spare)
        per_node = num_ranks if num_ranks % 2 else num_ranks // 2
        layer = random_layer(rng, experts, num_ranks, slots, per_node)
    elif kind == "path":
        layer = path_layer(num_ranks, draw(st.integers(0, 2)))
    else:
        layer = ring_layer(num_ranks, draw(st.integers(0, 2)), pendant=kind == "pendant")
    high = draw(st.sampled_from([1, 3, 50, 10**6]))
    counts_BE = rng.integers(0, high, (draw(st.integers(1, 6)), layer.num_experts), endpoint=True)
    counts_BE[rng.random(counts_BE.shape) < draw(st.sampled_from([0.0, 0.5, 0.9]))] = 0
    return layer, counts_BE


@settings(max_examples=400, deadline=None)
@given(cases())
def test_optimum_is_that_of_each_batch_alone(case):
    layer, counts_BE = case
    one = LayerSplit(layer)
    assert BatchSplit(layer).optimum(counts_BE).tolist() == [one.optimum(c) for c in counts_BE]


@settings(max_examples=400, deadline=None)
@given(cases())
def test_division_has_all_tokens_and_reaches_the_optimum(case):
    layer, counts_BE = case
    slot_BS = BatchSplit(layer).divide(counts_BE)
    assert (slot_BS >= 0).all()
    slots_EC = layer.logical_to_physical
    at_copies = np.where(slots_EC >= 0, slot_BS[:, slots_EC], 0)
    assert (at_copies.sum(axis=2) == counts_BE).all()
    assert slot_BS.sum() == counts_BE.sum()  # empty slots get nothing
    rank_BR = slot_BS.reshape(len(slot_BS), layer.num_ranks, -1).sum(axis=2)
    one = LayerSplit(layer)
    assert rank_BR.max(axis=1).tolist() == [one.optimum(c) for c in counts_BE]
    for rank_R, counts_E in zip(rank_BR, counts_BE, strict=True):
        alone_R = rank_loads(layer, one.by_copy(counts_E)[None])
        assert sorted(rank_R) == sorted(alone_R)


@pytest.mark.parametrize(
    "layer", [path_layer(24, 2), ring_layer(24, 2), ring_layer(12, 1, pendant=True)]
)
def test_nearly_all_batches_are_divided_together(layer, monkeypatch):
    """One by one would be right, too, but slow. Uneven loads: parts within parts, open and closed."""
    rng = np.random.default_rng(5)
    mean_BE = rng.lognormal(5, 1, (200, layer.num_experts))
    alone = []
    by_copy = LayerSplit.by_copy
    monkeypatch.setattr(LayerSplit, "by_copy", lambda s, c: alone.append(1) or by_copy(s, c))
    BatchSplit(layer).divide(rng.poisson(mean_BE))
    assert len(alone) <= 4


def test_which_graphs_are_solved_at_once():
    assert BatchSplit(path_layer(5, 2)).at_once
    assert BatchSplit(ring_layer(5)).at_once
    assert BatchSplit(ring_layer(5, pendant=True)).at_once
    assert not BatchSplit(layer_of([0, 1, 2] * 2, 3, 2)).at_once  # three experts on both ranks
    with pytest.raises(TwoCyclesError, match="the part with rank 0 has 2 cycles"):
        Forest([0, 0, 1, 1, 2, 2], [0, 1, 0, 1, 0, 1], num_ranks=2)


@pytest.mark.parametrize("layer", [path_layer(6, 1), ring_layer(6)])
def test_loads_too_large_for_sums_of_keys(layer):
    rng = np.random.default_rng(0)
    counts_BE = rng.integers(0, 1 << 54, (3, layer.num_experts))
    split, one = BatchSplit(layer), LayerSplit(layer)
    assert split._forest is not None
    assert counts_BE.sum(axis=1).max() > split._forest.most_tokens()
    assert split.optimum(counts_BE).tolist() == [one.optimum(c) for c in counts_BE]
    most = np.zeros((1, layer.num_experts), dtype=np.int64)
    most[0, 0] = split._forest.most_tokens()
    assert split.optimum(most).tolist() == [one.optimum(most[0])]


def test_no_batches_and_no_choice():
    assert BatchSplit(ring_layer(4)).optimum(np.zeros((0, 8), dtype=np.int64)).shape == (0,)
    lonely = BatchSplit(layer_of([0, 1, 2, -1], 3, 2))
    assert lonely.optimum(np.array([[1, 2, 9], [0, 0, 0]])).tolist() == [9, 0]
    assert lonely.divide(np.array([[1, 2, 9]])).tolist() == [[1, 2, 9, 0]]
