"""The text heat map: what a cell stands for, and that nothing is left out when things must fit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.top import heat_map
from deploy.top.heat_map import Bin

nodes_of_ranks = st.lists(st.integers(1, 9), min_size=1, max_size=40).map(
    lambda sizes: [node for node, size in enumerate(sizes) for _ in range(size)]
)


def test_relative_is_over_the_mean_of_the_layer():
    served_RL = np.array([[1.0, 0.0, 30.0], [3.0, 0.0, 10.0]])
    expected = [[0.5, np.nan, 1.5], [1.5, np.nan, 0.5]]
    np.testing.assert_array_equal(heat_map.relative(served_RL), expected)


@settings(deadline=None)
@given(nodes_of_ranks, st.integers(1, 50))
def test_every_rank_is_in_one_row_and_rows_respect_nodes(nodes, max_bins):
    rows = heat_map.rank_bins(nodes, max_bins)
    assert len(rows) <= max_bins
    assert sorted(rank for row in rows for rank in row.members) == list(range(len(nodes)))
    for row in rows:
        inside = {nodes[rank] for rank in row.members}
        whole = [rank for rank, node in enumerate(nodes) if node in inside]
        assert len(inside) == 1 or whole == list(row.members)


@pytest.mark.parametrize(
    ("max_bins", "labels"),
    [
        (9, ["r0", "r1", "r2", "r3", "r4", "r5", "r6", "r7"]),
        (7, ["r0-1", "r2-3", "r4-5", "r6-7"]),
        (2, ["r0-3", "r4-7"]),
        (1, ["n0-1"]),
    ],
)
def test_labels_name_ranks_then_nodes(max_bins, labels):
    rows = heat_map.rank_bins([0, 0, 0, 0, 1, 1, 1, 1], max_bins)
    assert [row.label for row in rows] == labels


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(1, 90))
def test_every_layer_is_in_one_column(num_layers, max_bins):
    columns = heat_map.even_bins(range(3, 3 + num_layers), max_bins)
    assert len(columns) <= max_bins
    assert [i for column in columns for i in column.members] == list(range(num_layers))
    assert all(len(column.members) == len(columns[0].members) for column in columns[:-1])


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))
def test_a_cell_shows_the_busiest_of_its_members(num_ranks, num_layers, max_rows, max_columns):
    rng = np.random.default_rng([num_ranks, num_layers])
    load_RL = rng.random((num_ranks, num_layers))
    load_RL[:, 0] = np.nan
    rows = heat_map.rank_bins([0] * num_ranks, max_rows)
    columns = heat_map.even_bins(range(num_layers), max_columns)
    found = heat_map.busiest(load_RL, rows, columns)
    for row, found_B in zip(rows, found, strict=True):
        for column, cell in zip(columns, found_B, strict=True):
            members = [load_RL[r, i] for r in row.members for i in column.members if i]
            assert cell == max(members) if members else np.isnan(cell)


@pytest.mark.parametrize("ascii_only", [False, True])
def test_characters_tell_loads_apart_without_colour(ascii_only):
    loads = np.array([0.2, 0.6, 0.9, 1.0, 1.1, 1.3, 1.7, 40.0])
    line = heat_map.heat_line(loads, 1, ascii_only=ascii_only).plain
    assert len(set(line)) == len(line) == len(loads)
    assert heat_map.scale(ascii_only=ascii_only).plain[0] == line[0]
    assert line.isascii() == ascii_only
    shown = heat_map.heat_line(loads[::-1], 2, ascii_only=ascii_only).plain
    assert shown.split() == list(reversed(line))


def test_numbers_where_there_is_room():
    loads = np.array([0.0, 0.954, 1.0, 12.34, np.nan])
    line = heat_map.heat_line(loads, heat_map.NUMBER_WIDTH, ascii_only=False)
    assert line.plain == "   0 0.95 1.00 12.3    · "


def test_balancedness_in_tenths_is_never_rounded_up():
    values = np.array([1.0, 0.996, 0.994, 0.9, 0.899, 0.05, np.nan])
    assert heat_map.balancedness_line(values, 1).plain == "==9980-"
    assert heat_map.balancedness_line(values[2:3], heat_map.NUMBER_WIDTH).plain == "0.99 "


@pytest.mark.parametrize(("num_columns", "room"), [(5, 58), (29, 58), (58, 58), (1, 3), (40, 44)])
def test_headers_stand_above_their_columns(num_columns, room):
    columns = [Bin(str(10 + i), (i,)) for i in range(num_columns)]
    width = heat_map.cell_width(num_columns, room)
    header = heat_map.header(columns, width).plain
    assert len(header) <= max(room, width * num_columns)
    for label in header.split():
        start = header.index(label)
        within = width * (int(label) - 10)
        assert within <= start < within + width


@settings(deadline=None)
@given(st.floats(0, 1e17))
def test_short_figures_are_short_and_right(value):
    text = heat_map.short(value)
    assert len(text) <= 4
    unit = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}.get(text[-1])
    shown = float(text[:-1]) * unit if unit else float(text)
    assert shown == pytest.approx(value, rel=0.06, abs=0.006)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_what_is_no_figure_is_a_question_mark(value):
    assert heat_map.short(value) == "?"
