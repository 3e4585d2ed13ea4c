"""What ranks counted since their start becomes what happened lately."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cluster.balance_record import (
    LOOKS_KEPT,
    ROWS_TAKEN,
    BalanceRecord,
    Look,
    balancedness,
    sampled_rows,
)


def report(routed=0, served=0, sent=0, steps=(), flip_s=0.0, rows=()):
    return {
        "routed": np.full((2, 3), routed),
        "served": [served, 2 * served],
        "rows": [np.array(rows, dtype=np.int64).reshape(-1, 2)] * 2,
        "step_seconds": list(steps),
        "bytes": {"intra_node": sent, "inter_node": 3 * sent},
        "migration": {"bytes": {"node": 1, "remote": 2, "disk": 4}, "flip_s": flip_s},
    }


def test_a_look_sums_over_ranks_what_is_the_clusters_and_keeps_apart_what_is_the_ranks():
    look = Look.of([report(5, 10, 7, [0.1, 0.3, 0.2], 0.5), report(1, 20, 8, [], 0.25)], at=1.0)
    assert look.routed_LE.tolist() == [[6, 6, 6]] * 2
    assert look.served_RL.tolist() == [[10, 20], [20, 40]]
    assert look.intra_node_bytes_R.tolist() == [7, 8]
    assert look.inter_node_bytes_R.tolist() == [21, 24]
    assert look.step_ms_R == (200.0, 0.0)
    assert (look.moved_bytes, look.stall_ms) == (14, 500.0)


def test_differences_between_looks():
    record = BalanceRecord()
    assert record.last is None
    counts = [
        record.add(Look.of([report(n * n, n, 100 * n), report()], at=10.0 + 2 * n)).tolist()
        for n in range(1, 30)
    ]
    assert counts[0] == [[1, 1, 1]] * 2, "the first look counts from the start"
    assert counts[4] == [[25 - 16] * 3] * 2
    seconds, served_RL = record.served()
    assert seconds == 2.0 * (LOOKS_KEPT - 1)
    assert served_RL.tolist() == [[LOOKS_KEPT - 1, 2 * (LOOKS_KEPT - 1)], [0, 0]]
    intra_R, inter_R = record.sent_per_s()
    assert intra_R.tolist() == pytest.approx([50, 0])
    assert inter_R.tolist() == pytest.approx([150, 0])


def test_one_look_alone_tells_of_no_time():
    record = BalanceRecord()
    record.add(Look.of([report(1, 1, 1)], at=5.0))
    assert record.served()[0] == 0.0
    assert not record.served()[1].any()
    assert record.sent_per_s()[0].tolist() == [0.0]


@given(arrays(np.int64, (4, 3), elements=st.integers(0, 1 << 40)))
def test_balancedness_is_mean_over_max_of_each_layer(served_RL):
    for layer, found in enumerate(balancedness(served_RL)):
        column = served_RL[:, layer].tolist()
        assert found == pytest.approx(sum(column) / len(column) / max(column) if any(column) else 0)


def test_rows_of_all_ranks_as_many_as_every_layer_has():
    torn = report(rows=[[0, 1], [1, 2], [2, 0]])
    torn["rows"][1] = torn["rows"][1][:2]
    rows = sampled_rows([torn, report(), report(rows=[[2, 1]])])
    assert rows.tolist() == [[[0, 1], [1, 2], [2, 1]]] * 2
    assert sampled_rows([report(), report()]) is None


@pytest.mark.parametrize("num_ranks", [1, 7, ROWS_TAKEN, 2 * ROWS_TAKEN])
def test_a_large_cluster_gives_no_more_rows_than_a_small_one(num_ranks):
    rows = sampled_rows([report(rows=[[0, 1]] * 500)] * num_ranks)
    assert num_ranks <= rows.shape[1] <= max(num_ranks, ROWS_TAKEN)
