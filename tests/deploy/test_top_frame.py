"""One frame of `expertmesh top`, from messages: what it says, and that it fits any terminal."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.text import Text

from cluster.server.proto.expertmesh.v1 import control_pb2 as pb
from deploy.top.frame import Snapshot, frame_lines
from tests.deploy.fake_control import balance, loads, server_info

STATUS = Text("12:00:00")
EVENTS = pb.RebalanceStats(
    started=3,
    finished=1,
    abandoned=1,
    bytes=3 * 2**30,
    stall_ms=0.25,
    running=True,
    doing="layer 12 (10 of 58), experts to move: 7",
    last_reason="1.21 above the threshold 1.05\nin 31 layers",
    last_error="rank 5 has not prepared layer 12 within 30 s; " * 3,
)


def snapshot(served_RL, ranks_per_node=2, num_replicas=2, **fields):
    nodes = -(-len(served_RL) // ranks_per_node)
    return Snapshot(
        "127.0.0.1:50051",
        server_info(nodes, ranks_per_node),
        balance(served_RL, ranks_per_node, **fields),
        loads(num_replicas),
    )


def shown(state, width=80, height=24, **options):
    lines = [line.plain for line in frame_lines(state, STATUS, width, height, **options)]
    assert len(lines) <= height
    assert all(cell_len(line) <= width for line in lines), lines
    return lines


def line_of(lines, label):
    (found,) = [line for line in lines if line.split()[:1] == [label]]
    return found.split()


def test_small_cluster_shows_every_figure():
    served_RL = np.array([[10, 40], [10, 20], [10, 10], [10, 10]]) * 1000
    lines = shown(snapshot(served_RL))
    assert line_of(lines, "r0") == ["r0", "1.00", "2.00", "3.00", "0.50", "8.25"]
    assert line_of(lines, "r3") == ["r3", "1.00", "0.50", "3.00", "0.50", "8.25"]
    assert line_of(lines, "served") == ["served", "1.00", "0.50"]
    assert line_of(lines, "plan") == ["plan", "0.98", "0.98"]
    assert "mean 0.750  p50 0.750  min 0.500 (layer 2)  planned 0.980" in lines[1]
    assert line_of(lines, "1")[:5] == ["1", "4", "1", "5", "████████░░░░░░░░"]
    assert lines[-1] == "12:00:00"


def test_events_are_told():
    text = "\n".join(shown(snapshot(np.ones((2, 2)), rebalances=EVENTS, enabled_reason="on: x")))
    assert "3 started, 1 finished, 1 abandoned; 3.0 GiB moved, stall 0.2 ms" in text
    assert "now: layer 12 (10 of 58), experts to move: 7" in text
    assert "last reason: 1.21 above the threshold 1.05 in 31 layers" in text
    assert "last error: rank 5 has not prepared layer 12 within 30 s;" in text
    assert "automatic: on: x" in text


def test_512_ranks_of_58_layers_fit_and_the_hot_one_shows():
    served_RL = np.full((512, 58), 100)
    served_RL[333, 40] = 300  # node 41
    state = snapshot(served_RL, 8, 64, first_layer=3, rebalances=EVENTS, enabled_reason="on")
    lines = shown(state)
    rows = [line for line in lines if line.startswith("n") and "▄" in line]
    assert 4 <= len(rows) <= 8
    assert [len(line.split()[1]) for line in rows] == [58] * len(rows)
    hot = [(line.split()[0], line.split()[1].index("█")) for line in rows if "█" in line]
    ((label, column),) = hot
    first, last = (int(node) for node in label[1:].split("-"))
    assert first <= 41 <= last
    assert column == 40
    assert line_of(lines, "served")[1] == "=" * 40 + "3" + "=" * 17
    assert any(line.split()[:1] == ["0-21"] for line in lines)
    assert lines[-1] == "12:00:00"


def test_columns_of_several_layers_show_the_least_even_of_them():
    served_RL = np.full((2, 100), 100)
    served_RL[0, 71] = 300
    lines = shown(snapshot(served_RL))
    columns = line_of(lines, "r0")[1]
    assert columns == "▄" * 35 + "▆" + "▄" * 14
    assert line_of(lines, "served")[1] == "=" * 35 + "6" + "=" * 14


sizes = st.tuples(
    st.integers(0, 70), st.integers(0, 70), st.integers(0, 20), st.integers(1, 9), st.booleans()
)


@settings(deadline=None)
@given(sizes, st.integers(1, 200), st.integers(1, 70), st.booleans())
def test_anything_fits_any_terminal(size, width, height, ascii_only):
    num_ranks, num_layers, num_replicas, per_node, events = size
    served_RL = np.random.default_rng(num_ranks).integers(0, 50, (num_ranks, num_layers))
    fields = {"rebalances": EVENTS, "enabled_reason": "on"} if events else {}
    state = snapshot(served_RL, per_node, num_replicas, **fields)
    lines = shown(state, width, height, ascii_only=ascii_only)
    assert lines[-1] == "12:00:00"[:width] or lines[-1].endswith("…")
    assert not ascii_only or "".join(lines).isascii()


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 20))
def test_with_room_every_rank_and_replica_has_its_line(num_ranks, num_replicas):
    state = snapshot(np.ones((num_ranks, 4)), 4, num_replicas)
    lines = shown(state, 80, num_ranks + num_replicas + 10)
    assert all(line_of(lines, f"r{rank}") for rank in range(num_ranks))
    assert all(line_of(lines, str(replica)) for replica in range(num_replicas))


def test_nothing_yet():
    state = Snapshot(
        "127.0.0.1:1",
        pb.GetServerInfoResponse(model="mosaic"),
        pb.GetBalanceResponse(),
        pb.GetLoadsResponse(),
    )
    text = "\n".join(shown(state))
    assert "not ready" in text
    assert "no expert has served anything" in text
    assert "no rank has reported on its experts" in text
    assert "no replica is connected" in text


def test_an_idle_window_is_no_load_at_all():
    lines = shown(snapshot(np.zeros((4, 3))))
    assert line_of(lines, "r2")[1:4] == ["·", "·", "·"]
    assert line_of(lines, "served") == ["served", "-", "-", "-"]
    assert "no expert has served anything" in lines[1]


def test_one_rank_is_even():
    lines = shown(snapshot([[5, 7]], 1, 1))
    assert line_of(lines, "r0")[1:3] == ["1.00", "1.00"]


def test_figures_that_are_none_do_not_stop_the_view():
    state = snapshot(np.ones((2, 2)))
    nan = float("nan")
    state.balance.ranks[0].step_ms = nan
    state.balance.ranks[1].inter_node_bytes_per_s = float("inf")
    state.balance.layers[0].balancedness = nan
    state.balance.layers[1].planned = nan
    state.balance.balancedness_mean = nan
    state.loads.replicas[0].kv_usage = nan
    state.loads.replicas[1].last_heard_s = nan
    lines = shown(state)
    assert line_of(lines, "r0")[-1] == "?"
    assert line_of(lines, "served") == ["served", "-", "1.00"]


def test_a_rank_that_has_not_reported_all_layers_served_none_there():
    state = snapshot(np.full((2, 2), 10))
    del state.balance.ranks[1].served[1:]
    assert line_of(shown(state), "r1")[1:3] == ["1.00", "0"]


@pytest.mark.parametrize(("ready", "draining", "told"), [(1, 0, "ready"), (1, 1, "draining")])
def test_state_of_the_server(ready, draining, told):
    state = snapshot(np.ones((1, 1)), 1, 1)
    state.info.ready, state.info.draining = bool(ready), bool(draining)
    assert f"  {told}  1 x 1 ranks" in shown(state)[0]
