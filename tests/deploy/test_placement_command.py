"""`expertmesh placement`: tables where they fit, else a line for each layer; always all as JSON."""

import json
import socket

import numpy as np
import pytest

from deploy.placement import layer_views, placement_command
from deploy.server_options import Server
from router.placement import Placement
from tests.deploy.fake_control import FakeControl, placement_message, serving


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def show(placement, layer=None, json_file=None, layers=None):
    control = FakeControl()
    control.placement = placement_message(placement, layers)
    with serving(control) as endpoint:
        return placement_command(Server(endpoint), layer, json_file)


def rows(output):
    """The cells of every line of a table."""
    return [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in output.splitlines()
        if line.startswith("│")
    ]


def test_small_cluster_slot_by_slot(capsys):
    placement = Placement(
        physical_to_logical=np.array([[0, 1, 2, 0], [0, 1, 2, -1]]),
        num_experts=3,
        num_ranks=2,
        ranks_per_node=1,
        epoch=4,
    )
    assert show(placement, layers=[1, 2]) == 0
    output = capsys.readouterr().out
    assert "epoch 4: 3 experts a layer on 2 ranks, 2 slots each" in output
    assert rows(output) == [
        ["0", "0", "0*", "1"],
        ["1", "1", "2", "0*"],
        ["0", "0", "0", "1"],
        ["1", "1", "2", "-"],
    ]
    assert "* expert with more than one copy" in output


def test_equal_neighbours_share_a_table():
    placement = Placement.contiguous(5, 8, 4).with_layers({3: np.array([1, 0, 2, 3, 4, 5, 6, 7])})
    views = layer_views(placement_message(placement))
    assert [view.name for view in views] == ["layers 1 to 3", "layer 4", "layer 5"]


def test_large_cluster_line_by_line(capsys):
    rng = np.random.default_rng(0)
    physical = np.stack([rng.permutation(np.r_[np.arange(256), rng.integers(0, 9, 64)])] * 58)
    physical[1:] = rng.permuted(physical[1:], axis=1)
    physical[7, np.flatnonzero(physical[7] == 3)[1:]] = -1
    placement = Placement(
        physical_to_logical=physical, num_experts=256, num_ranks=64, ranks_per_node=8
    )
    assert show(placement) == 0
    output = capsys.readouterr().out
    assert all(len(line) <= 80 for line in output.splitlines())
    lines = {cells[0]: cells[1:] for cells in rows(output) if cells[0]}
    assert list(lines) == [str(layer) for layer in range(1, 59)]
    copies_LE = placement.replica_counts
    for layer, (redundant, empty, most) in enumerate(lines.values()):
        assert int(redundant) == (copies_LE[layer] - 1).sum()
        assert int(empty) == (physical[layer] < 0).sum()
        expert = int(most.split(" of ")[1].split(",")[0].split(";")[0])
        assert copies_LE[layer, expert] == copies_LE[layer].max() == int(most.split()[0])
    assert "--layer N" in output


@pytest.mark.parametrize("num_experts", [32, 256])
def test_one_layer_in_full(capsys, num_experts):
    placement = Placement.contiguous(58, num_experts, 4, ranks_per_node=2)
    assert show(placement, layer=40) == 0
    output = capsys.readouterr().out
    assert "experts of layer 40 by slot" in output
    assert all(len(line) <= 80 for line in output.splitlines())
    cells = [cell for row in rows(output) for cell in row[2:]]
    assert [int(i) for cell in cells for i in cell.split()] == list(range(num_experts))


def test_json_has_every_slot(tmp_path):
    placement = Placement.contiguous(3, 8, 4, 3, ranks_per_node=2, epoch=9)
    assert show(placement, json_file=tmp_path / "p.json", layers=[1, 2, 5]) == 0
    written = json.loads((tmp_path / "p.json").read_text())
    assert (written["epoch"], written["num_experts"], written["ranks_per_node"]) == (9, 8, 2)
    assert list(written["layers"]) == ["1", "2", "5"]
    back = np.array(list(written["layers"].values())).reshape(3, -1)
    np.testing.assert_array_equal(back, placement.physical_to_logical)


def test_a_layer_without_experts_is_refused(capsys):
    assert show(Placement.contiguous(3, 8, 4), layer=0) == 2
    assert "--layer 0: no experts there; layers with experts: 1 to 3" in capsys.readouterr().err


def test_no_layer_and_no_server(capsys):
    control = FakeControl()
    control.placement.ClearField("layers")
    with serving(control) as endpoint:
        assert placement_command(Server(endpoint), None, None) == 0
    assert "no layer with experts" in capsys.readouterr().out
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        endpoint = f"127.0.0.1:{nobody.getsockname()[1]}"
    assert placement_command(Server(endpoint), None, None) == 2
    assert endpoint in capsys.readouterr().err
