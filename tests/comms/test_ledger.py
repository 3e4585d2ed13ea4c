"""The ledger's sums against plain addition, its bounds, and that wait times name the slow rank."""

import json
import pickle
import time
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from comms.groups import ParallelGroups
from comms.ledger import TrafficLedger
from comms.topology import Topology
from comms.where import Where

TOPOLOGY = Topology(num_nodes=2, ranks_per_node=2)
SLOW_S = 0.2
ROUNDS = 4


def test_sums_by_stage_and_by_tier() -> None:
    ledger, other = TrafficLedger(topology=TOPOLOGY), TrafficLedger(topology=TOPOLOGY)
    ledger.record("a", 0, 1, 10)
    ledger.record("a", 0, 1, 5)
    ledger.record("a", 0, 2, 100)
    ledger.record("b", 3, 0, 1000)
    ledger.record("b", 3, 3, 7)  # stays: not sent
    ledger.record("b", 3, 2, 0)
    other.record("b", 3, 0, 1)
    ledger.merge(other)
    assert ledger.num_bytes == {("a", 0, 1): 15, ("a", 0, 2): 100, ("b", 3, 0): 1001}
    assert ledger.num_messages == {("a", 0, 1): 2, ("a", 0, 2): 1, ("b", 3, 0): 2}
    assert (ledger.intra_node_bytes(), ledger.inter_node_bytes()) == (15, 1101)
    assert (ledger.intra_node_bytes("b"), ledger.inter_node_bytes("b")) == (0, 1001)
    ledger.clear()
    assert ledger.inter_node_bytes() == 0
    assert ledger.to_json()["totals"] == ledger.to_json()["steps"] == []


ranks = st.integers(0, TOPOLOGY.world_size - 1)
messages = st.lists(
    st.tuples(
        st.integers(0, 5),  # step
        st.integers(-1, 2),  # layer
        st.sampled_from(["dispatch", "combine"]),
        ranks,
        ranks,
        st.integers(0, 1 << 40),
    )
)


def record_all(sent: list[tuple[int, int, str, int, int, int]]) -> TrafficLedger:
    where = Where()
    ledger = TrafficLedger(topology=TOPOLOGY, where=where)
    for step, layer, stage, source, destination, num_bytes in sorted(sent):
        where.step, where.layer = step, layer
        ledger.record(stage, source, destination, num_bytes)
    return ledger


@given(messages)
def test_every_table_adds_up_exactly_by_its_keys(sent):
    """Layers and steps are cuts of the totals; so is a ledger per rank, merged."""
    ledger = record_all(sent)
    columns = ("step", "layer", "stage", "source", "destination")
    tables = {2: ledger.rows(), 1: ledger.layer_rows(), 0: ledger.step_rows()}
    for first, rows in tables.items():
        num_bytes: Counter[tuple[object, ...]] = Counter()
        num_messages: Counter[tuple[object, ...]] = Counter()
        for *key, size in sent:
            if size and key[3] != key[4]:
                num_bytes[tuple(key[first:])] += size
                num_messages[tuple(key[first:])] += 1
        keys = [tuple(row[name] for name in columns[first:]) for row in rows]
        assert keys == sorted(num_bytes)
        assert [row["num_bytes"] for row in rows] == [num_bytes[key] for key in keys]
        assert [row["num_messages"] for row in rows] == [num_messages[key] for key in keys]

    merged = TrafficLedger(topology=TOPOLOGY)
    for rank in range(TOPOLOGY.world_size):
        alone = record_all([message for message in sent if message[3] == rank])
        merged.merge(pickle.loads(pickle.dumps(alone)))
    assert merged.to_json() == ledger.to_json() == json.loads(json.dumps(ledger.to_json()))


def test_a_long_run_keeps_the_latest_steps_and_all_totals() -> None:
    where = Where()
    ledger = TrafficLedger(topology=TOPOLOGY, where=where, max_steps=3)
    sizes = []
    for step in range(2000):
        where.step, where.layer = step, step % 2
        ledger.record("dispatch", 0, 3, 1 + step)
        sizes.append(len(pickle.dumps(ledger)))
    assert {row["step"] for row in ledger.step_rows()} == {1997, 1998, 1999}
    assert [row["num_bytes"] for row in ledger.step_rows()] == [1998, 1999, 2000]
    assert ledger.num_bytes == {("dispatch", 0, 3): 2000 * 2001 // 2}
    assert max(sizes[1000:]) < 2 * sizes[10]

    where.step = 0  # a new epoch counts from the start: that is the latest step
    ledger.record("dispatch", 0, 3, 7)
    assert {row["step"] for row in ledger.step_rows()} == {0, 1998, 1999}


def test_merged_steps_are_the_latest_of_both() -> None:
    where = Where()
    behind = TrafficLedger(topology=TOPOLOGY, where=where, max_steps=2)
    ahead = TrafficLedger(topology=TOPOLOGY, where=where, max_steps=2)
    for ledger, steps in ((behind, (4, 5)), (ahead, (5, 6))):
        for where.step in steps:
            ledger.record("dispatch", 0, 1, 10)
    behind.merge(ahead)
    assert [(row["step"], row["num_bytes"]) for row in behind.step_rows()] == [(5, 20), (6, 10)]
    with pytest.raises(ValueError, match="max_steps must be >= 1, got 0"):
        TrafficLedger(topology=TOPOLOGY, max_steps=0)


@given(st.lists(st.floats(0, 1e3), min_size=4, max_size=4), ranks)
def test_a_wait_for_several_peers_is_counted_once(seconds, waiting):
    """Shares add up to the longest wait; who came earlier has no larger share."""
    ledger = TrafficLedger(topology=TOPOLOGY)
    ledger.record_waits("combine", waiting, (0, 1, 2, 3), seconds)
    seconds[waiting] = 0.0  # does not count
    waited = {delay.rank: delay for delay in ledger.slow_ranks()}
    assert waited[waiting].waited_s == pytest.approx(max(seconds))
    shares = [waited[rank].delayed_s for rank in range(4)]
    assert sum(shares) == pytest.approx(max(seconds))
    for one in range(4):
        for other in range(4):
            if seconds[one] <= seconds[other]:
                assert shares[one] <= shares[other] + 1e-9


def test_two_late_peers_share_what_both_were_missing() -> None:
    """2 s for rank 1 and 5 s for rank 3: the first two seconds are half each, the rest is 3's."""
    ledger = TrafficLedger(topology=TOPOLOGY)
    ledger.record_waits("dispatch", 0, (0, 1, 2, 3), (9.0, 2.0, 0.0, 5.0))
    assert [(row["source"], row["waited_s"]) for row in ledger.rows()] == [(1, 1.0), (3, 4.0)]
    assert ledger.num_bytes == {}
    ledger.record_wait("dispatch", 0, 0, 1.0)  # for itself
    assert ledger.slow_ranks()[0].blame_s == 4.0


@pytest.mark.parametrize("slow", range(6))
@pytest.mark.parametrize("layout", [(2, 3), (3, 2), (6, 1), (1, 6)])
def test_blame_goes_up_the_chain(layout, slow):
    """Rail, then node, as in a dispatch: the slow rank's rail waits for it, then each of their
    nodes waits for them. Only the first is to blame, and for its own lateness."""
    topology = Topology(num_nodes=layout[0], ranks_per_node=layout[1])
    node_of, late_s, steps = topology.node_of, 0.25, 8
    rail = topology.rail_ranks(topology.local_rank_of(slow))
    merged = TrafficLedger(topology=topology)
    for rank in range(6):
        ledger = TrafficLedger(topology=topology)
        node = topology.node_ranks(node_of(rank))
        for _ in range(steps):
            if rank in rail:
                late = [late_s if peer == slow else 0.0 for peer in rail]
                ledger.record_waits("dispatch/exchange", rank, rail, late)
            else:
                late = [late_s if peer in rail else 0.0 for peer in node]
                ledger.record_waits("dispatch/scatter", rank, node, late)
        merged.merge(ledger)
    first, *others = merged.slow_ranks()
    assert first == (slow, steps * late_s, steps * late_s, 0.0)
    assert all(delay.blame_s <= 0 for delay in others)
    assert {delay.waited_s for delay in others} == {steps * late_s}


def exchange_with_a_slow_rank(groups: ParallelGroups, slow: int) -> TrafficLedger:
    ledger = TrafficLedger(topology=groups.topology)
    for _ in range(ROUNDS):
        if groups.rank == slow:
            time.sleep(SLOW_S)
        for stage, group in (("exchange", groups.rail), ("scatter", groups.node)):
            parts = [torch.zeros(8, dtype=torch.uint8)] * group.size
            pending = group.start_exchange([parts], stage)
            pending.wait()
            ledger.record_waits(stage, groups.rank, group.ranks, pending.waits)
    return ledger


@pytest.mark.parametrize("slow", [0, 3])
@pytest.mark.parametrize("backend", ["tcp", "gloo"])
def test_real_ranks_name_the_one_that_sleeps(rank_pool, backend, slow):
    """It is late on its rail and in its node, and makes its rail late in the other node."""
    merged = TrafficLedger(topology=TOPOLOGY)
    for ledger in rank_pool.run(
        exchange_with_a_slow_rank, TOPOLOGY, slow, inter_node_backend=backend
    ):
        merged.merge(ledger)
    first, *others = merged.slow_ranks()
    assert first.rank == slow
    assert first.delayed_s > 0.5 * ROUNDS * SLOW_S
    assert all(delay.waited_s > 0.5 * ROUNDS * SLOW_S for delay in others)
    assert all(delay.blame_s < 0.5 * first.blame_s for delay in others)
