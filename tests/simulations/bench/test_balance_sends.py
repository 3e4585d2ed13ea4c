"""The measurement of sends: on routing with known best placements, and on files that do not fit."""

import numpy as np
import pytest

from router.placement import Placement
from simulations.bench import balance_sends
from simulations.bench.balance_sends import Served, batches, sends, serve


def trace(path, **arrays):
    np.savez(path, **arrays)
    return path


def topical(seed, num_tokens, per_topic=16):
    """One layer, six of the 64 experts per token, all of one of four topics."""
    rng = np.random.default_rng(seed)
    named = rng.permutation(64).reshape(4, per_topic)
    rows = [rng.choice(named[token % 4], 6, replace=False) for token in range(num_tokens)]
    return np.array(rows, dtype=np.uint8)[:, None]


def test_topics_cost_less_than_a_node_each_and_ranks_stay_even(tmp_path):
    """A topic fits a node: 3/4 of tokens travel, once; evening out the ranks makes it some more."""
    file = trace(tmp_path / "t.npz", one=topical(1, 4096), two=topical(2, 4200))
    told = []
    report = sends(file, told.append)
    assert told == ["sends: one, layer 0", "sends: two, layer 0"]
    assert report["naive"] == 4.5
    assert 0.7 < report["per_token"] < 1.1 < 2 < report["eplb"]
    assert 1 <= report["bound"] <= report["imbalance"] <= 1.05
    assert report["imbalance"] <= report["worst_layer"]
    for key in ("per_token", "imbalance"):
        tasks = [task[key] for task in report["tasks"].values()]
        assert report[key] == pytest.approx(sum(tasks) / 2)


def test_what_is_served_is_not_what_was_planned_for(tmp_path):
    """Other topics in the second half: placed together is then no better than by chance."""
    changed = np.concatenate([topical(1, 2048), topical(2, 2048)])
    report = sends(trace(tmp_path / "t.npz", x=changed), lambda text: None)
    assert report["per_token"] > 1.3


def test_served_counts_nodes_once_and_pairs_all():
    """Two nodes of one rank, expert 0 here and 1 there: by hand."""
    layer = Placement(
        physical_to_logical=np.array([[0, 1]]), num_experts=2, num_ranks=2, ranks_per_node=1
    ).layer(0)
    ids = [np.array([[0, 1], [0, 0]]), np.array([[0, 0], [1, 1]])]
    # Rank 0: one token visits node 1. Rank 1: one visits node 0. Slot 0 has 5 pairs, slot 1 three.
    assert serve(layer, lambda ids_R: ids_R, ids) == Served(per_token=2 / 4, imbalance=5 / 4)


def test_batches_are_whole_and_give_every_rank_as_many_tokens():
    ids_TK = np.arange(2500)[:, None]
    found = list(batches(ids_TK))
    assert len(found) == 2
    for number, ranks in enumerate(found):
        assert {len(rank) for rank in ranks} == {balance_sends.BATCH_TOKENS // 16}
        start = number * balance_sends.BATCH_TOKENS
        assert sorted(np.concatenate(ranks).ravel()) == list(range(start, start + 1024))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((100, 1, 6), dtype=np.uint8), "array 'x' has 100 tokens .* needs 2048 tokens"),
        (np.full((2048, 1, 6), 64, dtype=np.uint8), "expert ids up to 64; .* ids below 64"),
    ],
)
def test_traces_that_do_not_fit_are_refused(tmp_path, array, message):
    with pytest.raises(ValueError, match=message):
        sends(trace(tmp_path / "t.npz", x=array), lambda text: None)
